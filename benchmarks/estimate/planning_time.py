"""How long a plan takes: large models, nothing kept from before, then a second time; and how it grows with depth.

    python benchmarks/estimate/planning_time.py --json OUT [--only 8B,70B] [--configs FOLDER]

Each case is planned in a process of its own with an empty cache folder (`TUNEWISE_CACHE`), then once more in a new
process with what the first one left there. The clock starts when tunewise and what it needs are imported, and stops at
the answer, be it a plan or the error that nothing fits (with the nearest recipe that does). Other cases that OUT holds
already are kept, so that pieces can be run one after another.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).resolve().parents[3] / "shared" / "data" / "configs"

DEPTHS = (8, 32, 64, 128)
SECOND_LIMIT = 2.0
"""Seconds that any plan may take the second time."""


@dataclass(frozen=True)
class Case:
    """One question, and what the issue allows it to take.

    Attributes:
        name: in --only and in the result.
        config: file name in the folder of configurations, without .json.
        question: keyword arguments of `tunewise.plan`.
        limit: seconds; None where no limit is set.
        num_hidden_layers: None for the configuration's own.
    """

    name: str
    config: str
    question: dict[str, Any]
    limit: float | None = None
    num_hidden_layers: int | None = None


CASES = (
    Case("8B on 24 GB", "Llama-3.1-8B", {"machine": "RTX 4090", "length": 2048}, 20.0),
    Case("8B on 24 GB, half an hour at most", "Llama-3.1-8B",
         {"machine": "RTX 4090", "length": 2048, "num_documents": 2000, "time": "30m"}, 20.0),
    Case("8B on 141 GB", "Llama-3.1-8B", {"machine": "H200", "length": 2048}),
    Case("70B on 141 GB", "Llama-3.1-70B", {"machine": "H200", "length": 2048}, 40.0),
    Case("70B on 80 GB", "Llama-3.1-70B", {"machine": "H100 SXM 80GB", "length": 2048}, 40.0),
    Case("70B on 24 GB", "Llama-3.1-70B", {"machine": "RTX 4090", "length": 2048}, 40.0),
    Case("mixture of 106B on 256 GB", "Mixtral-8x22B-v0.1", {"machine": "MI325X", "length": 2048}, 40.0,
         num_hidden_layers=42),
    Case("mixture of 141B on 180 GB", "Mixtral-8x22B-v0.1", {"machine": "B200", "length": 2048}, 40.0),
    Case("mixture of 235B on 141 GB", "Qwen3-235B-A22B", {"machine": "H200", "length": 2048}, 40.0),
    *(Case(f"8B wide, {depth} blocks", "Llama-3.1-8B", {"machine": "RTX 4090", "length": 2048, "wanted": ["lora"]},
           num_hidden_layers=depth) for depth in DEPTHS),
)  # fmt: skip


def plan_once(config: str, question: dict[str, Any]) -> dict[str, Any]:
    """Import, plan, and say how long each took: what the child process does."""
    import time

    begun = time.perf_counter()
    from tunewise.planner.choose import NothingFits
    from tunewise.planner.plan import plan

    imported = time.perf_counter()
    try:
        found = plan(config, **question)
        answer = {
            "answer": found.best.label, "num_combinations": found.num_combinations, "num_traced": found.num_traced
        }  # fmt: skip
    except NothingFits as error:
        answer = {"answer": str(error).replace("\n ", "")}
    return {"seconds": time.perf_counter() - imported, "import_seconds": imported - begun, **answer}


def in_a_process(config: Path, question: dict[str, Any], cache: Path) -> dict[str, Any]:
    """Return what a fresh process answers."""
    command = [sys.executable, __file__, "--child", json.dumps([str(config), question])]
    done = subprocess.run(
        command, env={**os.environ, "TUNEWISE_CACHE": str(cache)}, check=True, capture_output=True, text=True
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def run_case(case: Case, configs: Path) -> dict[str, Any]:
    """Plan twice and return the row."""
    shape = json.loads((configs / f"{case.config}.json").read_text(encoding="utf-8"))
    if case.num_hidden_layers is not None:
        shape["num_hidden_layers"] = case.num_hidden_layers
    with tempfile.TemporaryDirectory() as folder:
        config, cache = Path(folder) / "config.json", Path(folder) / "cache"
        config.write_text(json.dumps(shape), encoding="utf-8")
        first, second = (in_a_process(config, case.question, cache) for _ in range(2))
    assert first["answer"] == second["answer"]
    return {
        "name": case.name,
        "config": case.config,
        "num_hidden_layers": shape["num_hidden_layers"],
        "question": case.question,
        "first_seconds": round(first["seconds"], 2),
        "second_seconds": round(second["seconds"], 2),
        "import_seconds": round(first["import_seconds"], 2),
        "limit_seconds": case.limit,
        **{name: first[name] for name in ("answer", "num_combinations", "num_traced") if name in first},
    }


def is_kept(row: dict[str, Any]) -> bool:
    """Say whether a row keeps to its limits."""
    limit = row["limit_seconds"]
    return (limit is None or row["first_seconds"] <= limit) and row["second_seconds"] <= SECOND_LIMIT


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the slowest case of each kind, whether all keep to their limits, and deepest over shallowest."""
    deep = sorted((row for row in rows if " blocks" in row["name"]), key=lambda row: int(row["num_hidden_layers"]))
    return {
        "cases": len(rows),
        "within_limits": all(map(is_kept, rows)),
        "slowest_first_seconds": max(row["first_seconds"] for row in rows),
        "slowest_second_seconds": max(row["second_seconds"] for row in rows),
        "seconds_by_depth": {str(row["num_hidden_layers"]): row["first_seconds"] for row in deep},
    }


def main() -> int:
    """Run the cases and write the JSON; 1 if a limit is not kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--only", default="", help="cases whose name begins so, separated by semicolons")
    parser.add_argument("--configs", type=Path, default=CONFIGS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(plan_once(*json.loads(arguments.child))))
        return 0
    if arguments.json is None:
        parser.error("--json OUT is needed")
    known = json.loads(arguments.json.read_text(encoding="utf-8"))["rows"] if arguments.json.is_file() else []
    by_name = {row["name"]: row for row in known}
    only = tuple(arguments.only.split(";"))
    for case in CASES:
        if case.name.startswith(only):
            row = by_name[case.name] = run_case(case, arguments.configs)
            print(
                f"{row['name']}: {row['first_seconds']} s, again {row['second_seconds']} s; {row['answer']}", flush=True
            )
    rows = [by_name[case.name] for case in CASES if case.name in by_name]
    result = {
        "command": "benchmarks/estimate/planning_time.py --json OUT",
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.processor() or platform.machine(),
        "summary": summarize(rows),
        "rows": rows,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if result["summary"]["within_limits"] else 1


if __name__ == "__main__":
    sys.exit(main())
