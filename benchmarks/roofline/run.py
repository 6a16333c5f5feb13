"""Where a step's time goes, against what the machine can do, both measured in the same run.

    python benchmarks/roofline/run.py --json roofline.json
    python benchmarks/roofline/run.py --size 135M --workload long --json roofline_long.json

Ceilings: the fastest bf16 and fp32 matrix products and the copy bandwidth, before and after the steps (`ceilings`).
Steps: whole steps of a training, timed without any instrument (`step`); then steps under torch's profiler, whose
shares by phase and operator divide that time (`phases`). A phase is what the model's module computes, forward and
backward apart: backward work is given to the module whose forward made it (autograd's sequence numbers). FLOPs are
those that the matrix products of the profiled steps really execute, counted by the profiler from their shapes; with
fewer profiled than timed steps by token, which is wrong where documents are long and differ (attention)."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from benchmarks.peers import problem
from benchmarks.roofline.phases import by_phase, marked

from tunewise.engine.assemble import Plan, assemble, settle
from tunewise.engine.run_folder import versions
from tunewise.engine.step import clipped_norm, gradients, parameter_groups, set_learning_rate, update
from tunewise.methods.method import Run
from tunewise.methods.reading import recipe_from_mapping
from tunewise.workload.batches import GlobalBatches, MicroBatch

SHAPES = ((2048, 2048, 2048), (4096, 1024, 4096), (2048, 576, 1536), (2048, 1536, 576))
COPY_BYTES = 2**28
DOCUMENTS = {"short": 64, "vocab": 64, "long": 4}


def ceilings() -> dict[str, float]:
    """Return FLOP/s of bf16 and fp32 products (the best shape's best of some calls), and bytes/s of a copy."""
    found: dict[str, float] = {}
    for dtype, name in ((torch.bfloat16, "bf16_flops_per_second"), (torch.float32, "fp32_flops_per_second")):
        for m, n, k in SHAPES:
            left, right = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
            output = torch.empty(m, n, dtype=dtype)
            seconds = _best(lambda left=left, right=right, output=output: torch.mm(left, right.T, out=output))
            found[name] = max(found.get(name, 0.0), 2.0 * m * n * k / seconds)
    source = torch.ones(COPY_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    found["copy_bytes_per_second"] = 2 * COPY_BYTES / _best(lambda: target.copy_(source))
    return found


def _best(call: Callable[[], object], calls: int = 8) -> float:
    call()
    seconds = []
    for _ in range(calls):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


class Steps:
    """A training's steps, one after another."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.run = plan, assemble(plan)
        self.optimizer = self.run.make_optimizer(parameter_groups(self.run))
        set_learning_rate(self.optimizer, 1e-4)
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        train = plan.data.train
        self.documents = [step for _, step in _take(GlobalBatches(train, plan.recipe.batch, 0).from_step(0), 64)]
        self.number = 0

    def step(self) -> int:
        """Do the next one and return its tokens."""
        train, run, documents = self.plan.data.train, self.run, self.documents[self.number % len(self.documents)]
        self.number += 1
        num_supervised = int(train.num_supervised[documents].sum())
        float(gradients(run, self._micro_batches(run, documents), num_supervised, self.scaler))
        with torch.profiler.record_function("phase:optimizer"):
            float(clipped_norm(run, self.optimizer, self.scaler))
            update(run, self.optimizer, self.scaler)
        return int(train.lengths[documents].sum())

    def _micro_batches(self, run: Run, documents: list[int]) -> Iterator[MicroBatch]:
        train = self.plan.data.train
        with torch.profiler.record_function("phase:data"):
            rows = run.layout.micro_batches(documents, train.lengths)
        for row in rows:
            with torch.profiler.record_function("phase:data"):
                batch = run.layout.build(row, train)
            yield batch


def _take(steps: Iterator[Any], count: int) -> list[Any]:
    return [next(steps) for _ in range(count)]


def plan_of(arguments: argparse.Namespace) -> Plan:
    """Settle the recipe of the command line on the made documents."""
    folder = arguments.cache / f"{arguments.size}-{arguments.workload}"
    if not (folder / "config.json").is_file():
        problem.write_model(folder, arguments.size, arguments.workload)
    mapping = problem.recipe_mapping(arguments.method, str(folder), json.loads(arguments.methods))
    documents = arguments.documents or DOCUMENTS[arguments.workload]
    mapping["batch"] = {"documents": documents}
    if arguments.row_tokens:
        mapping["methods"]["packing"] = {"row_tokens": arguments.row_tokens}
    train = problem.corpus_of(arguments.workload, documents * (arguments.steps + 3))
    return settle(recipe_from_mapping(mapping), problem.prepared(train, train.take([])))


def main(arguments: argparse.Namespace) -> int:
    torch.manual_seed(0)
    profiled = arguments.profiled or arguments.steps
    before = ceilings()
    steps = Steps(plan_of(arguments))
    tokens, seconds = [], []
    for number in range(arguments.steps + 1):
        started = time.perf_counter()
        held = steps.step()
        if number > 0:
            tokens.append(held)
            seconds.append(time.perf_counter() - started)
    steps.number = 1
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        marked(steps.run.model),
        torch.profiler.profile(activities=activities, record_shapes=True, with_flops=True) as p,
    ):
        started = time.perf_counter()
        profiled_tokens = sum(steps.step() for _ in range(profiled))
        profiled_seconds = (time.perf_counter() - started) / profiled
    after = ceilings()
    best = {name: max(before[name], after[name]) for name in before}
    step_seconds = sum(seconds) / len(seconds)
    timed_steps = profiled_tokens * len(tokens) / sum(tokens)  # as many timed steps have so many tokens
    phases = by_phase(p, timed_steps, step_seconds)
    flops = sum(phase["flops"] for phase in phases.values())
    result = {
        "summary": {
            "tokens_per_second": round(sum(tokens) / sum(seconds), 1),
            "step_seconds": round(step_seconds, 4),
            "spread_of_tokens_per_second": [round(n / s, 1) for n, s in sorted(zip(tokens, seconds, strict=True))],
            "executed_flops_per_step": flops,
            "share_of_bf16_ceiling": round(flops / step_seconds / best["bf16_flops_per_second"], 4),
        },
        "phases": phases,
        "ceilings": {"before": before, "after": after},
        "profiled_step_seconds": round(profiled_seconds, 4),
        "setting": {name: str(value) for name, value in vars(arguments).items() if name not in ("json", "cache")},
        "notes": steps.run.notes,
        "tokens_per_step": round(statistics.mean(tokens)),
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }
    print(json.dumps(result["summary"]))
    print(f"{'phase':34} {'share':>6} {'ms':>9} {'GFLOP/s':>8}")
    for name, phase in sorted(phases.items(), key=lambda item: -item[1]["seconds"]):
        rate = phase["flops"] / phase["seconds"] / 1e9 if phase["seconds"] else 0.0
        print(f"{name:34} {phase['share']:6.1%} {phase['seconds'] * 1e3:9.2f} {rate:8.0f}")
        for operator, share in list(phase["operators"].items())[: arguments.operators]:
            print(f"    {operator:40} {share:6.1%}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=problem.SIZES, default="70M")
    parser.add_argument("--workload", choices=problem.WORKLOADS, default="short")
    parser.add_argument("--method", choices=("lora", "qlora", "full", "scratch"), default="lora")
    parser.add_argument("--methods", default="{}", help="JSON: methods to add to the recipe")
    parser.add_argument("--row-tokens", type=int, default=None)
    parser.add_argument("--documents", type=int, default=None, help="documents a step")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--profiled", type=int, default=None, help="steps under the profiler; all by default")
    parser.add_argument("--operators", type=int, default=0, help="print so many operators of each phase")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "tunewise-peers" / "models")
    parser.add_argument("--json", type=Path, default=None)
    sys.exit(main(parser.parse_args()))
