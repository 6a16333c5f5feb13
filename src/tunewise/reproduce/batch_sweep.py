"""Bekman's batch sweep: how throughput grows with the batch, and what one epoch learns at a fixed learning rate."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable

import numpy as np
import torch

from tunewise.engine.assemble import assemble
from tunewise.engine.step import gradients, parameter_groups, set_learning_rate, update
from tunewise.reproduce.bench import Bench
from tunewise.reproduce.claim import Claim, Finding, Mark
from tunewise.reproduce.learning import FUSED, Arm, arm, column, differences, mean, over_seeds, plan_of
from tunewise.reproduce.reproduction import Evidence, Reproduction, Table
from tunewise.reproduce.timing import in_turns, median_ratio
from tunewise.workload.batches import Layout
from tunewise.workload.corpus import Corpus

BATCHES = (1, 2, 4, 8, 16, 32)
PUBLISHED_SPEED = (7.77, 15.51, 29.66, 61.16, 115.84, 224.96)
PUBLISHED_LOSS = (1.90, 2.01, 2.09, 2.16, 2.25, 2.38)
LENGTH = 64

CLAIMS = (
    Claim(key="throughput", says="samples a second at batch 32 over batch 1 (224.96 over 7.77, A100)", mark=Mark.READ,
          published=28.95, expects="above", neutral=1.0),
    Claim(key="doubling", says="each doubling of the batch makes it faster: share of the five doublings",
          mark=Mark.READ, published=1.0, unit="", tolerance=0.0),
    Claim(key="linear", says="a step's time is t0 + t1 x batch: R^2 of the line", mark=Mark.COMPUTED, published=1.0,
          unit="", tolerance=0.02),
    Claim(key="loss", says="one epoch at one learning rate: mean training loss at batch 32 minus batch 1 (2.38 - 1.90)",
          mark=Mark.READ, published=0.48, unit="nats", expects="above", neutral=0.0),
    Claim(key="monotone", says="... and it rises with every doubling: share of the five doublings", mark=Mark.READ,
          published=1.0, unit="", tolerance=0.0),
)  # fmt: skip


def measure(bench: Bench) -> Evidence:
    """Time steps of every batch in turns, then train one epoch at each."""
    times = bench.once("times", _times, bench.pick(tiny=2, short=7, full=24))
    middle = [statistics.median(times[str(batch)]) for batch in BATCHES]
    speeds = [batch / second for batch, second in zip(BATCHES, middle, strict=True)]
    per_sample = {batch: [second / batch for second in times[str(batch)]] for batch in BATCHES}
    line = np.polyfit(BATCHES, middle, 1)
    residual = np.asarray(middle) - np.polyval(line, BATCHES)
    records, seeds = bench.pick(tiny=4, short=96, full=512), bench.pick(tiny=1, short=3, full=5)
    arms: dict[str, Arm] = {f"batch {batch}": _arm(batch, records) for batch in BATCHES}
    found = over_seeds(bench, arms, seeds=seeds)
    losses = [column(found[name], "train") for name in arms]
    means = [mean(each) for each in losses]
    findings = {
        "throughput": median_ratio(per_sample[1], per_sample[32]),
        "doubling": Finding.exact(mean([float(b > a) for a, b in itertools.pairwise(speeds)])),
        "linear": Finding.exact(1 - float((residual**2).sum() / np.var(middle) / len(middle))),
        "loss": Finding.of(differences(losses[-1], losses[0])),
        "monotone": Finding.exact(mean([float(b > a) for a, b in itertools.pairwise(means)])),
    }
    table = Table(
        title=f"batch sweep; {records} records, one epoch, {seeds} seeds; t0 / t1 = {line[1] / line[0]:.2f} documents "
        "here, 308 published",
        columns=("batch", "documents/s", "published samples/s", "mean training loss", "published loss"),
        rows=tuple(zip(BATCHES, _digits(speeds, 1), PUBLISHED_SPEED, _digits(means, 3), PUBLISHED_LOSS, strict=True)),
    )
    return Evidence(findings, (table,))


def _arm(batch: int, records: int) -> Arm:
    def recipe(seed: int) -> dict[str, object]:
        training = {"steps": None, "epochs": 1, "schedule": "linear", "warmup": 0.0}
        return arm(
            FUSED, seed=seed, steps=10**6, rate=2e-4, documents=batch, data={"max_records": records},
            training=training, evaluation={"max_documents": 1},
        )  # fmt: skip

    return recipe


def _times(turns: int) -> dict[str, list[float]]:
    run = assemble(plan_of(arm({"precision": {"compute": "fp32"}}, seed=0, steps=1, rate=1e-5)))
    optimizer = run.make_optimizer(parameter_groups(run))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    ids, marks = np.arange(3, 3 + LENGTH, dtype=np.int32), np.ones(LENGTH, dtype=np.bool_)
    corpus = Corpus.from_documents([(ids, marks)] * max(BATCHES), ["made"] * max(BATCHES))

    def step(batch: int) -> Callable[[], None]:
        made = Layout(batch).build([(document,) for document in range(batch)], corpus)

        def go() -> None:
            set_learning_rate(optimizer, 0.0)
            gradients(run, [made], made.num_supervised, scaler)
            update(run, optimizer, scaler)

        return go

    return in_turns({str(batch): step(batch) for batch in BATCHES}, turns)


def _digits(values: list[float], digits: int) -> list[float]:
    return [round(value, digits) for value in values]


REPRODUCTION = Reproduction(
    name="batch-sweep",
    title="Larger batches are faster, and at one learning rate they learn less in an epoch",
    source="S. Bekman, transformers issue 15026 (A100) and 14608 (RTX 3090)",
    setting="T5-base, wmt16 ro-en, one epoch, fp32, one run each; A100",
    here="the embedded model (4 M parameters), full fine-tuning; times with documents of 64 tokens in fp32 on the CPU",
    claims=CLAIMS,
    measure=measure,
)
