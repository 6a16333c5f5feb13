"""The gate: what was measured before and after training is held against the recipe's thresholds.

A number fails where it is on the wrong side of its threshold; a task's gain must be shown, so there the whole interval
counts. Rates of few prompts fail only when their interval excludes what is demanded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tunewise.engine.generate import Answer
from tunewise.quality.battery import compare
from tunewise.quality.forgetting import change_of, forgetting
from tunewise.quality.material import Material
from tunewise.quality.measured import Forgetting, Measured, Overfitting
from tunewise.quality.overfitting import leaked_share, overfitting
from tunewise.quality.scores import Scores
from tunewise.quality.statistics import mean, paired_difference, rate
from tunewise.quality.verdict import Check, QualityReport
from tunewise.recipe import QualitySpec
from tunewise.workload.corpus import Corpus

LEAST_ENDING = 0.1
"""An answer's end must be given this probability on average, or at least have become likelier for certain."""


@dataclass(frozen=True)
class Context:
    """What the gate must know besides the scores.

    Attributes:
        train: all training documents, for leaks.
        best_loss, last_loss: the validation losses of the training's best evaluation and of the state that was kept.
        template_problems: what `template.template_problems` found.
    """

    train: Corpus
    best_loss: float | None
    last_loss: float | None
    template_problems: tuple[str, ...] = ()


def judge(spec: QualitySpec, material: Material, base: Scores, tuned: Scores, context: Context) -> QualityReport:
    """Compare the two states and return every check with its verdict."""
    lost = None
    if material.general is not None and base.general is not None and tuned.general is not None:
        lost = forgetting(material.general, base.general, tuned.general)
    over = _overfitting(base, tuned)
    checks = (
        *_finite(tuned),
        _task_gain(spec, base, tuned),
        *_forgetting(spec, lost),
        *_overfitting_checks(spec, over, context),
        _leaks(spec, material, context),
        _template(context),
        _endings(material, base, tuned),
        *_refusals(spec, material, base, tuned),
        *_contract(base, tuned),
        *_battery(base, tuned),
    )
    passed = all(check.status != "failed" for check in checks)
    return QualityReport(passed=passed, checks=checks, forgetting=lost, overfitting=over)


def _finite(tuned: Scores) -> Iterator[Check]:
    for losses in (tuned.validation, tuned.general):
        if losses is not None and not np.isfinite(losses.sums).all():
            num = int((~np.isfinite(losses.sums)).sum())
            yield Check(name="finite", status="failed", sentence=f"the loss of {num} documents is not a finite number")
            return


def _task_gain(spec: QualitySpec, base: Scores, tuned: Scores) -> Check:
    threshold = f"interval above {spec.min_gain:g} nats"
    if base.validation is None or tuned.validation is None:
        return Check(
            name="task gain", status="not measured", threshold=threshold, sentence="there are no held-out documents"
        )
    loss = change_of(base.validation, tuned.validation)
    gain = Measured(middle=-loss.middle, low=-loss.high, high=-loss.low, noise_floor=loss.noise_floor, num=loss.num)
    return Check(
        name="task gain",
        status="passed" if gain.low > spec.min_gain else "failed",
        measured=gain,
        threshold=threshold,
        sentence=f"the loss on held-out documents went from {base.validation.mean:.3f} to "
        f"{tuned.validation.mean:.3f} nats a token",
    )


def _forgetting(spec: QualitySpec, lost: Forgetting | None) -> Iterator[Check]:
    if lost is None:
        sentence = "the base is no trained model, so it has nothing to forget"
        yield Check(name="forgetting", status="not measured", sentence=sentence)
        return
    named = {"forgetting": (lost.change, spec.max_forgetting)}
    named |= {f"forgetting, {name}": (each, spec.max_domain_forgetting) for name, each in lost.domains.items()}
    for name, (change, budget) in named.items():
        yield Check(
            name=name,
            status="passed" if change.middle <= budget else "failed",
            measured=change,
            threshold=f"at most {budget:g} nats",
            sentence=f"general text became {abs(change.middle):.3f} nats a token "
            f"{'harder' if change.middle > 0 else 'easier'}",
        )


def _overfitting(base: Scores, tuned: Scores) -> Overfitting | None:
    if base.training is None or tuned.training is None or base.validation is None or tuned.validation is None:
        return None
    return overfitting(base.training, tuned.training, base.validation, tuned.validation)


def _overfitting_checks(spec: QualitySpec, over: Overfitting | None, context: Context) -> Iterator[Check]:
    threshold = f"at most {spec.max_gap:g} nats"
    if over is None:
        sentence = "there are no held-out documents"
        yield Check(name="overfitting", status="not measured", threshold=threshold, sentence=sentence)
        return
    yield Check(
        name="overfitting",
        status="passed" if over.gap.middle <= spec.max_gap else "failed",
        measured=over.gap,
        threshold=threshold,
        sentence=f"training documents became {over.gap.middle:.3f} nats a token easier than held-out ones",
    )
    if context.best_loss is not None and context.last_loss is not None:
        regress = context.last_loss - context.best_loss
        yield Check(
            name="best state",
            status="passed" if regress <= spec.max_regress else "failed",
            threshold=f"at most {spec.max_regress:g} nats",
            sentence=f"the kept state's validation loss is {regress:.3f} nats above the best that was seen",
        )


def _leaks(spec: QualitySpec, material: Material, context: Context) -> Check:
    if len(material.validation) == 0:
        return Check(name="leaks", status="not measured", sentence="there are no held-out documents")
    share = leaked_share(context.train, material.validation)
    return Check(
        name="leaks",
        status="passed" if share.middle <= spec.max_leaked else "failed",
        measured=share,
        threshold=f"at most {spec.max_leaked:.0%}",
        sentence=f"training has seen {share.middle:.0%} of the held-out documents",
    )


def _template(context: Context) -> Check:
    problems = context.template_problems
    return Check(
        name="template",
        status="failed" if problems else "passed",
        sentence="; ".join(problems) or "generation asks as training taught",
    )


def _endings(material: Material, base: Scores, tuned: Scores) -> Check:
    if material.taught_ends == 0.0:  # an end can become likelier without being taught, but never likely
        return Check(name="endings", status="failed", sentence="the end of no training answer was learnt")
    if base.endings is None or tuned.endings is None:
        return Check(name="endings", status="not measured", sentence="no held-out answer has an end")
    before, after = np.exp(-base.endings.sums), np.exp(-tuned.endings.sums)
    ending, rise = mean(after), paired_difference(-base.endings.sums, -tuned.endings.sums)
    is_likely = ending.middle >= max(LEAST_ENDING, before.mean() / 2)
    return Check(
        name="endings",
        status="passed" if is_likely or rise.is_above_zero else "failed",
        measured=ending,
        threshold=f"at least {LEAST_ENDING:.0%}, or likelier than before",
        sentence=f"where answers end the model stops with probability {ending.middle:.0%} "
        f"(before: {before.mean():.0%})",
    )


def _refusals(spec: QualitySpec, material: Material, base: Scores, tuned: Scores) -> Iterator[Check]:
    threshold = f"at most {spec.max_false_refusals:.0%}"
    if not material.answerable:
        yield Check(
            name="false refusals", status="not measured", threshold=threshold, sentence="there are no prompts to answer"
        )
    else:
        refused = _refused(material, tuned.answerable)
        before = _refused(material, base.answerable)
        is_worse = refused.middle > spec.max_false_refusals and refused.middle > before.middle
        yield Check(
            name="false refusals",
            status="failed" if is_worse else "passed",
            measured=refused,
            threshold=threshold,
            sentence=f"{refused.middle:.0%} of {refused.num} prompts that have an answer were refused",
        )
    if material.unanswerable:
        refused = _refused(material, tuned.unanswerable)
        yield Check(
            name="refusals",
            status="failed" if refused.high < spec.min_refusals else "passed",
            measured=refused,
            threshold=f"at least {spec.min_refusals:.0%}",
            sentence=f"{refused.middle:.0%} of {refused.num} prompts that must be refused were refused",
        )


def _contract(base: Scores, tuned: Scores) -> Iterator[Check]:
    found = compare(base.contract, tuned.contract).get("contract")
    if found is not None and found.before is not None:
        yield Check(
            name="contract",
            status="failed" if found.is_worse else "passed",
            measured=found.after,
            threshold="not worse than the base",
            sentence=f"{found.after.middle:.0%} of {found.after.num} inputs, exceptional ones among them, "
            f"were answered within the contract (before: {found.before.middle:.0%})",
        )


def _battery(base: Scores, tuned: Scores) -> Iterator[Check]:
    for suite, after in tuned.battery.items():
        for metric, found in compare(base.battery.get(suite), after).items():
            if found.before is not None and found.is_better:
                yield Check(
                    name=f"battery, {metric}",
                    status="failed" if found.is_worse else "passed",
                    measured=found.change,
                    threshold="not worse beyond doubt",
                    sentence=f"the suite {suite} went from {found.before.middle:.3f} to {found.after.middle:.3f}",
                )


def _refused(material: Material, answers: tuple[Answer, ...]) -> Measured:
    return rate(sum(material.refusals.matches(answer.text) for answer in answers), len(answers))
