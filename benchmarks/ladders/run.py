"""Rebuild a published ladder of methods, row by row, and hold the product of single effects against the whole.

    python benchmarks/ladders/run.py --ladder hf --json ladder_hf.json
    python benchmarks/ladders/run.py --ladder torchtune --device cuda --json ladder_torchtune.json

Each row is a recipe that is measured in a process of its own: peak memory of tensors in the worst step with its
update, then timed steps. Rows are measured in turns, so that what disturbs the machine disturbs all of them. Finished
measurements are kept in `--folder`; with `--seconds` a call stops starting new ones after so long and ends with exit
code 75, and the same command goes on. On a GPU the shapes are the published ones.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from pathlib import Path

import torch

from tunewise.engine.run_folder import versions
from tunewise.lab.executor import Executor
from tunewise.reproduce.ladders import hugging_face, torchtune
from tunewise.reproduce.ladders.laboratory import Bench, open_bench
from tunewise.reproduce.ladders.ladder import Ladder
from tunewise.reproduce.ladders.table import Measured, Results, table

LADDERS = {"hf": hugging_face.ladder, "torchtune": torchtune.ladder}
TURNS = 3
UNFINISHED = 75
"""Exit code: the same command goes on (EX_TEMPFAIL of sysexits.h)."""


def measure(bench: Bench, turns: int, seconds: float | None) -> Results | None:
    """Measure every row `turns` times, in turns; None when the time was over before."""
    started = time.monotonic()
    rows = bench.ladder.rebuilt
    for turn in range(turns):
        for number, row in enumerate(rows):
            if bench.is_measured(row, turn):
                continue
            if seconds is not None and time.monotonic() - started > seconds:
                return None
            outcome = bench.measure(number, row, turn)
            print(f"{turn + 1}/{turns} {row.name}: {outcome.kind}, {outcome.trial_seconds:.1f} s", flush=True)
    return {
        row.name: Measured(row, tuple(bench.measure(number, row, turn) for turn in range(turns)))
        for number, row in enumerate(rows)
    }


def describe(ladder: Ladder, device: str, turns: int, seconds: float) -> dict[str, object]:
    """Return what a reader has to know besides the figures."""
    return {
        "ladder": ladder.name,
        "source": ladder.source,
        "published_setting": ladder.setting,
        "published_units": ladder.units,
        "differences": ladder.differences,
        "device": device,
        "model": ladder.config,
        "document_lengths": ladder.document_lengths,
        "turns": turns,
        "threads": None if device == "cuda" else torch.get_num_threads(),
        "cores": os.cpu_count(),
        "trial_seconds": round(seconds, 1),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
    }


def show(result: dict[str, object], found: Results) -> None:
    """Print a line a row and the summary."""
    for name, measured in found.items():
        if measured.speed is None or measured.peak_bytes is None:
            print(f"{name:28} {measured.problem}")
            continue
        speed = measured.speed
        peak = measured.peak_bytes / 2**20
        print(f"{name:28} {speed.middle:8.0f} tokens/s ({speed.low:.0f} to {speed.high:.0f})  {peak:8.1f} MiB")
    print(json.dumps(result["summary"]))


def main(arguments: argparse.Namespace) -> int:
    ladder = LADDERS[arguments.ladder](arguments.device)
    folder = arguments.folder or Path("runs") / f"ladder-{arguments.ladder}-{arguments.device}"
    with Executor() as executor:
        bench = open_bench(ladder, arguments.device, folder, executor)
        found = measure(bench, arguments.turns, arguments.seconds)
    if found is None:
        print("Not all rows have been measured; the same command goes on.")
        return UNFINISHED
    spent = sum(outcome.trial_seconds for measured in found.values() for outcome in measured.outcomes)
    result = {**table(ladder, found), **describe(ladder, arguments.device, arguments.turns, spent)}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    show(result, found)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ladder", choices=sorted(LADDERS), required=True)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--seconds", type=float, default=None, help="start no further trial after so long")
    parser.add_argument("--folder", type=Path, default=None, help="where finished measurements are kept")
    sys.exit(main(parser.parse_args()))
