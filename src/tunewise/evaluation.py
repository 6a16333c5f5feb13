"""Judging a run: measured before training and after it, or later from what it saved.

In a training the base is the run itself before its first step; later it is the run as it is assembled anew. Either way
one model is in memory at a time.
"""

from __future__ import annotations

import itertools
import json
import time
from contextlib import suppress
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from tunewise.engine.assemble import Plan, assemble, settle
from tunewise.engine.checkpoint import storage_errors
from tunewise.engine.generate import Progress
from tunewise.engine.run_folder import RunFolder, read_metrics, write_whole
from tunewise.errors import InputError
from tunewise.export.reload import saved_run, saved_tokenizer, whole_model_run
from tunewise.methods.defaults import choose_device, complete
from tunewise.methods.method import Run
from tunewise.methods.reading import load_recipe, recipe_from_mapping
from tunewise.quality.base import base_weights
from tunewise.quality.battery import Comparison, Items, compare
from tunewise.quality.gate import Context, judge
from tunewise.quality.material import Material, material_of, training_tokens
from tunewise.quality.pace import Pace, fraction_after, fraction_before
from tunewise.quality.scores import Scores, scores_of, text_scores
from tunewise.quality.suites import Subject, suite_named
from tunewise.quality.template import template_problems
from tunewise.quality.verdict import FAILED_FILE, REPORT_FILE, QualityReport
from tunewise.recipe import Value
from tunewise.workload.batches import GlobalBatches
from tunewise.workload.corpus import Corpus
from tunewise.workload.model import context_length, load_config, load_tokenizer

GATE = "gate"
"""The suite that judges a run as the end of its training did."""


class Evaluation(Value):
    """What `tunewise evaluate` measured.

    Attributes:
        target: the run or the model.
        gate: the verdict on a run; None for a model, which has no base to be held against.
        suites: suite -> metric -> the number, for a run also of its base and the paired change.
        seconds: what it took.
    """

    target: str
    gate: QualityReport | None
    suites: dict[str, dict[str, Comparison]]
    seconds: float


class Judge:
    """Measures a run's base when it is made, and the tuned model when it is asked for its verdict.

    Attributes:
        material: what the base was measured on.
        base: its scores.
        fraction: how much of the planned material that is.
        seconds: what measuring has taken.
    """

    def __init__(self, plan: Plan, run: Run, fraction: float | None = None) -> None:
        """Measure the base: `run` as it was assembled, before its first step.

        Args:
            plan: the run's.
            run: untrained.
            fraction: of the planned material, where a verdict is to be made again; None: as the training's time allows.

        Raises:
            InputError: the recipe's quality section names a file that cannot be read.
        """
        started = time.perf_counter()
        self._plan, self._share = plan, plan.recipe.quality.share
        planned = material_of(plan)
        if fraction is not None:
            self.base = base_scores(run, planned.part(fraction))
        else:
            prepared = time.perf_counter() - started
            smallest = planned.part(0.0)
            self.base = base_scores(run, smallest)
            pace = Pace.of(smallest, self.base.loss_seconds, self.base.answer_seconds)
            fraction = fraction_before(planned, pace, training_tokens(plan), prepared, self._share)
            self.base = self.base.joined(more_scores(run, planned.more(0.0, fraction)))
        self.fraction = fraction
        self.material: Material = planned.part(fraction)
        self._planned = planned
        self._trained_on = documents_trained_on(plan)
        self.seconds = time.perf_counter() - started

    def verdict(
        self, run: Run, metrics: Path, tokenizer: PreTrainedTokenizerBase, training_seconds: float | None = None
    ) -> QualityReport:
        """Measure the tuned run and hold both against the recipe's thresholds.

        Args:
            run: with what was trained in it.
            metrics: the run's metrics.jsonl, for the validation losses on the way.
            tokenizer: the one that lies beside the result.
            training_seconds: what the training took: measuring then keeps to its share of it; None: on all that the
                base was measured on.
        """
        started = time.perf_counter()
        fraction, material, base = self.fraction, self.material, self.base
        if training_seconds is not None:
            pace = Pace.of(material, base.loss_seconds, base.answer_seconds)
            fraction = fraction_after(
                self._planned, pace, training_seconds, self.seconds, self._share, before=self.fraction
            )
            material = self._planned.part(fraction)
            base = base.of(material)
        tuned = scores_of(run, material)
        best, kept = _losses_on_the_way(metrics, self._plan.recipe.evaluation.keep_best)
        problems = template_problems(self._plan.tokenizer, tokenizer) if material.answerable else []
        context = Context(self._trained_on, best, kept, tuple(problems))
        report = judge(self._plan.recipe.quality, material, base, tuned, context)
        self.seconds += time.perf_counter() - started
        return report.model_copy(
            update={"fraction": fraction, "seconds": self.seconds, "training_seconds": training_seconds}
        )


def evaluate(
    target: str | Path,
    suites: tuple[str, ...] = (),
    data: str | None = None,
    *,
    progress: Progress = lambda done, total: None,
) -> Evaluation:
    """Measure a run (its saved files, and its base beside them) or any model.

    Args:
        target: a run's folder, or a model: hub id, folder, "embedded".
        suites: names; none: the gate for a run, the loss on general text for a model.
        data: questions or records for suites that need them; a run's own validation data stay the gate's.
        progress: told while answers are generated.

    Raises:
        InputError: no such run, model, suite or file, or the suite does not fit the target.
        MissingBackend: a suite needs a library that is not installed.
    """
    started = time.perf_counter()
    folder = Path(target)
    is_run = (folder / "recipe.yaml").is_file()
    names = suites or ((GATE,) if is_run else ("general",))
    others = {name: suite_named(name) for name in names if name != GATE}
    if not is_run and GATE in names:
        raise InputError(f"The gate compares a run with its base, and '{target}' is no run (it has no recipe.yaml).")
    if is_run:
        found = _evaluate_run(RunFolder(folder), names, data, progress)
    else:
        subject = model_subject(str(target), data, progress)
        found = None, {name: compare(None, suite(subject)) for name, suite in others.items()}
    return Evaluation(target=str(target), gate=found[0], suites=found[1], seconds=time.perf_counter() - started)


def _evaluate_run(
    home: RunFolder, names: tuple[str, ...], data: str | None, progress: Progress
) -> tuple[QualityReport | None, dict[str, dict[str, Comparison]]]:
    """Measure the base, then what the run saved; one model is in memory at a time."""
    plan = settle(load_recipe(home.recipe_file))
    others = {name: suite_named(name) for name in names if name != GATE}
    context = context_length(plan.config)
    base = assemble(plan)
    earlier = read_report(home.path)
    judge = Judge(plan, base, 1.0 if earlier is None else earlier.fraction) if GATE in names else None
    before: dict[str, dict[str, Items]] = {}
    for name, suite in others.items():
        with base_weights(base):
            before[name] = suite(Subject(base, plan.tokenizer, context, data, progress=progress))
    del base
    tokenizer = saved_tokenizer(plan, home.path)
    tuned = saved_run(plan, home.path)
    report = judge.verdict(tuned, home.path / "metrics.jsonl", tokenizer) if judge is not None else None
    subject = Subject(tuned, tokenizer, context, data, progress=progress)
    return report, {name: compare(before[name], suite(subject)) for name, suite in others.items()}


def model_subject(name: str, data: str | None, progress: Progress) -> Subject:
    """Load a model that no run of ours has made."""
    recipe = recipe_from_mapping({"model": name, "data": data or "stdlib", "methods": {}}, "command line")
    config = load_config(recipe.model)
    device = choose_device(recipe.device)
    recipe = complete(recipe, config, device)
    run = whole_model_run(recipe, recipe.model, device)
    return Subject(run, load_tokenizer(recipe.model), context_length(config), data, progress=progress)


def base_scores(run: Run, material: Material) -> Scores:
    """Measure the base inside a run that has not been trained."""
    with torch.random.fork_rng(), base_weights(run):
        return scores_of(run, material)


def more_scores(run: Run, material: Material) -> Scores:
    """Measure the base's losses and answers on more pieces."""
    with torch.random.fork_rng(), base_weights(run):
        return text_scores(run, material)


def documents_trained_on(plan: Plan) -> Corpus:
    """Return the documents that the training's steps draw: leaks are looked for in these, however many there are."""
    train = plan.data.train
    steps = GlobalBatches(train, plan.recipe.batch, plan.recipe.seed).from_step(0)
    drawn: set[int] = set()
    for _, documents in itertools.islice(steps, plan.num_steps):
        drawn.update(documents)
        if len(drawn) == len(train):
            return train
    return train.take(sorted(drawn))


def write_report(report: QualityReport, folder: Path) -> None:
    """Write `quality.json` into a run's folder, and mark the folder when the gate refused the model."""
    mark = folder / FAILED_FILE
    with storage_errors(f"cannot write to the run folder {folder}"):
        write_whole(folder / REPORT_FILE, report.model_dump_json(indent=1))
        if report.passed:
            with suppress(FileNotFoundError):
                mark.unlink()
        else:
            write_whole(mark, "The quality gate refused this model:\n" + "\n".join(report.reasons) + "\n")


def read_report(folder: Path) -> QualityReport | None:
    """Read a run's report; None when it has none."""
    file = folder / REPORT_FILE
    return QualityReport.model_validate(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def _losses_on_the_way(metrics: Path, keeps_best: bool) -> tuple[float | None, float | None]:
    """Return (best validation loss, that of the state that was kept)."""
    if not metrics.is_file():
        return None, None
    losses = [entry["validation_loss"] for entry in read_metrics(metrics) if entry["event"] == "evaluation"]
    if not losses:
        return None, None
    return min(losses), min(losses[1:] or losses) if keeps_best else losses[-1]
