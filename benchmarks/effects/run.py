"""What does each method do to memory, time and loss? One comparison a method, on the embedded model.

    python benchmarks/effects/run.py --json benchmarks/results/cpu-2core/effects.json --minutes 1.7

Without and with the method, in turns, the same documents in the same steps: the most that tensors take in the fullest
step (the allocator's record, not the process's), the seconds of a step (median over all turns; the interval is that of
the turns' ratios), and the validation loss after equal tokens. Optimizers learn at rates of their own (`cases.py`). A
call ends after `--minutes` and the next one goes on. Run it alone: it times. `docs/make_method_cards.py` puts the
figures into the cards.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from cases import EFFECTS, NOT_HERE, Effect

from tunewise.engine.assemble import Plan, assemble, settle
from tunewise.engine.measure import Measuring
from tunewise.machine.probe import device_name
from tunewise.methods.reading import recipe_from_mapping

TURNS = 3
WARM_UP = 2
STEPS = 4
LEARNING_STEPS = 14
"""Timed steps of a turn; and those of the training whose validation loss is taken."""

VALIDATION_DOCUMENTS = 32
DOCUMENTS = 4
MAX_LENGTH = 160


def plan_of(methods: dict[str, Any], changes: dict[str, Any]) -> Plan:
    """Return the plan of one side."""
    mapping: dict[str, Any] = {
        "model": "embedded",
        "data": {"source": "stdlib", "max_length": MAX_LENGTH, "max_records": 400},
        "methods": methods,
        "batch": {"documents": DOCUMENTS},
        "quality": "off",
        "device": "cpu",
        **changes,
    }
    return settle(recipe_from_mapping(mapping))


@cache
def learnt(side: str) -> dict[str, Any]:
    """Return peak memory and validation loss of one side, given as JSON: many methods are held against the same one."""
    plan, rate = read(side)
    peak, fullest = Measuring(assemble(plan), plan.data.train, plan.data.validation).worst_case()
    measuring = Measuring(assemble(plan), plan.data.train, plan.data.validation)
    measuring.timed(WARM_UP, LEARNING_STEPS, rate)
    loss = measuring.validation_loss(VALIDATION_DOCUMENTS)
    return {"peak_bytes": peak, "fullest": fullest, "learning_rate": rate, "loss": loss}


@cache
def read(side: str) -> tuple[Plan, float]:
    """Return plan and learning rate of one side."""
    methods, rate, changes = json.loads(side)
    return plan_of(methods, changes), rate


def turn(side: str) -> list[float]:
    """Train afresh and return the seconds of the timed steps."""
    plan, rate = read(side)
    measuring = Measuring(assemble(plan), plan.data.train, plan.data.validation)
    return list(measuring.timed(WARM_UP, STEPS, rate).seconds)


def measure(effect: Effect) -> dict[str, Any]:
    """Measure both sides in turns."""
    sides = {
        "without": json.dumps([effect.without, effect.rate, effect.changes]),
        "with": json.dumps([effect.with_it, effect.rate_with, effect.changes]),
    }
    found: dict[str, Any] = {"method": effect.method, "methods": [effect.without, effect.with_it]}
    found |= {name: dict(learnt(side)) for name, side in sides.items()}
    seconds: dict[str, list[list[float]]] = {name: [] for name in sides}
    for _ in range(TURNS):
        for name, side in sides.items():
            seconds[name].append(turn(side))
    for name, turns in seconds.items():
        found[name]["step_seconds"] = statistics.median(each for times in turns for each in times)
    ratios = [
        statistics.median(with_it) / statistics.median(without)
        for without, with_it in zip(seconds["without"], seconds["with"], strict=True)
    ]
    found["time_ratio"] = [found["with"]["step_seconds"] / found["without"]["step_seconds"], min(ratios), max(ratios)]
    found["memory_ratio"] = found["with"]["peak_bytes"] / found["without"]["peak_bytes"]
    return found


def main() -> int:
    """Measure what is not measured yet, and write after each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="OUT")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin nothing new after so long")
    parser.add_argument("--only", default=None, help="methods to measure (again), with commas between them")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    rows: dict[str, dict[str, Any]] = {}
    if options.json.is_file():
        rows = {row["method"]: row for row in json.loads(options.json.read_text(encoding="utf-8"))["rows"]}
    rows |= {name: {"method": name, "not_here": reason} for name, reason in NOT_HERE.items()}
    wanted = options.only.split(",") if options.only else [e.method for e in EFFECTS if e.method not in rows]
    left = [effect for effect in EFFECTS if effect.method in wanted]
    for number, effect in enumerate(left):
        if time.monotonic() > end:
            print(f"{len(left) - number} of {len(left)} left; the same command goes on")
            break
        rows[effect.method] = row = measure(effect)
        print(f"{effect.method:<20} memory x {row['memory_ratio']:.2f}  time x {row['time_ratio'][0]:.2f}  loss "
              f"{row['without']['loss']:.3f} -> {row['with']['loss']:.3f}", flush=True)  # fmt: skip
        content = {
            "command": "python benchmarks/effects/run.py --json OUT",
            "machine": device_name("cpu"), "torch": torch.__version__,
            "threads": torch.get_num_threads(), "turns": TURNS,
            "learning_steps": WARM_UP + LEARNING_STEPS, "documents": DOCUMENTS, "max_length": MAX_LENGTH,
            "rows": list(rows.values()),
        }  # fmt: skip
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
