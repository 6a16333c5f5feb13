"""Gradient accumulation: it is exact where tokens are weighted, and what it does to the time of a step."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from tunewise.engine.assemble import assemble
from tunewise.engine.step import clipped_norm, gradients, parameter_groups, set_learning_rate, update
from tunewise.methods.method import Run
from tunewise.reproduce.bench import Bench
from tunewise.reproduce.claim import Claim, Finding, Mark
from tunewise.reproduce.learning import arm, plan_of
from tunewise.reproduce.reproduction import Evidence, Reproduction, Table
from tunewise.reproduce.timing import in_turns, median_ratio
from tunewise.workload.batches import Layout
from tunewise.workload.corpus import Corpus

STEPS = (1, 2, 4, 8)
"""Micro-batches of one size in a step."""

CLAIMS = (
    Claim(key="exact", says="micro-batches of unequal lengths, weighted by tokens, give the whole batch's gradient "
          "(largest relative difference in fp64)", mark=Mark.READ, published=0.0, unit="", tolerance=1e-10),
    Claim(key="mean of means", says="a mean of the micro-batches' means does not (the bug of October 2024)",
          mark=Mark.READ, unit="relative difference", expects="above", neutral=1e-3),
    Claim(key="ga2", says="micro-batch fixed, two of them a step: more samples a second than one (97.48 over 93.68, "
          "fp32 on an A100)", mark=Mark.READ, published=1.041, expects="above", neutral=1.0),
    Claim(key="additive", says="seconds of a step = n x micro-batch + update: n = 8 foretold from 1 and 2, over "
          "measured", mark=Mark.COMPUTED, published=1.0, tolerance=0.03),
    Claim(key="fixed batch", says="batch fixed, cut into single rows: fewer samples a second than in one piece (7.75 "
          "over 8.86, V100)", mark=Mark.READ, published=0.875, expects="below", neutral=1.0),
)  # fmt: skip


def measure(bench: Bench) -> Evidence:
    """Compare gradients in fp64, then time steps in turns."""
    run = _run()
    findings = _correctness(run, _documents([70, 12, 33, 5, 48, 21, 9, 64]))
    times = bench.once("times", _times, bench.pick(tiny=2, short=14, full=80))
    per_sample = {name: [second / _samples(name) for second in seconds] for name, seconds in times.items()}
    findings["ga2"] = median_ratio(per_sample["1 x 1"], per_sample["2 x 1"])
    one, two = times["1 x 1"], times["2 x 1"]
    foretold = [first + 7 * (second - first) for first, second in zip(one, two, strict=True)]
    findings["additive"] = median_ratio(foretold, times["8 x 1"])
    findings["fixed batch"] = median_ratio(per_sample["1 x 8"], per_sample["8 x 1"])
    rows = tuple(
        (name, round(1000 * statistics.median(seconds), 2), round(1 / statistics.median(per_sample[name]), 1))
        for name, seconds in times.items()
    )
    table = Table(
        title="steps of the embedded model, full fine-tuning in fp32, documents of 64 tokens (medians)",
        columns=("micro-batches x rows", "ms a step", "documents a second"),
        rows=rows,
    )
    return Evidence(findings, (table,))


def _run() -> Run:
    methods = {"precision": {"compute": "fp32"}, "whole_loss": {}, "adamw": {}, "attention": {"kind": "sdpa"}}
    plan = plan_of(arm(methods, seed=0, steps=1, rate=1e-5))
    run = assemble(plan)
    run.model.eval()  # nothing is dropped; the same numbers in every layout
    return run


def _documents(lengths: Sequence[int]) -> Corpus:
    chooser = np.random.default_rng(0)
    made = [(chooser.integers(3, 4096, n, dtype=np.int32), np.ones(n, dtype=np.bool_)) for n in lengths]
    return Corpus.from_documents(made, ["made"] * len(made))


def _correctness(run: Run, corpus: Corpus) -> dict[str, Finding]:
    run.model.double()
    every = range(len(corpus))
    whole = _gradient(run, corpus, Layout(len(corpus)), every)
    pieces = [_gradient(run, corpus, Layout(size), every) for size in (1, 2, 3)]
    worst = max(float((piece - whole).norm() / whole.norm()) for piece in pieces)
    means = torch.stack([_gradient(run, corpus, Layout(1), [document]) for document in every]).mean(dim=0)
    run.model.float()
    return {
        "exact": Finding.exact(worst),
        "mean of means": Finding.exact(float((means - whole).norm() / whole.norm())),
    }


def _gradient(run: Run, corpus: Corpus, layout: Layout, documents: Sequence[int]) -> Tensor:
    """Return the engine's gradient of a step over `documents`, as one vector."""
    batches = [layout.build(rows, corpus) for rows in layout.micro_batches(documents, corpus.lengths)]
    num_supervised = int(corpus.num_supervised[list(documents)].sum())
    gradients(run, batches, num_supervised, torch.amp.GradScaler("cpu", enabled=False))
    found = torch.cat([parameter.grad.flatten() for _, parameter in run.trainable() if parameter.grad is not None])
    for _, parameter in run.trainable():
        parameter.grad = None
    return found


def _times(turns: int) -> dict[str, list[float]]:
    run = _run()
    optimizer = run.make_optimizer(parameter_groups(run))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    corpus = _documents([64] * 8)

    def step(documents: int, rows: int) -> Callable[[], None]:
        layout = Layout(rows)
        pieces = layout.micro_batches(range(documents), corpus.lengths)
        batches = [layout.build(piece, corpus) for piece in pieces]

        def go() -> None:
            set_learning_rate(optimizer, 0.0)
            gradients(run, batches, documents * 63, scaler)
            clipped_norm(run, optimizer, scaler)
            update(run, optimizer, scaler)

        return go

    things = {f"{n} x 1": step(n, 1) for n in STEPS} | {"1 x 8": step(8, 8)}
    return in_turns(things, turns, warm_up=2)


def _samples(name: str) -> int:
    pieces, rows = name.split(" x ")
    return int(pieces) * int(rows)


REPRODUCTION = Reproduction(
    name="gradient-accumulation",
    title="Accumulation is exact when tokens are weighted; faster at a fixed micro-batch, slower at a fixed batch",
    source="S. Bekman, transformers issue 15026 (A100); Hugging Face's single-GPU guide (V100); Unsloth and Hugging "
    "Face on the accumulation bug, October 2024",
    setting="T5-base, batch 32, A100, fp32; BERT-large, batch 4, V100",
    here="the embedded model (4 M parameters), documents of 64 tokens, full fine-tuning in fp32 on the CPU",
    claims=CLAIMS,
    measure=measure,
)
