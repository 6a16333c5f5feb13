"""Findings as tunings of every kind would give them: made up by formulas, for tests and for looking at pages."""

from __future__ import annotations

import random
from typing import Any

import yaml

from tests.unit.report.sample_batch import BATCHES, arms, batch, batch_point, loss_at
from tests.unit.report.sample_methods import interval, many_methods, methods
from tunewise.lab.findings import (
    Confirmation,
    Contender,
    Cost,
    Elsewhere,
    Findings,
    MethodFindings,
    NoiseScale,
    TrainingResult,
)
from tunewise.lab.outcome import Point


def confirmation() -> Confirmation:
    return Confirmation(
        winner=Contender(
            label="packing + bf16 + chunked loss", loss=interval(2.047, 0.003), step_seconds=interval(0.352, 0.02),
            tokens_per_second=interval(13_800, 0.02), peak_tensor_bytes=141 * 2**20, outcome="measured",
        ),
        runner_up=Contender(
            label="packing + chunked loss", loss=interval(2.043, 0.003), step_seconds=interval(0.498, 0.02),
            tokens_per_second=interval(9_750, 0.02), peak_tensor_bytes=183 * 2**20, outcome="measured",
        ),
        num_seeds=2,
        sentence="With two fresh seeds the winner is 29 % faster than the runner-up, at a loss as good.",
    )  # fmt: skip


def training(**changes: Any) -> TrainingResult:
    noise = random.Random(8)
    steps = 316
    made = TrainingResult(
        first_loss=3.52, best_loss=1.884, best_step=290, steps=steps, seconds=118.0, tokens=1_540_000,
        peak_memory_bytes=143 * 2**20, predicted_seconds=interval(112.0, 0.12),
        curve=tuple(
            Point(supervised_tokens=step * 4096, loss=loss_at(4096, step * 4096) + (0.004 if step > 300 else 0))
            for step in (*range(0, steps, 29), steps)
        ),
        training_curve=tuple(
            Point(supervised_tokens=step * 4096, loss=loss_at(4096, step * 4096) - 0.03 + noise.gauss(0, 0.05))
            for step in range(1, steps + 1)
        ),
        saved="runs/tuned/adapter",
    )  # fmt: skip
    return made.model_copy(update=changes)


RECIPE: dict[str, Any] = {
    "model": {"name": "embedded"},
    "data": {"source": "stdlib", "validation": 0.05},
    "methods": {
        "lora": {"rank": 16, "alpha": 32},
        "packing": {"row_tokens": 1024},
        "precision": {"compute": "bf16"},
        "supervised_loss": {"chunk_tokens": 512},
        "adamw": {"beta2": 0.96},
    },
    "batch": {"supervised_tokens": 4096, "micro_batch_size": 8},
    "training": {"epochs": 2, "learning_rate": 0.003, "schedule": "linear", "warmup": 0.03},
    "seed": 0,
}

ELSEWHERE = (
    Elsewhere(
        machine="NVIDIA RTX 4090", label="packing + bf16 + flash attention", peak_bytes=round(1.4 * 2**30),
        tokens_per_second=interval(412_000, 0.35), run_seconds=interval(3.9, 0.35),
        change="flash attention comes in; 64 rows at once, no accumulation",
    ),
    Elsewhere(
        machine="NVIDIA H200", label="packing + bf16 + flash attention", peak_bytes=round(1.4 * 2**30),
        tokens_per_second=interval(1_020_000, 0.4), run_seconds=interval(1.6, 0.4),
        change="the same as on the RTX 4090; the machine would be idle most of the time",
    ),
    Elsewhere(
        machine="NVIDIA RTX 4060", label="", peak_bytes=None, tokens_per_second=None, run_seconds=None,
        change="does not fit: at least 9.1 GiB of 7.6 GiB",
    ),
)  # fmt: skip

COSTS = (
    Cost(part="describing the work", num_trials=0, num_failed=0, num_reused=0, seconds=4.2),
    Cost(part="batch size", num_trials=32, num_failed=0, num_reused=0, seconds=141.0),
    Cost(part="micro-batch", num_trials=5, num_failed=0, num_reused=0, seconds=9.5),
    Cost(part="methods", num_trials=21, num_failed=0, num_reused=3, seconds=71.0),
    Cost(part="confirmation", num_trials=4, num_failed=0, num_reused=0, seconds=38.0),
)


def findings(**changes: Any) -> Findings:
    """A tuning with everything; `changes` replace fields."""
    made = Findings(
        tunewise="0.1.0", date="2026-02-11T14:32:05+00:00", model="embedded", data="stdlib", num_parameters=3_950_000,
        num_documents=5_412, num_tokens=1_190_000, num_supervised_tokens=648_000, longest_document=2_031,
        machine="AMD EPYC 9B45, 2 cores", machine_memory_bytes=24 * 2**30, price_per_hour=0.08,
        headline=(
            "Train with 4,096 supervised tokens a step (about 34 records) at a learning rate of 3e-3: no batch gave a "
            "better result that can be told from noise, and the smaller ones take longer.",
            "Packing, bf16 and the chunked loss make a step 2.8 times as fast as the baseline (2.75 to 2.91) and "
            "take 63 % of the memory away, at a loss that cannot be told from the baseline's.",
            "With two fresh seeds it beat the runner-up by 29 % in time; the whole training takes 2 min here.",
        ),
        batch=batch(), methods=methods(), confirmation=confirmation(), training=training(), costs=COSTS,
        budget_seconds=300.0, search_seconds=263.7, elsewhere=ELSEWHERE, recipe=RECIPE,
        recipe_yaml=yaml.safe_dump(RECIPE, sort_keys=False), command="tunewise train runs/tuned/recipe.yaml",
        outcome="complete", versions={"tunewise": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0"},
    )  # fmt: skip
    return made.model_copy(update=changes)


def batch_only() -> Findings:
    """What `tunewise study batch` finds."""
    return findings(
        methods=None, confirmation=None, training=None, elsewhere=(), costs=COSTS[:3],
        headline=findings().headline[:1], search_seconds=155.0, budget_seconds=None, price_per_hour=None,
    )  # fmt: skip


def methods_only() -> Findings:
    """What `tunewise study methods` finds."""
    return findings(
        batch=None, confirmation=None, training=None, costs=COSTS[3:4], headline=findings().headline[1:2],
        search_seconds=71.0,
    )  # fmt: skip


def cut_short() -> Findings:
    """The budget ended within the first round of the batch study."""
    first = tuple(each for each in arms() if each.rung == 0)[:7]
    points = tuple(batch_point(each, first) for each in (512, 1024, 2048))
    short = batch(
        arms=first, curve=tuple(each.model_copy(update={"is_tied": True}) for each in points), seed_noise=None,
        tie_band=0.01, critical_batch=None, undecided=(512, 1024, 2048),
        chosen_tokens=2048, documents=17.0,
        noise=(NoiseScale(estimator="two batches", tokens=None, low=900.0, high=None, num_batches=2),),
        sentences=("The budget of 30 s ended before any batch could be told from another; 2,048 is the default.",),
    )  # fmt: skip
    return findings(
        batch=short, methods=None, confirmation=None, training=None, elsewhere=(),
        costs=(Cost(part="batch size", num_trials=7, num_failed=0, num_reused=0, seconds=30.6),),
        budget_seconds=30.0, search_seconds=30.6,
        headline=("The budget of 30 s did not suffice to choose a batch; the default of 2,048 tokens was kept.",),
        outcome="stopped by its budget of 30 s after 7 trials: no batch was decided on and no method was tried",
    )  # fmt: skip


def with_failures() -> Findings:
    """Trials that ran out of memory, hung and crashed, and a runner-up that failed."""
    failed = [each for each in arms() if each.batch_tokens != 512]
    reasons = {1.1e-3: "out of memory", 2.1e-3: "no answer for 60 s: killed", 4.2e-3: "not finite at step 9"}
    for rate, reason in reasons.items():
        gone = {"loss": None, "seconds": None, "tokens_per_second": None, "curve": (), "steps": 0}
        failed.append(arms()[0].model_copy(update={**gone, "learning_rate": rate, "outcome": reason}))
    points = tuple(batch_point(each, tuple(failed)) for each in BATCHES[1:])
    winner = confirmation().winner
    broken = Contender(
        label="packing + chunked loss", loss=None, step_seconds=None, tokens_per_second=None, peak_tensor_bytes=None,
        outcome="the interpreter crashed (signal 11)",
    )  # fmt: skip
    return findings(
        batch=batch(arms=tuple(failed), curve=points),
        methods=methods(has_failures=True),
        confirmation=Confirmation(winner=winner, runner_up=broken, num_seeds=2, sentence="The runner-up failed."),
        costs=(*COSTS[:3], Cost(part="methods", num_trials=24, num_failed=3, num_reused=0, seconds=190.0)),
    )


def one_method() -> Findings:
    """Only one method could be varied: no interactions."""
    return findings(methods=methods(names=("packing",)))


def one_batch() -> Findings:
    """The budget sufficed for one batch only, and the estimators of the noise contradict each other."""
    noise = (
        NoiseScale(estimator="two batches", tokens=3500.0, low=2300.0, high=6400.0, num_batches=8),
        NoiseScale(estimator="per example", tokens=None, low=23_600.0, high=None, num_batches=4),
    )
    first = tuple(each for each in arms() if each.batch_tokens == 4096 and each.rung == 0)[:1]
    short = tuple(each.model_copy(update={"curve": each.curve[-1:]}) for each in first)
    alone = batch(
        arms=short, curve=(batch_point(4096, first),), noise=noise, seed_noise=None, critical_batch=None,
        undecided=(4096,), sentences=("The budget sufficed for one batch: 4,096 supervised tokens a step.",),
    )  # fmt: skip
    return findings(batch=alone, methods=many_methods(), headline=findings().headline[2:])


def no_validation() -> Findings:
    """No validation data: no loss can be compared, so no batch study and no best step."""
    base = methods()
    blind: MethodFindings = base.model_copy(
        update={
            "trials": tuple(trial.model_copy(update={"loss": None}) for trial in base.trials),
            "single": tuple(each.model_copy(update={"loss_change": None}) for each in base.single),
        }
    )
    return findings(
        batch=None, methods=blind, confirmation=None, costs=COSTS[3:4],
        training=training(first_loss=None, best_loss=None, best_step=None, curve=()),
        headline=(
            "There is no validation data, so the batch of 4,096 tokens is the default and was not tuned.",
            *findings().headline[1:2],
        ),
    )  # fmt: skip


NASTY = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)><a href='javascript:alert(3)'>a</a>"
    "\"'`{{7*7}}{% raw %}<!--\u2028"
)


def hostile() -> Findings:
    """Every text that a user or a file can bring in is an attack."""
    winner = confirmation().winner.model_copy(update={"label": NASTY})
    renamed = methods(names=(NASTY, "bf16", "chunked loss"), excluded=((NASTY, NASTY),))
    nasty_arms = (*arms(), arms()[0].model_copy(update={"outcome": NASTY, "loss": None, "curve": ()}))
    return findings(
        model=NASTY, data=NASTY, machine=NASTY, date=NASTY, headline=(NASTY, NASTY), methods=renamed, command=NASTY,
        batch=batch(sentences=(NASTY,), micro_batch_reason=NASTY, arms=nasty_arms), outcome=NASTY, recipe_yaml=NASTY,
        versions={NASTY: NASTY}, training=training(saved=NASTY),
        confirmation=Confirmation(winner=winner, runner_up=None, num_seeds=1, sentence=NASTY),
        costs=(Cost(part=NASTY, num_trials=1, num_failed=0, num_reused=0, seconds=1.0),),
        elsewhere=(ELSEWHERE[2].model_copy(update={"machine": NASTY, "label": NASTY, "change": NASTY}),),
    )  # fmt: skip


CASES = {
    "full": findings,
    "batch_only": batch_only,
    "methods_only": methods_only,
    "cut_short": cut_short,
    "with_failures": with_failures,
    "one_method": one_method,
    "one_batch": one_batch,
    "no_validation": no_validation,
    "hostile": hostile,
}
