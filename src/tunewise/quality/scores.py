"""Everything that is measured about a model in one state, on one material: the base, or what it was tuned to."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from tunewise.engine.generate import Answer, Sampling, generate
from tunewise.methods.method import Run
from tunewise.quality.battery import Items
from tunewise.quality.exceptional import contract_items
from tunewise.quality.forgetting import general_losses
from tunewise.quality.losses import DocumentLosses, document_losses
from tunewise.quality.material import Material
from tunewise.quality.prompts import Prompt
from tunewise.quality.suites import Subject, suite_named
from tunewise.workload.corpus import Corpus

BATTERY_QUESTIONS = 64


@dataclass(frozen=True, eq=False)
class Scores:
    """One state's numbers; None (or empty) for what the material has not.

    Attributes:
        general, validation, training, endings: losses by document.
        answerable, unanswerable: greedy answers to the prompts.
        contract: whether each exceptional input was answered within the contract.
        battery: suite -> metric -> its values.
        loss_seconds, answer_seconds: what the losses took, and the answers.
    """

    general: DocumentLosses | None
    validation: DocumentLosses | None
    training: DocumentLosses | None
    endings: DocumentLosses | None
    answerable: tuple[Answer, ...]
    unanswerable: tuple[Answer, ...]
    contract: Mapping[str, Items] = field(default_factory=dict)
    battery: Mapping[str, Mapping[str, Items]] = field(default_factory=dict)
    loss_seconds: float = 0.0
    answer_seconds: float = 0.0

    def joined(self, more: Scores) -> Scores:
        """Return these scores with those of more pieces behind them."""
        return replace(
            self,
            general=_joined(self.general, more.general),
            validation=_joined(self.validation, more.validation),
            training=_joined(self.training, more.training),
            endings=_joined(self.endings, more.endings),
            answerable=self.answerable + more.answerable,
            unanswerable=self.unanswerable + more.unanswerable,
            loss_seconds=self.loss_seconds + more.loss_seconds,
            answer_seconds=self.answer_seconds + more.answer_seconds,
        )

    def of(self, part: Material) -> Scores:
        """Return the scores of `part`, a beginning of what was measured."""
        return replace(
            self,
            general=_first(self.general, 0 if part.general is None else len(part.general.domains)),
            validation=_first(self.validation, len(part.validation)),
            training=_first(self.training, len(part.training)),
            endings=_first(self.endings, len(part.endings)),
            answerable=self.answerable[: len(part.answerable)],
            unanswerable=self.unanswerable[: len(part.unanswerable)],
        )


def scores_of(run: Run, material: Material) -> Scores:
    """Measure the run's model as it stands; nothing of the run changes, its random state included."""
    return replace(text_scores(run, material), contract=_contract(run, material), battery=_battery(run, material))


def text_scores(run: Run, material: Material) -> Scores:
    """Measure the losses and the answers: everything that more or fewer pieces can be taken for."""
    started = time.perf_counter()
    found = replace(
        losses_of(run, material),
        training=_losses(run, material.training),
        endings=_losses(run, material.endings),
    )
    between = time.perf_counter()
    found = replace(
        found,
        answerable=_answers(run, material, material.answerable),
        unanswerable=_answers(run, material, material.unanswerable),
    )
    return replace(found, loss_seconds=between - started, answer_seconds=time.perf_counter() - between)


def losses_of(run: Run, material: Material) -> Scores:
    """Measure only what tells the gain and what was forgotten: the losses on held-out documents and on general text."""
    general = general_losses(run, material.general) if material.general is not None else None
    return Scores(general, _losses(run, material.validation), None, None, (), ())


def _joined(first: DocumentLosses | None, more: DocumentLosses | None) -> DocumentLosses | None:
    if first is None or more is None:
        return first if more is None else more
    return DocumentLosses(np.concatenate((first.sums, more.sums)), np.concatenate((first.counts, more.counts)))


def _first(losses: DocumentLosses | None, num: int) -> DocumentLosses | None:
    return None if losses is None else DocumentLosses(losses.sums[:num], losses.counts[:num])


def _losses(run: Run, corpus: Corpus) -> DocumentLosses | None:
    return document_losses(run, corpus, range(len(corpus))) if len(corpus) else None


def _contract(run: Run, material: Material) -> dict[str, Items]:
    if material.contract is None:
        return {}
    sampling = Sampling(max_new_tokens=min(material.max_new_tokens, material.context - 1))
    room = material.context - sampling.max_new_tokens
    prompts = [question.ids[-room:] for _, question in material.contract_cases]
    outputs = [answer.text for (answer,) in generate(run, material.tokenizer, prompts, sampling)]
    kinds = [kind for kind, _ in material.contract_cases]
    return contract_items(kinds, outputs, material.contract, material.refusals)


def _battery(run: Run, material: Material) -> dict[str, dict[str, Items]]:
    found = {}
    for name, data in run.recipe.quality.battery.items():
        subject = Subject(run, material.tokenizer, material.context, data, material.max_new_tokens, BATTERY_QUESTIONS)
        found[name] = suite_named(name)(subject)
    return found


def _answers(run: Run, material: Material, prompts: tuple[Prompt, ...]) -> tuple[Answer, ...]:
    if not prompts:
        return ()
    sampling = Sampling(max_new_tokens=material.max_new_tokens)
    answers = generate(run, material.tokenizer, [prompt.ids for prompt in prompts], sampling)
    return tuple(answer for (answer,) in answers)
