"""Predicted peak of tensor memory against the allocator's own record of the real step, on the CPU.

    python benchmarks/estimate/cpu.py --json OUT [--rows N] [--only llama,gpt2] [--seed 0] [--seconds N]

Every row is one architecture (a small random model) with one combination of methods and one shape of batch. The real
step is the engine's, run once to fill the optimizer's state and once under torch's profiler, whose [memory] events are
the CPU allocator's record. What was allocated before the step (weights, optimizer state, batch) is added to it.

The whole grid takes about half an hour on two cores. With --seconds it stops after so long, and the next call with the
same OUT goes on where it stopped; rows that were made by another version of tunewise are made again.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cpu_cases import CPU, VOCAB_SIZE, Case, cases
from transformers import PretrainedConfig

from tunewise.engine.allocator import allocated_bytes, batch_bytes, lasting_bytes
from tunewise.engine.build import build
from tunewise.engine.dry_run import BatchShape, dry_run
from tunewise.engine.estimate import Estimate
from tunewise.engine.evaluate import summed_loss
from tunewise.engine.state import Progress, capture
from tunewise.engine.step import (
    clipped_norm,
    gradients,
    parameter_groups,
    set_learning_rate,
    update,
    update_in_backward,
)
from tunewise.engine.tracking import Moment
from tunewise.errors import TunewiseError
from tunewise.methods.precision import Precision
from tunewise.planner.cache import source_digest
from tunewise.recipe import Recipe
from tunewise.workload.batches import Layout, MicroBatch
from tunewise.workload.corpus import Corpus
from tunewise.workload.model import random_model


@dataclass
class Row:
    """A case with prediction and measurement, or why there is none."""

    case: Case
    predicted: dict[str, int] = field(default_factory=dict)
    measured: dict[str, int] = field(default_factory=dict)
    left_out: str | None = None

    def error(self, what: str = "step") -> float:
        """Return (predicted - measured) / measured."""
        return (self.predicted[what] - self.measured[what]) / self.measured[what]

    def to_mapping(self) -> dict[str, Any]:
        """Return the row as it stands in the JSON file."""
        content: dict[str, Any] = {**vars(self.case), "predicted": self.predicted, "measured": self.measured}
        if self.left_out is not None:
            return {**content, "left_out": self.left_out}
        return {**content, "error": {what: round(self.error(what), 6) for what in self.measured}}

    @staticmethod
    def from_mapping(content: dict[str, Any]) -> Row:
        """Read what `to_mapping` wrote."""
        case = Case(**{each.name: content[each.name] for each in fields(Case)})
        return Row(case, content["predicted"], content["measured"], content.get("left_out"))


def micro_batches(case: Case, layout: Layout) -> list[MicroBatch]:
    """Make random documents and lay them out as the recipe says, as many micro-batches as the case has."""
    draw = random.Random(case.length)
    longest = case.length if layout.row_tokens is None else layout.row_tokens // 2
    count = case.rows * case.micro_batches * (1 if layout.row_tokens is None else 6)
    lengths = [max(4, longest - draw.randrange(longest // 2)) if number else longest for number in range(count)]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    generator = np.random.default_rng(case.length)
    ids = generator.integers(1, VOCAB_SIZE, offsets[-1]).astype(np.int32)
    marks = generator.random(offsets[-1]) < case.supervised
    corpus = Corpus(ids, marks, offsets, ["random"] * count)
    groups = layout.micro_batches(list(range(count)), corpus.lengths)[: case.micro_batches]
    return [layout.build(rows, corpus) for rows in groups]


def predict(case: Case, recipe: Recipe, config: PretrainedConfig, batches: list[MicroBatch]) -> dict[str, int]:
    """Return the dry run's peaks: of the step, of an evaluation and of saving."""
    shapes = [BatchShape.of(batch) for batch in batches]
    estimate: Estimate = dry_run(recipe, config, "cpu", shapes, evaluation=shapes[0])
    totals = {moment: peak.total_bytes for moment, peak in estimate.moments.items()}
    return {
        "step": max(totals[moment] for moment in (Moment.FORWARD, Moment.BACKWARD, Moment.UPDATE)),
        "evaluation": totals[Moment.EVALUATION],
        "save": totals[Moment.SAVE],
    }


def measure(case: Case, recipe: Recipe, config: PretrainedConfig) -> tuple[list[MicroBatch], dict[str, int]]:
    """Run the real step twice, the second time watched, then an evaluation and a checkpoint's capture."""
    precision = recipe.get(Precision)
    assert precision is not None
    model = random_model(config, precision.loading_dtype(recipe), recipe.seed)
    run = build(recipe, model, CPU)
    batches = micro_batches(case, run.layout)
    optimizer = run.make_optimizer(parameter_groups(run))
    set_learning_rate(optimizer, 1e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=run.use_grad_scaler)
    if run.update_in_backward:
        update_in_backward(run, optimizer)

    def step() -> None:
        gradients(run, iter(batches), sum(batch.num_supervised for batch in batches), scaler)
        if not run.update_in_backward:
            clipped_norm(run, optimizer, scaler)
            update(run, optimizer, scaler)

    def evaluate() -> None:
        run.model.eval()
        summed_loss(run, batches[0]).double()
        run.model.train()

    def save() -> None:
        capture(run, optimizer, scaler, Progress(1, None, 1, None))

    step()
    gc.collect()
    measured = {}
    works: dict[str, tuple[Callable[[], None], int]] = {
        "step": (step, len(batches)), "evaluation": (evaluate, 1), "save": (save, 0)
    }  # fmt: skip
    for name, (work, num_batches) in works.items():
        inputs = max((batch_bytes(batch) for batch in batches[:num_batches]), default=0)
        measured[name] = lasting_bytes(run, optimizer) + inputs + allocated_bytes(work)
    return batches, measured


def run_case(case: Case) -> Row:
    """Measure and predict; a combination that this architecture refuses is left out with the reason."""
    row = Row(case)
    config = case.config()
    try:
        recipe = case.recipe(config)
        batches, row.measured = measure(case, recipe, config)
    except TunewiseError as error:
        row.left_out = str(error).replace("\n", " ")
        return row
    row.predicted = predict(case, recipe, config, batches)
    return row


def summarize(rows: list[Row], what: str) -> dict[str, Any]:
    """Return the figures of one quantity over all rows that were used."""
    errors = [row.error(what) for row in rows if row.left_out is None]
    if not errors:
        return {"rows_used": 0, "rows_left_out": len(rows)}
    sizes = sorted(map(abs, errors))
    return {
        "rows_used": len(errors),
        "rows_left_out": len(rows) - len(errors),
        "median_error": statistics.median(sizes),
        "p90_error": sizes[min(len(sizes) - 1, int(0.9 * len(sizes)))],
        "worst_error": sizes[-1],
        "bias": statistics.mean(errors),
        "under_predictions": sum(error < 0 for error in errors),
    }


def known_rows(path: Path, version: str) -> dict[Case, Row]:
    """Return the rows of an earlier call that this version of tunewise has made."""
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("version") != version:
        return {}
    rows = [Row.from_mapping(each) for each in content["rows"]]
    return {row.case: row for row in rows}


def run_cases(chosen: list[Case], known: dict[Case, Row], seconds: float | None) -> tuple[list[Row], int]:
    """Return (rows, how many broke); what is known is not run again, and after `seconds` nothing new begins."""
    started, rows, broken = time.monotonic(), [], 0
    for number, case in enumerate(chosen, start=1):
        if case in known:
            rows.append(known[case])
            continue
        if seconds is not None and time.monotonic() - started > seconds:
            continue
        try:
            row = run_case(case)
        except Exception:  # a broken row is counted and shown, and must not cost the rest of an hour's grid
            print(f"BROKEN {case}", file=sys.stderr)
            traceback.print_exc()
            broken += 1
            continue
        rows.append(row)
        if row.left_out is None and abs(row.error()) > 0.005:
            print(f"{number:4} {row.error():+.2%} {row.measured['step'] / 2**20:8.2f} MiB {case}", flush=True)
    return rows, broken


def write(path: Path, result: dict[str, Any], rows: list[Row]) -> None:
    """Write the JSON, a line a row."""
    lines = ",\n".join(f"  {json.dumps(row.to_mapping())}" for row in rows)
    head = json.dumps(result, indent=1).removesuffix("\n}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")


def main() -> int:
    """Run the cases, print the worst, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="OUT")
    parser.add_argument("--rows", type=int, help="as many cases, drawn at random; default all")
    parser.add_argument("--only", default="", help="architectures, separated by commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="begin no row after so long; call again to go on")
    arguments = parser.parse_args()
    chosen = list(cases(arguments.seed, [name for name in arguments.only.split(",") if name]))
    if arguments.rows is not None and arguments.rows < len(chosen):
        chosen = random.Random(arguments.seed).sample(chosen, arguments.rows)
    version = source_digest()[:16]
    rows, broken = run_cases(chosen, known_rows(arguments.json, version), arguments.seconds)
    architectures = len({row.case.architecture for row in rows})
    summary = summarize(rows, "step") | {"broken": broken, "architectures": architectures}
    result = {
        "command": "benchmarks/estimate/cpu.py " + " ".join(sys.argv[1:]),
        "torch": torch.__version__,
        "version": version,
        "summary": summary,
        "moments": {what: summarize(rows, what) for what in ("evaluation", "save")},
    }
    write(arguments.json, result, rows)
    if not summary["rows_used"]:
        print("no row could be used")
        return 1
    print(
        f"{summary['rows_used']} rows used, {summary['rows_left_out']} left out, {broken} broken, "
        f"{len(chosen) - len(rows) - broken} to come: median error {summary['median_error']:.2%}, "
        f"90 % under {summary['p90_error']:.2%}, worst {summary['worst_error']:.2%}, bias {summary['bias']:+.2%}"
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
