"""Predicted tokens a second against published ones.

    python benchmarks/estimate/throughput.py --csv FILE --json OUT [--configs FOLDER]

The CSV has the columns of `training_throughput.csv`. A prediction is the roofline of one GPU's own work: its
micro-batches forward and backward, and its share of the optimizer's update where the state is sharded. What GPUs send
to each other is not in it, so rows of more than one node are left out. It is corrected as plans are that know the
machine from the catalogue only: by `calibration.CATALOGUED`, three numbers for all rows, read off the rows of that
table.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import summary_of
from published_settings import load_configs
from throughput_rows import LeftOut, Row, read, text
from transformers.utils import logging as transformers_logging

from tunewise.engine.dry_run import BatchShape, dry_run
from tunewise.engine.work import Work, WorkKey
from tunewise.errors import TunewiseError
from tunewise.methods import complete
from tunewise.methods.reading import recipe_from_mapping
from tunewise.planner.calibration import CATALOGUED
from tunewise.planner.predict import profile_of
from tunewise.planner.roofline import launch_seconds, seconds_of

CONFIGS = Path(__file__).resolve().parents[3] / "shared" / "data" / "configs"

Known = dict[str, dict[WorkKey, Work]]


def predict(row: Row, known: Known) -> float:
    """Return tokens a second on one GPU; equal dry runs are made once.

    Raises:
        TunewiseError: the recipe is refused.
    """
    parts = (row.config.to_dict(), row.methods, row.length, row.micro_batch_size, row.machine.name)
    key = json.dumps(parts, sort_keys=True, default=str)
    if key not in known:
        known[key] = _work(row)
    seconds = seconds_of(known[key], row.machine, tf32=row.methods["precision"]["compute"] == "tf32")
    micro = max(seconds.linear + seconds.attention, seconds.calls * launch_seconds(row.machine))
    update = max(seconds.update * row.update_share, seconds.update_calls * launch_seconds(row.machine))
    tokens = row.accumulation * row.micro_batch_size * row.length
    return tokens / (CATALOGUED[1] * (row.accumulation * micro + update))


def _work(row: Row) -> dict[WorkKey, Work]:
    mapping = {
        "model": {"name": "published", "weights": "random"},
        "data": "none",
        "methods": row.methods,
        "batch": {"documents": row.micro_batch_size, "micro_batch_size": row.micro_batch_size},
    }
    recipe = complete(recipe_from_mapping(mapping, "row"), row.config, torch.device("cuda"))
    shape = BatchShape.uniform(row.micro_batch_size, row.length)
    return dict(dry_run(recipe, row.config, "cuda", shape, profile=profile_of(row.machine)).work)


def to_mapping(line: Mapping[str, Any], configs: Mapping[str, Path], known: Known) -> dict[str, Any]:
    """Return a line with its prediction, or with the reason why it has none."""
    named = {name: text(line, name) for name in ("id", "source", "model")}
    try:
        row = read(line, configs)
        predicted = predict(row, known)
    except LeftOut as reason:
        return {**named, "reason": str(reason)}
    except TunewiseError as error:
        return {**named, "reason": "refused: " + " ".join(str(error).split())}
    except Exception as error:  # a row of others must not cost the figures of the rest
        return {**named, "reason": f"broken: {type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    return {
        **named,
        "gpu": row.machine.name,
        "length": row.length,
        "micro_batch_size": row.micro_batch_size,
        "num_gpus": row.num_gpus,
        "methods": row.methods,
        "assumed": list(row.assumed),
        "measured": row.measured,
        "predicted": predicted,
        "error": (predicted - row.measured) / row.measured,
    }


def summarize(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures of some rows; errors are (predicted - measured) / measured."""
    errors = [row["error"] for row in rows if "error" in row]
    return summary_of(errors, len(rows) - len(errors))


def over_roofline(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return how much longer steps took than the roofline says, and how often that is inside the plans' interval."""
    low, middle, high = CATALOGUED
    ratios = [middle * row["predicted"] / row["measured"] for row in rows if "error" in row]
    if not ratios:
        return None
    return {
        "inside_interval": sum(low <= ratio <= high for ratio in ratios) / len(ratios),
        "time_measured_over_roofline": {
            f"p{share}": float(np.quantile(ratios, share / 100)) for share in (5, 10, 50, 90, 95)
        },
    }


def main() -> int:
    """Predict every row, write the JSON, print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, metavar="FILE")
    parser.add_argument("--json", type=Path, required=True, metavar="OUT")
    parser.add_argument("--configs", type=Path, default=CONFIGS, metavar="FOLDER", help="config.json files by name")
    options = parser.parse_args()
    if not options.csv.is_file():
        parser.error(f"--csv: there is no file '{options.csv}'")
    transformers_logging.set_verbosity_error()
    configs, known = load_configs(options.configs), Known()
    with options.csv.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        rows = [to_mapping(line, configs, known) for line in csv.DictReader(stream)]
    sources: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        sources.setdefault(f"{row['source'] or 'no source'} on {row.get('gpu', 'what was left out')}", []).append(row)
    content = {
        "summary": summarize(rows),
        "interval": over_roofline(rows),
        "left_out_because": dict(Counter(row["reason"] for row in rows if "reason" in row).most_common()),
        "sources": {name: summarize(part) | (over_roofline(part) or {}) for name, part in sources.items()},
        "rows": rows,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in content.items() if key != "rows"}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
