"""The row of `run.py` that asks what the number of records costs before the first step, in a process of its own.

    python benchmarks/scale/records.py '{"records": 100000, "folder": "/tmp/records"}'

Writes a file of short records (some fifty tokens each, all different) unless it is there, and settles a recipe on it as
a training does: read, convert, tokenize, split, examine, count the steps, build the first micro-batches. What has been
prepared is kept in `folder`, so the first call for a number of records is a first use and the next one a second use.
Seconds count from the call, imports left out. `anonymous_bytes` is the most memory of the process's own (RssAnon of
/proc, looked at every 5 ms) above what it had after its imports: pages of files are left out, for the system may take
them back at any time; `resident_bytes` has them too.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from benchmarks.scale.row import model_folder

from tunewise.engine.assemble import settle
from tunewise.methods.reading import recipe_from_mapping
from tunewise.workload.batches import GlobalBatches, Layout

WORDS = [a + b + c for a in "bdgklmnrst" for b in "aeiou" for c in ("", "n", "r", "st")]
MICRO_BATCHES = 50


def write_records(file: Path, count: int) -> None:
    """Write `count` prompts and answers of 5 to 30 words."""
    random = np.random.default_rng(0)
    with file.open("w", encoding="utf-8") as stream:
        for first in range(0, count, 10_000):
            sizes = random.integers(5, 31, min(10_000, count - first))
            words = random.integers(0, len(WORDS), int(sizes.sum())).tolist()
            for number, size in enumerate(sizes.tolist(), start=first):
                answer = " ".join(WORDS[words.pop()] for _ in range(size))
                stream.write(json.dumps({"prompt": f"Say it, number {number}:", "completion": answer}) + "\n")


class Watched:
    """The largest values of two fields of /proc/self/status inside the context, less those before it."""

    def __enter__(self) -> Watched:
        self._before, self.most, self._ends = _status(), (0, 0), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ends.wait(0.005):
            now = _status()
            self.most = tuple(max(a, b - c) for a, b, c in zip(self.most, now, self._before, strict=True))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ends.set()
        self._thread.join()


def _status() -> tuple[int, int]:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    anonymous, resident = (int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "VmRSS"))
    return anonymous, resident


def main(row: dict[str, Any]) -> dict[str, Any]:
    """Return what starting costs."""
    folder = Path(row["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TUNEWISE_CACHE"] = str(folder / "cache")
    file = folder / f"{row['records']}.jsonl"
    if not file.is_file():
        write_records(file, row["records"])
    if row.get("forget"):
        shutil.rmtree(folder / "cache", ignore_errors=True)
    recipe = recipe_from_mapping(
        {
            "model": {"name": str(model_folder("4M", folder)), "weights": "random"},
            "data": {"source": str(file)},
            "methods": {"lora": {"rank": 8}, "packing": {"row_tokens": 2048}},
            "training": {"epochs": 1},
            "device": "cpu",
        }
    )
    torch.manual_seed(0)
    with Watched() as watched:
        started = time.perf_counter()
        plan = settle(recipe)
        seconds = time.perf_counter() - started
        train, layout = plan.data.train, Layout(1, 2048)
        steps, built, tokens = GlobalBatches(train, plan.recipe.batch, 0).from_step(0), 0, 0
        started = time.perf_counter()
        while built < MICRO_BATCHES:
            for rows in layout.micro_batches(next(steps)[1], train.lengths):
                tokens += layout.build(rows, train).num_tokens
                built += 1
        loading = time.perf_counter() - started
    return {
        "seconds": round(seconds, 3),
        "anonymous_bytes": watched.most[0],
        "resident_bytes": watched.most[1],
        "loader_tokens_per_second": round(tokens / loading),
        "documents": len(train),
        "tokens": len(train.token_ids),
        "fingerprint": plan.data.data_fingerprint,
        "cores": len(os.sched_getaffinity(0)),
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
