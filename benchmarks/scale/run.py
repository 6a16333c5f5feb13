"""Does cost grow as work grows? Tokens/s against model size, length, micro-batch; the data path against records.

    python benchmarks/scale/run.py --json scale.json
    python benchmarks/scale/run.py --part records --records 1000,100000 --json records.json

`size`, `length`, `micro`: LoRA steps as a training does them, with the bf16 ceiling of the same run beside each
point. `records`: a file of short records is made and prepared (read, converted, tokenized, split, examined) in a
process of its own, twice: seconds, and the peak resident size above a process that has only imported tunewise. Points
that are in the JSON file already are kept, so the same command goes on after an interruption."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from benchmarks.peers import problem
from benchmarks.roofline.run import Steps, ceilings

from tunewise.engine.assemble import settle
from tunewise.engine.run_folder import versions
from tunewise.methods.reading import recipe_from_mapping
from tunewise.workload.corpus import Corpus

PARTS = ("size", "length", "micro", "records")
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
MICRO = (1, 2, 4, 8)
TOKENS_PER_STEP = 8192
TIMED = 2

PREPARE = """
import resource, sys, time
from tunewise.engine.assemble import settle
from tunewise.methods.reading import recipe_from_mapping
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.perf_counter()
data = {"source": sys.argv[1], "validation_fraction": 0.01}
plan = settle(recipe_from_mapping({"model": "embedded", "data": data, "device": "cpu"}))
seconds = time.perf_counter() - started
print(seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, len(plan.data.train.token_ids))
"""


def documents(lengths: list[int]) -> Corpus:
    """Random documents of these lengths, every token learnt."""
    chooser = np.random.default_rng(0)
    made = [(chooser.integers(3, 4096, n, dtype=np.int32), np.ones(n, dtype=np.bool_)) for n in lengths]
    return Corpus.from_documents(made, [f"made:{number}" for number in range(len(made))])


def tokens_per_second(cache: Path, size: str, lengths: list[int], row_tokens: int, micro: int, methods: str) -> float:
    """Time steps of `lengths` documents each."""
    folder = cache / f"{size}-short"
    if not (folder / "config.json").is_file():
        problem.write_model(folder, size, "short")
    mapping = problem.recipe_mapping("lora", str(folder), json.loads(methods))
    mapping["methods"]["packing"] = {"row_tokens": row_tokens}
    mapping["batch"] = {"documents": len(lengths), "micro_batch_size": micro}
    corpus = documents(lengths * (TIMED + 1))
    steps = Steps(settle(recipe_from_mapping(mapping), problem.prepared(corpus, corpus.take([]))))
    steps.step()
    started = time.perf_counter()
    tokens = sum(steps.step() for _ in range(TIMED))
    return tokens / (time.perf_counter() - started)


def points(arguments: Namespace) -> Iterator[tuple[str, str, Any]]:
    """Yield (part, name, call) of every point."""
    chooser = np.random.default_rng(0)
    uneven = [int(n) for n in np.clip(chooser.lognormal(5.0, 0.6, 32), 30, 1500)]

    def speed(size: str, lengths: list[int], row_tokens: int, micro: int) -> Any:
        return lambda: tokens_per_second(arguments.cache, size, lengths, row_tokens, micro, arguments.methods)

    for size in problem.SIZES:
        yield "size", size, speed(size, uneven, 2048, 1)
    for length in LENGTHS:
        yield "length", str(length), speed("70M", [length] * (TOKENS_PER_STEP // length), length, 1)
    for micro in MICRO:
        yield "micro", str(micro), speed("70M", [512] * 16, 1024, micro)
    for count in map(int, arguments.records.split(",")):
        yield "records", str(count), lambda count=count: prepared_in(count)


def prepared_in(count: int) -> dict[str, float]:
    """Prepare `count` records in a process of its own, twice."""
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "records.jsonl"
        words = [line.split() for line, _ in problem.records()[:500]]
        chooser = np.random.default_rng(0)
        with file.open("w", encoding="utf-8") as stream:
            for number in range(count):
                asked, told = (words[int(chooser.integers(len(words)))] for _ in range(2))
                row = {"instruction": " ".join(asked), "output": f"{number} " + " ".join(told)}
                stream.write(json.dumps(row) + "\n")
        found: dict[str, float] = {"file_bytes": file.stat().st_size}
        for use in ("first", "second"):
            command = [sys.executable, "-c", PREPARE, str(file)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds, memory, tokens = map(float, done.stdout.split()[-3:])
            found |= {f"{use}_seconds": round(seconds, 2), f"{use}_memory_bytes": memory, "tokens": tokens}
    return found


def main(arguments: Namespace) -> int:
    result: dict[str, Any] = {part: {} for part in PARTS}
    if arguments.json.is_file():
        result = json.loads(arguments.json.read_text())
    started = time.monotonic()
    for part, name, call in points(arguments):
        if name in result[part] or arguments.part not in ("all", part):
            continue
        if arguments.seconds is not None and time.monotonic() - started > arguments.seconds:
            return 75
        value = call()
        if part != "records":
            ceiling = ceilings()["bf16_flops_per_second"]
            value = {"tokens_per_second": round(value, 1), "bf16_flops_per_second": round(ceiling)}
        result[part][name] = value
        print(part, name, json.dumps(value), flush=True)
        result["setting"] = {"methods": arguments.methods, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
        result["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        result["versions"] = versions()
        arguments.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("all", *PARTS), default="all")
    parser.add_argument("--records", default="1000,10000,100000,1000000")
    parser.add_argument("--methods", default='{"fused": {}}')
    parser.add_argument("--seconds", type=float, default=None)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "tunewise-peers" / "models")
    parser.add_argument("--json", type=Path, required=True)
    sys.exit(main(parser.parse_args()))
