"""Does cost grow as work grows? Speed and memory against model size, length, rows at once and number of records.

    python benchmarks/scale/run.py --json OUT [--only model,length,micro_batch,records,kernels] [--seconds N]

`model`: LoRA on 15M to 360M parameters, documents of 512 tokens. `length`: 70M, documents of 256 to 8,192 tokens, 8,192
tokens a step. `micro_batch`: 70M, 1 to 16 rows of 512 at once, 16 in a step. `records`: a thousand to a million short
records, from the call to the first step, a first and a second use (`records.py`). `kernels`: the compiled kernels
against torch's own, as they are the default, on small models, where a kernel's fixed costs would show, and on short and
long documents; step by step in turns.

Every row is a process of its own (`row.py`) and a file in `--rows`; with --seconds no row begins after so long, the
exit code is 75, and the same command goes on. Rows of another version of tunewise, or of another number of cores, are
not used.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tunewise.engine.run_folder import versions
from tunewise.planner.cache import source_digest
from tunewise.workload.places import cache_folder

ROOT = Path(__file__).resolve().parents[2]
UNFINISHED = 75
"""Exit code: the same command goes on (EX_TEMPFAIL of sysexits.h)."""

Row = dict[str, Any]

LORA = {"lora": {"rank": 16}}
MODELS = ("15M", "70M", "135M", "360M")
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
MICRO_BATCHES = (1, 2, 4, 8, 16)
RECORDS = (1_000, 10_000, 100_000, 1_000_000)
SMALL_MODELS = ("0.3M", "1M", "4M")


def all_rows() -> Iterator[Row]:
    """Yield every row, the cheap ones of each group first."""
    plain: Row = {"size": "70M", "row_tokens": 2048, "steps": 3, "methods": LORA}
    for size in MODELS:
        yield plain | {"kind": "model", "size": size, "length": 512, "documents": 16}
    for length in LENGTHS:
        sizes = {"documents": 8192 // length, "row_tokens": max(2048, length)}
        yield plain | {"kind": "length", "length": length} | sizes
    for rows in MICRO_BATCHES:
        sizes = {"length": 512, "documents": 16, "row_tokens": 512, "micro_batch_size": rows}
        yield plain | {"kind": "micro_batch"} | sizes
    for count in RECORDS:
        yield {"kind": "records", "records": count, "use": "first", "forget": True}
        yield {"kind": "records", "records": count, "use": "second"}
    for size in SMALL_MODELS:
        for compute in ("bf16", "fp32"):
            for tuned in (LORA, {}):
                methods = {**tuned, "precision": {"compute": compute}}
                sizes = {"length": 150, "is_uneven": True, "documents": 8, "row_tokens": 1024}
                yield {"kind": "kernels", "size": size, "steps": 8, "methods": methods} | sizes
    for length in (16, 2048, 8192):
        for compute in ("bf16", "fp32"):
            methods = {**LORA, "precision": {"compute": compute}}
            sizes = {"length": length, "documents": 8192 // length, "row_tokens": max(2048, length)}
            yield {"kind": "kernels", "size": "4M", "steps": 4, "methods": methods} | sizes


def label(row: Mapping[str, Any]) -> str:
    """Return a row's place in its group, in words."""
    match row["kind"]:
        case "model":
            return str(row["size"])
        case "length":
            return f"{row['length']} tokens"
        case "micro_batch":
            return f"{row['micro_batch_size']} rows"
        case "records":
            return f"{row['records']:,} records, {row['use']} use"
    tuned, compute = "LoRA" if "lora" in row["methods"] else "full", row["methods"]["precision"]["compute"]
    return f"{row['size']} {tuned} {compute}, {row['length']} tokens"


def file_of(row: Row, folder: Path) -> Path:
    """Return where a row is kept."""
    cores = len(os.sched_getaffinity(0))
    about = json.dumps([row, source_digest(), cores, os.environ.get("OMP_NUM_THREADS")], sort_keys=True)
    return folder / f"{row['kind']}-{hashlib.sha256(about.encode()).hexdigest()[:16]}.json"


def run_row(row: Row, cache: Path) -> Row:
    """Do a row in a process of its own."""
    script = "records.py" if row["kind"] == "records" else "row.py"
    places = {"folder": str(cache / "records"), "cache": str(cache / "models")}
    command = [sys.executable, str(Path(__file__).with_name(script)), json.dumps({**row, **places})]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1], "code": done.returncode}
    found: Row = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def summary(rows: list[Row]) -> dict[str, Any]:
    """Return what the rows come to; what has not been run is left out."""
    good = [row for row in rows if "failed" not in row]
    found: dict[str, Any] = {"rows": len(rows), "failed": len(rows) - len(good)}
    for kind in ("model", "length", "micro_batch"):
        speeds = {label(row): row["tokens_per_second"] for row in good if row["kind"] == kind}
        if speeds:
            found[f"tokens_per_second_by_{kind}"] = speeds
    starts = {(row["records"], row["use"]): row for row in good if row["kind"] == "records"}
    if starts:
        most = max(count for count, _ in starts)
        found["records"] = most
        for use in ("first", "second"):
            if (most, use) in starts:
                found[f"seconds_of_{use}_use"] = starts[most, use]["seconds"]
                found[f"anonymous_bytes_of_{use}_use"] = {
                    str(count): row["anonymous_bytes"] for (count, each), row in sorted(starts.items()) if each == use
                }
    speedups = {label(row): row["speedup"] for row in good if row["kind"] == "kernels"}
    if speedups:
        found["least_speedup_of_kernels"] = min(speedups.values())
        found["speedup_of_kernels"] = speedups
    return found


def show(rows: list[Row]) -> None:
    """Print the table."""
    print(f"{'group':12} {'row':28} {'tokens/s':>10} {'memory':>10} {'seconds':>9} {'speedup':>8}")
    for row in rows:
        if "failed" in row:
            print(f"{row['kind']:12} {label(row):28} failed: {row['failed']}")
            continue
        memory = row.get("peak_bytes", row.get("anonymous_bytes"))
        cells = (
            f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else "",
            "" if memory is None else f"{memory / 2**20:,.0f} MiB",
            f"{row['seconds']:.2f}" if "seconds" in row else "",
            f"{row['speedup']:.2f}" if "speedup" in row else "",
        )
        print("{:12} {:28} {:>10} {:>10} {:>9} {:>8}".format(row["kind"], label(row), *cells))


def main(given: list[str] | None = None) -> int:
    """Run the rows that are not kept yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="OUT")
    parser.add_argument("--only", default="", help="groups, separated by commas")
    parser.add_argument("--most-records", type=int, default=max(RECORDS), help="leave out larger numbers of records")
    parser.add_argument("--seconds", type=float, help="begin no row after so long; call again to go on")
    parser.add_argument("--rows", type=Path, default=None, help="folder of the rows (default: in the user's cache)")
    arguments = parser.parse_args(given)
    cache = cache_folder() / "scale"
    folder = arguments.rows or cache / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    groups = set(filter(None, arguments.only.split(",")))
    wanted = [row for row in all_rows() if not groups or row["kind"] in groups]
    wanted = [row for row in wanted if row.get("records", 0) <= arguments.most_records]
    found: list[Row] = []
    started, to_come = time.monotonic(), 0
    for row in wanted:
        kept = file_of(row, folder)
        if not kept.is_file():
            if arguments.seconds is not None and time.monotonic() - started > arguments.seconds:
                to_come += 1
                continue
            done = row | run_row(row, cache)
            kept.with_suffix(".part").write_text(json.dumps(done))
            kept.with_suffix(".part").replace(kept)
            print(f"{row['kind']} {label(row)}: {done.get('failed', 'done')}", file=sys.stderr, flush=True)
        found.append(json.loads(kept.read_text()))
    content: dict[str, Any] = {
        "command": f"python benchmarks/scale/run.py --json {arguments.json.name}",
        "summary": summary(found) | {"to_come": to_come},
        "rows": found,
        "machine": {"cores": len(os.sched_getaffinity(0))},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "source": source_digest()[:16],
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(content, indent=1), encoding="utf-8")
    show(found)
    print(f"summary: {json.dumps(content['summary'])}")
    if to_come:
        return UNFINISHED
    return 1 if content["summary"]["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
