"""Predicted memory against what others have published, row by row of a table of measurements.

    python benchmarks/estimate/published.py --csv FILE --json OUT [--configs FOLDER]

A row is used when its setting can be written as a recipe for one GPU and, where the table says how many parameters were
trained, the recipe trains as many; every other row gets the reason why not. Three assumptions hold for all rows,
whatever their source, and no number is fitted to a row or source:

- The peak is that of a micro-batch whose rows are all as long as the row's `seq_len`.
- Reserved memory is the allocated one times `FRAGMENTATION`.
- Where a repository's code is not known, it is transformers' Trainer with peft's layers.

What a table does not say, but the code of its repository does (whether the head is tied, how the loss treats logits),
stands in `published_stacks.STACKS`, and what that code computes otherwise than ours, as methods, in `published_litgpt`
and `published_peft`. They hold no numbers. They were read in that code, some because this table's errors had shown
where to look: on rows of another stack expect larger errors than on these.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from figures import summary_of
from published_rows import Row, Unusable, metric_of, published_gb
from published_settings import load_configs, setting_of
from transformers.utils import logging as transformers_logging

from tunewise.engine.dry_run import dry_run
from tunewise.errors import TunewiseError
from tunewise.planner.choose import SAFETY_MARGIN

CONFIGS = Path(__file__).resolve().parents[3] / "shared" / "data" / "configs"

FRAGMENTATION = 1.10
"""Reserved over allocated memory: holes of the caching allocator. One number for all rows, chosen beforehand and left:
the rows of PEFT's comparison would want 1.05, but too much costs less than running out of memory."""


def predict(row: Row, configs: dict[str, Path], known: dict[str, tuple[int, int, int]]) -> None:
    """Fill in the row's prediction.

    Raises:
        Unusable: why it has none.
        TunewiseError: the recipe is refused.
    """
    row.published_gb = published_gb(row)
    row.metric = metric_of(row)
    setting = setting_of(row, configs)
    if setting.key not in known:
        made = dry_run(setting.recipe, setting.config, "cuda", setting.shapes, profile=setting.profile)
        known[setting.key] = made.peak_bytes, made.context_bytes, made.trainable_parameters
    peak_bytes, context_bytes, num_trainable = known[setting.key]
    check_trainable(row, num_trainable)
    if row.metric in ("reserved", "nvidia-smi"):
        peak_bytes = round(peak_bytes * FRAGMENTATION)
    row.predicted_gb = (peak_bytes + (context_bytes if row.metric == "nvidia-smi" else 0)) / 1e9


def check_trainable(row: Row, num_trainable: int) -> None:
    """Compare what would be trained with what was; an option that the table does not state shows here.

    Raises:
        Unusable: the numbers differ by more than rounding.
    """
    text = row.text("trainable_params_m")
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        return
    step = 10.0 ** -len(text.partition(".")[2])  # the last digit's worth, in millions
    if abs(num_trainable / 1e6 - float(text)) > max(step, 0.005 * float(text)):
        raise Unusable(
            f"{num_trainable / 1e6:.4g} million parameters would be trained, {text} were: an unstated option"
        )


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the figures of some rows; errors are relative to what was published."""
    used = [row for row in rows if row.reason is None]
    return summary_of([row.error for row in used], len(rows) - len(used))


def beyond_margin(rows: Sequence[Row]) -> int:
    """Return how many rows would have run out of memory in spite of the planner's safety margin."""
    return sum(row.reason is None and row.is_beyond_margin for row in rows)


def show(source: str, rows: Sequence[Row]) -> None:
    """Print a source's table: the rows that were used, then the reasons of the others."""
    print(f"\n{source}")
    for row in rows:
        if row.reason is None:
            mark = " !" if row.is_beyond_margin else ""
            print(
                f"  {row.text('id'):>5} {row.text('model')[:28]:28} {row.text('method')[:12]:12} {row.metric:9} "
                f"published {row.published_gb:7.2f} GB  predicted {row.predicted_gb:7.2f} GB  {row.error:+7.1%}{mark}"
            )
    reasons: dict[str, int] = defaultdict(int)
    for row in rows:
        if row.reason is not None:
            reasons[row.reason] += 1
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
        print(f"  left out {count:3}: {reason}")
    print("  " + _figures(rows))


def _figures(rows: Sequence[Row]) -> str:
    summary = summarize(rows)
    counts = f"{summary['rows_used']} rows used, {summary['rows_left_out']} left out"
    if not summary["rows_used"]:
        return counts
    return (
        f"{counts}: median error {summary['median_error']:.1%}, 90 % under {summary['p90_error']:.1%}, worst "
        f"{summary['worst_error']:.1%}, bias {summary['bias']:+.1%}; {summary['under_predictions']} predicted too low, "
        f"{beyond_margin(rows)} by more than the safety margin of {SAFETY_MARGIN:.0%}"
    )


def to_mapping(row: Row) -> dict[str, Any]:
    """Return a row as it stands in the JSON file."""
    named = {name: row.text(name) for name in ("id", "source", "model", "method")}
    if row.reason is not None:
        return {**named, "published_gb": row.published_gb, "reason": row.reason}
    figures = {"metric": row.metric, "published_gb": row.published_gb, "predicted_gb": row.predicted_gb}
    return {**named, **figures, "error": row.error, "beyond_margin": row.is_beyond_margin}


def main() -> int:
    """Predict every row, print a table per source, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, metavar="FILE")
    parser.add_argument("--json", type=Path, required=True, metavar="OUT")
    parser.add_argument("--configs", type=Path, default=CONFIGS, metavar="FOLDER", help="config.json files by name")
    arguments = parser.parse_args()
    if not arguments.csv.is_file():
        parser.error(f"--csv: there is no file '{arguments.csv}'")
    if not any(arguments.configs.glob("*.json")):
        parser.error(f"--configs: there is no configuration in '{arguments.configs}'")
    transformers_logging.set_verbosity_error()
    with arguments.csv.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        rows = [Row(cells) for cells in csv.DictReader(stream)]
    configs, known = load_configs(arguments.configs), dict[str, tuple[int, int, int]]()
    sources: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        sources[row.text("source") or "no source"].append(row)
        try:
            predict(row, configs, known)
        except Unusable as reason:
            row.reason = str(reason)
        except TunewiseError as error:
            row.reason = "refused: " + " ".join(str(error).split())
        except Exception as error:  # a row of others must not cost the figures of the rest
            row.reason = f"broken: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    for source, members in sources.items():
        show(source, members)
    reasons = Counter(row.reason for row in rows if row.reason is not None)
    result = {
        "command": "benchmarks/estimate/published.py " + " ".join(sys.argv[1:]),
        "torch": torch.__version__,
        "fragmentation": FRAGMENTATION,
        "safety_margin": SAFETY_MARGIN,
        "summary": summarize(rows),
        "under_predictions_beyond_margin": beyond_margin(rows),
        "left_out_because": dict(reasons.most_common()),
        "sources": {
            source: summarize(members) | {"under_predictions_beyond_margin": beyond_margin(members)}
            for source, members in sources.items()
        },
        "metrics": {
            metric: summarize([row for row in rows if row.metric == metric and row.reason is None])
            for metric in sorted({row.metric for row in rows if row.reason is None})
        },
        "rows": [to_mapping(row) for row in rows],
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\nall sources: " + _figures(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
