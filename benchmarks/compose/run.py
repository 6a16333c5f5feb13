"""Do all methods compose? Random recipes from the whole space train as predicted, or are refused with a true reason.

    python benchmarks/compose/run.py --recipes 200 --seed 0 --json OUT [--seconds N] [--only 17,21]

A recipe that is accepted has to train three steps within the memory that its dry run predicted (1 %, and in 16 bits
oneDNN's scratchpad), with the first loss and gradient of its plain form, without moving what is frozen, and what it
saves has to be read again with the same logits. A recipe that is refused with a `Conflict` has to be refused by dry and
real run alike, and where a method stated the conflict, the same recipe is tried without asking: the refusal is true
when that breaks one of the rules above. Everything else is "wrong". With --seconds no recipe begins after so long, and
the same command goes on; recipes that were tried by another version of tunewise are tried again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
import warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from benchmarks.compose.space import draw_case
from benchmarks.compose.trial import Tried, try_case

from tunewise.planner.cache import source_digest

UNFINISHED = 75
"""Exit code: the same command goes on (EX_TEMPFAIL of sysexits.h)."""


def known(path: Path, version: str, seed: int) -> dict[int, dict[str, Any]]:
    """Return what an earlier call of this version has tried."""
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("version") != version or content.get("seed") != seed:
        return {}
    return {int(row["number"]): row for row in content["recipes"]}


def try_number(seed: int, number: int) -> dict[str, Any]:
    """Try one recipe and return its row; whatever goes wrong is a verdict."""
    case, started = draw_case(seed, number), time.monotonic()
    try:
        tried = try_case(case)
    except Exception as error:  # what no rule foresaw is what is looked for: it counts as wrong, with its place
        place = traceback.extract_tb(error.__traceback__)[-1]
        told = (str(error) or "no message").replace("\n", " ")[:300]
        tried = Tried("wrong", f"{type(error).__name__}: {told} ({Path(place.filename).name}:{place.lineno})")
    return {**asdict(case), **asdict(tried), "seconds": round(time.monotonic() - started, 2)}


def write(path: Path, rows: dict[int, dict[str, Any]], version: str, seed: int, wanted: int) -> dict[str, int]:
    """Write the JSON, a line a recipe, and return the summary."""
    verdicts = Counter(row["verdict"] for row in rows.values())
    summary = {verdict: verdicts[verdict] for verdict in ("trained", "refused", "wrong")}
    head = {
        "command": f"python benchmarks/compose/run.py --recipes {wanted} --seed {seed} --json {path.name}",
        "summary": summary,
        "to_come": wanted - len(rows),
        "seed": seed,
        "version": version,
        "torch": torch.__version__,
    }
    lines = ",\n".join(f"  {json.dumps(rows[number])}" for number in sorted(rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(head, indent=1).removesuffix("\n}")
    path.write_text(f'{text},\n "recipes": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    return summary


def main() -> int:
    """Try the recipes that are not known yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="OUT")
    parser.add_argument("--recipes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="begin no recipe after so long; call again to go on")
    parser.add_argument("--only", default="", help="numbers of recipes to try again, separated by commas")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    version = source_digest()[:16]
    rows, started = known(arguments.json, version, arguments.seed), time.monotonic()
    again = [int(number) for number in arguments.only.split(",") if number]
    for number in again or range(arguments.recipes):
        if number in rows and not again:
            continue
        if arguments.seconds is not None and time.monotonic() - started > arguments.seconds:
            break
        row = rows[number] = try_number(arguments.seed, number)
        if row["verdict"] == "wrong":
            print(f"{number}: {row['reason']}\n    {row['architecture']} {row['methods']}", flush=True)
        write(arguments.json, rows, version, arguments.seed, arguments.recipes)
    summary = write(arguments.json, rows, version, arguments.seed, arguments.recipes)
    print(f"summary: {summary}, {arguments.recipes - len(rows)} to come")
    if len(rows) < arguments.recipes:
        return UNFINISHED
    return 1 if summary["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
