"""The gradient noise scale: two estimators, how it grows, and the critical batch measured by branching."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunewise.engine.noise import NoiseMeter
from tunewise.engine.noise_sums import NoiseSums
from tunewise.engine.step import gradients
from tunewise.lab.noise_scale import noise_scale
from tunewise.methods.method import Run
from tunewise.reproduce.bench import Bench
from tunewise.reproduce.claim import Claim, Finding, Mark
from tunewise.reproduce.learning import FAST, learn, mean, ratios, scratch
from tunewise.reproduce.reproduction import Evidence, Reproduction, Table
from tunewise.workload.batches import GlobalBatches, Layout
from tunewise.workload.corpus import Corpus

SMALL, RATE = 4, 2e-3
FACTORS = (1, 2, 4, 8, 16)
COLUMNS = ("loss", "per example", "two batches", "critical")
SLACK = 0.02
"""Nats above the best branch that still count as no loss; the source takes 0.01 at a far larger scale."""

CLAIMS = (
    Claim(key="estimators", says="two-batch and per-example estimators agree on the same data: "
          "ratio", mark=Mark.FORMULA,
          published=1.0, tolerance=0.1),
    Claim(key="rises", says="the noise scale rises as the loss falls: after training over before", mark=Mark.MEMORY,
          expects="above", neutral=1.0),
    Claim(key="critical", says="it foretells the critical batch within an order of magnitude: log10 of noise scale "
          "over "
          "the largest batch that loses nothing", mark=Mark.MEMORY, published=0.0, unit="decades", tolerance=1.0),
    Claim(key="grows", says="... and that batch grows in training (near 0 at the start): log2 of late over early",
          mark=Mark.READ, unit="octaves", expects="above", neutral=0.0),
)  # fmt: skip


def measure(bench: Bench) -> Evidence:
    """Train from scratch; at two moments take the noise scale and branch into larger batches."""
    seeds = range(bench.pick(tiny=1, short=3, full=5))
    found = [bench.once(f"seed {seed}", _one, seed, bench) for seed in seeds]
    early, late = ([each[moment] for each in found] for moment in ("early", "late"))
    both = [*early, *late]
    findings = {
        "estimators": Finding.of([each["two batches"] / each["per example"] for each in both]),
        "rises": Finding.of(ratios([e["per example"] for e in late], [e["per example"] for e in early])),
        "critical": Finding.of([math.log10(each["per example"] / each["critical"]) for each in late]),
        "grows": Finding.of([math.log2(b["critical"] / a["critical"]) for a, b in zip(early, late, strict=True)]),
    }
    table = Table(
        title=f"from scratch, {len(seeds)} seeds (means); batches in supervised tokens; branches of equal tokens",
        columns=("moment", "loss", "noise scale, per example", "two batches", "largest batch without loss"),
        rows=tuple(
            (name, *(round(mean([each[key] for each in rows]), 2) for key in COLUMNS))
            for name, rows in (("early", early), ("late", late))
        ),
    )
    return Evidence(findings, (table,))


def _one(seed: int, bench: Bench) -> dict[str, dict[str, float]]:
    steps = {"early": bench.pick(tiny=1, short=4, full=10), "late": bench.pick(tiny=2, short=120, full=600)}
    window = bench.pick(tiny=16, short=128, full=768)
    found = {}
    with tempfile.TemporaryDirectory() as name:
        for moment, count in steps.items():
            learnt = learn(_mapping(Path(name), seed, count, SMALL, RATE))
            state = {key: value.clone() for key, value in learnt.run.model.state_dict().items()}
            sums = _noise(learnt.run, learnt.plan.data.train, seed + 1000, bench.pick(tiny=2, short=10, full=20))
            losses = {factor: _branch(Path(name), seed, factor, window, state) for factor in FACTORS}
            largest = max(factor for factor, loss in losses.items() if loss <= min(losses.values()) + SLACK)
            tokens = float(learnt.plan.data.train.num_supervised.mean())
            found[moment] = {"loss": learnt.loss, "critical": largest * SMALL * tokens, **sums}
    return found


def _mapping(folder: Path, seed: int, steps: int, batch: int, rate: float) -> dict[str, Any]:
    return {
        "model": scratch(folder),
        "data": {"source": "stdlib", "max_length": 64, "max_records": 60, "too_long": "split"},
        "objective": "pretrain",
        "methods": {**FAST, "attention": {"kind": "sdpa"}, "adamw": {"beta2": 0.95}},
        "batch": {"documents": batch, "micro_batch_size": 4},
        "training": {"steps": steps, "learning_rate": rate, "schedule": "constant", "warmup": 0.0, "spike": None},
        "evaluation": {"every": steps, "max_documents": 60, "keep_best": False},
        "seed": seed,
    }


def _branch(folder: Path, seed: int, factor: int, window: int, state: Mapping[str, Tensor]) -> float:
    """Go on from `state` with `factor` times the batch and the root of that in the rate; return the loss."""

    def restore(run: Run) -> None:
        run.model.load_state_dict(state)

    batch = SMALL * factor
    mapping = _mapping(folder, seed, max(1, window // batch), batch, RATE * math.sqrt(factor))
    return learn(mapping, change=restore).loss


def _noise(run: Run, corpus: Corpus, seed: int, num_batches: int) -> dict[str, float]:
    """Return the noise scale by both estimators, from the single documents of global batches of 16."""
    run.model.eval()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    layout = Layout(1)
    sums: dict[str, list[NoiseSums]] = {"two batches": [], "per example": []}
    batches = GlobalBatches(corpus, run.recipe.batch.model_copy(update={"documents": 16}), seed)
    for documents in batches.epoch(0)[:num_batches]:
        meter = NoiseMeter(parameter for _, parameter in run.trainable())
        made = [layout.build(rows, corpus) for rows in layout.micro_batches(documents, corpus.lengths)]
        total = sum(batch.num_supervised for batch in made)
        gradients(run, made, total, scaler, meter)
        for key, one in (("two batches", meter.finish(total)), ("per example", meter.per_example(total))):
            assert one is not None, "sixteen documents make sixteen micro-batches"
            sums[key].append(one)
        for _, parameter in run.trainable():
            parameter.grad = None
    found = {}
    for key, each in sums.items():
        scale = noise_scale("per example" if key == "per example" else "two batches", each)
        found[key] = max(1.0, scale.tokens if scale.tokens is not None else scale.low)
    return found


REPRODUCTION = Reproduction(
    name="noise-scale",
    title="The gradient noise scale grows in training, and foretells the critical batch roughly",
    source="McCandlish et al. 2018 (arXiv 1812.06162); Merrill et al. 2025 (arXiv 2505.23971) for branches and doubts",
    setting="many tasks in the first; OLMo 1B and 7B in the second",
    here="a Llama of 0.5 M parameters from scratch on the standard library's text; branches start with a fresh Adam",
    claims=CLAIMS,
    measure=measure,
)
