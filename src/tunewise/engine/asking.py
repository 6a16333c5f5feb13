"""The base model, asked before the training: loaded when the first question comes, every answer kept on disk.

An answer's key is the hash of all that it depends on: the weights, the tokenizer, the methods that change the base,
device and versions, and the question with its seed. So a resumed run, and every trial of a tuning, sees the same data,
bit for bit, and the base is asked once.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from tunewise.engine.generate import Sampling, generate
from tunewise.engine.knowledge import few_shot_texts, slick
from tunewise.errors import InputError
from tunewise.methods.method import Run
from tunewise.methods.peft import Peft
from tunewise.recipe import AbstainSpec, Recipe, Slot
from tunewise.workload.base_voice import Fact, TokenIds
from tunewise.workload.matching import contains, exact_match
from tunewise.workload.model import model_fingerprint
from tunewise.workload.places import cache_folder
from tunewise.workload.tokens import bos_ids

TEXTS_AT_ONCE = 64
MOST_ROUNDS = 50
"""A base that ends its texts at once is asked so often before that is an error."""

KEPT_SLOTS = (Slot.STORAGE, Slot.WEIGHTS, Slot.ADAPTER)
"""Of the recipe's methods, those without which its base may not fit here; an untrained adapter changes nothing."""


class AskedBase:
    """A `workload.base_voice.BaseVoice` that computes."""

    def __init__(
        self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, context: int, make_run: Callable[[Recipe], Run]
    ) -> None:
        """Prepare to ask; nothing is loaded yet.

        Args:
            recipe: the complete one.
            tokenizer: the model's.
            context: the most positions that the model knows.
            make_run: loads the weights and builds the run of a recipe.
        """
        self._recipe, self._tokenizer, self._context, self._make_run = recipe, tokenizer, context, make_run
        self._loaded: Run | None = None

    def texts(self, num_tokens: int, piece_tokens: int, seed: int) -> list[TokenIds]:
        """See `BaseVoice.texts`.

        Raises:
            InputError: no token begins a text, or the base ends its texts at once.
        """
        question = {"num_tokens": num_tokens, "piece_tokens": piece_tokens, "seed": seed}
        return _as_ids(self._kept("texts", question, lambda: self._texts(num_tokens, piece_tokens, seed)))

    def answers(self, prompts: Sequence[TokenIds], max_new_tokens: int, seed: int) -> list[TokenIds]:
        """See `BaseVoice.answers`."""
        question = {"prompts": prompts, "max_new_tokens": max_new_tokens, "seed": seed}

        def ask() -> list[TokenIds]:
            sampling = Sampling(max_new_tokens, temperature=1.0, seed=seed)
            return [answer.ids for (answer,) in self._generate(prompts, sampling)]

        return _as_ids(self._kept("answers", question, ask))

    def categories(self, facts: Sequence[Fact], spec: AbstainSpec, seed: int) -> list[str]:
        """See `BaseVoice.categories`."""
        asked = {name: getattr(spec, name) for name in ("prompts", "shots", "samples", "temperature", "max_new_tokens")}
        question = {"facts": [asdict(fact) for fact in facts], **asked, "seed": seed}
        found: list[str] = self._kept("categories", question, lambda: self._categories(facts, spec, seed))
        return found

    def _texts(self, num_tokens: int, piece_tokens: int, seed: int) -> list[TokenIds]:
        begin = bos_ids(self._tokenizer)
        start = begin[0] if begin else self._tokenizer.eos_token_id
        if start is None:
            raise InputError(
                "data.replay.source: self: this tokenizer has neither a BOS nor an EOS token, so no text can be begun. "
                "Take the source self_answers, default, or a file."
            )
        texts: list[TokenIds] = []
        held = 0
        for round_ in range(MOST_ROUNDS):
            new = max(1, min(piece_tokens, self._context) - 1)
            sampling = Sampling(new, temperature=1.0, num_samples=TEXTS_AT_ONCE, seed=seed + round_)
            (drawn,) = self._generate([(start,)], sampling)
            for answer in drawn:
                text = (*begin, *answer.ids)
                if held < num_tokens and len(text) > 1:
                    texts.append(text)
                    held += len(text)
            if held >= num_tokens:
                return texts
        raise InputError(
            f"data.replay.source: self: the base ends nearly all of {MOST_ROUNDS * TEXTS_AT_ONCE} texts at once, so "
            f"only {held:,} of {num_tokens:,} tokens came together. Take the source self_answers, default, or a file."
        )

    def _categories(self, facts: Sequence[Fact], spec: AbstainSpec, seed: int) -> list[str]:
        shots = [(fact.question, fact.answer) for fact in facts]
        texts = few_shot_texts([fact.question for fact in facts], shots, spec.prompts, spec.shots, seed)
        samplings = [Sampling(spec.max_new_tokens)]
        if spec.samples:
            samplings.append(Sampling(spec.max_new_tokens, spec.temperature, spec.samples, seed))

        def is_right(number: int, said: str) -> bool:
            wanted = (facts[number].answer,)
            return bool(exact_match(said, wanted) or contains(said, wanted))

        run = self._run()
        with _base_of(run):
            return list(slick(run, self._tokenizer, texts, is_right, samplings, self._context))

    def _generate(self, prompts: Sequence[TokenIds], sampling: Sampling) -> Any:
        run = self._run()
        with _base_of(run):
            return generate(run, self._tokenizer, prompts, sampling)

    def _run(self) -> Run:
        if self._loaded is None:
            kept = tuple(method for method in self._recipe.methods or () if method.slot in KEPT_SLOTS)
            self._loaded = self._make_run(self._recipe.replace(methods=kept))
        return self._loaded

    def _kept(self, kind: str, question: dict[str, Any], ask: Callable[[], Any]) -> Any:
        """Return an answer from the disk, or ask and keep it; where nothing can be written nothing is kept."""
        file = cache_folder() / "asked" / f"{kind}-{self._key(question)}.json"
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            answer = ask()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=file.parent, suffix=".part", delete=False, encoding="utf-8"
            ) as part:
                json.dump(answer, part, separators=(",", ":"))
            Path(part.name).replace(file)
        except OSError:
            pass
        return answer

    def _key(self, question: dict[str, Any]) -> str:
        methods = {
            method.name: method.model_dump(mode="json")
            for method in self._recipe.methods or ()
            if method.slot in (Slot.STORAGE, Slot.WEIGHTS)
        }
        model = self._recipe.model
        content = {
            "weights": model_fingerprint(model),
            "tokenizer": [model.tokenizer, model.chat_template, len(self._tokenizer)],
            "methods": methods,
            "device": self._recipe.device,
            "versions": [torch.__version__, transformers.__version__],
            "question": question,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


def _base_of(run: Run) -> AbstractContextManager[Any]:
    """Return the region in which an untrained run is its base: peft's kinds do not all begin as that."""
    if run.recipe.get(Peft) is None:
        return nullcontext()
    off: AbstractContextManager[Any] = run.model.disable_adapter()  # type: ignore[operator]
    return off


def _as_ids(found: Sequence[Sequence[int]]) -> list[TokenIds]:
    return [tuple(ids) for ids in found]
