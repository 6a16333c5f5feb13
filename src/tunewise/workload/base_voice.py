"""What preparing data may ask the base model, before any training: text of its own, and which answers it knows.

Preparing knows no model; who has one (`engine.asking`) answers these questions, and keeps the answers on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tunewise.errors import InputError
from tunewise.recipe import AbstainSpec

TokenIds = tuple[int, ...]


@dataclass(frozen=True)
class Fact:
    """A question as it stands in training, up to its answer, and the answer."""

    question: str
    answer: str


class BaseVoice(Protocol):
    """The base model, asked; equal questions with equal seeds get equal answers."""

    def texts(self, num_tokens: int, piece_tokens: int, seed: int) -> list[TokenIds]:
        """Return texts that the base goes on with from nothing, `num_tokens` tokens together or more.

        Each begins with the token that begins every text, where the tokenizer puts one, and has at most `piece_tokens`.
        """

    def answers(self, prompts: Sequence[TokenIds], max_new_tokens: int, seed: int) -> list[TokenIds]:
        """Return the base's answer to each prompt, with the token that ends it where it ended by itself."""

    def categories(self, facts: Sequence[Fact], spec: AbstainSpec, seed: int) -> list[str]:
        """Return how well the base knows each fact: "highly known", "maybe known", "weakly known" or "unknown"."""


def asked(base: BaseVoice | None, field: str) -> BaseVoice:
    """Return the base.

    Raises:
        InputError: nobody can ask it here.
    """
    if base is None:
        raise InputError(f"{field} asks the base model before the training, and no model is loaded here.")
    return base
