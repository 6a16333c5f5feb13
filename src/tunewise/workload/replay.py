"""Replay: general text mixed into the training documents, so that what the base model could do is practised on.

Rehearsal is the oldest cure of forgetting (Robins 1995). Bethune et al. (ICML 2025, scaling laws for forgetting): 1 %
of pre-training data in the mix prevents it; Kotha and Liang 2026 (arXiv 2603.04964): it can even help the new task.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from tunewise.errors import InputError
from tunewise.recipe import OWN_SOURCES, ReplaySpec
from tunewise.workload.base_voice import BaseVoice
from tunewise.workload.corpus import Corpus
from tunewise.workload.general_text import general_corpus
from tunewise.workload.own_text import own_corpus

SHORTEST_PIECE = 16


@dataclass(frozen=True, eq=False)
class Mixed:
    """Training documents with general text among them.

    Attributes:
        corpus: the user's documents, then the replayed ones; the draw of the global batches mixes them.
        num_pieces: replayed documents.
        num_tokens: their supervised tokens.
        said: one sentence for the user.
    """

    corpus: Corpus
    num_pieces: int
    num_tokens: int
    said: str


def mix(
    train: Corpus,
    replay: ReplaySpec,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    seed: int,
    base: BaseVoice | None = None,
) -> Mixed:
    """Add so much general text that it makes up `replay.fraction` of all supervised tokens, to the token.

    The text comes in pieces as long as a training document is on average: so a little of it is spread over many steps,
    and neither padding nor memory changes. Equal seeds give equal pieces.

    Args:
        train: the user's documents.
        replay: how much, and of what.
        tokenizer: the model's.
        max_length: of a document.
        seed: of what is drawn.
        base: the base model, where its own text is replayed.

    Raises:
        InputError: the general text cannot be read, or there is not enough of it, or no base to ask for its own.
    """
    own = int(train.num_supervised.sum())
    wanted = max(1, round(own * replay.fraction / (1 - replay.fraction)))
    piece = min(max_length, max(SHORTEST_PIECE, round(float(train.lengths.mean()))))
    drawn = seed ^ 0x5EED
    if replay.source in OWN_SOURCES:
        general = own_corpus(
            train, replay, base, piece=piece, num_tokens=wanted, max_length=max_length, seed=drawn % 2**32
        )
    else:
        general = general_corpus(replay.source, "replayed", tokenizer, max_length=piece, max_tokens=wanted, seed=drawn)
    found = int(general.is_supervised.sum())
    if found < wanted:
        raise InputError(
            f"data.replay: {replay.fraction:.0%} of the training are {wanted:,} tokens of general text, and "
            f"'{replay.source}' has only {found:,} that may be replayed. Bring more text, or a smaller fraction."
        )
    kind = "the base's own text" if replay.source in OWN_SOURCES else "general text"
    said = (
        f"replay: {len(general)} pieces of {kind} ('{replay.source}'), {found:,} of {own + found:,} supervised "
        f"tokens ({found / (own + found):.1%})"
    )
    return Mixed(Corpus.joined(train, general), len(general), found, said)
