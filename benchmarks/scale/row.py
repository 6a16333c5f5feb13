"""One row of `run.py`, in a process of its own: a setting as JSON on the command line, a result as JSON on the output.

Steps are whole steps of a training (gradients of all micro-batches, clipping, update) on random documents; tokens are
real ones, padding not counted. Memory is the process's peak resident size less what it had after its imports.
"""

from __future__ import annotations

import json
import resource
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from benchmarks.peers import problem
from transformers import LlamaConfig

from tunewise.engine.assemble import assemble, settle
from tunewise.engine.step import clipped_norm, gradients, parameter_groups, set_learning_rate, update
from tunewise.methods.reading import recipe_from_mapping
from tunewise.workload.batches import GlobalBatches
from tunewise.workload.corpus import Corpus
from tunewise.workload.model import EMBEDDED_FOLDER

SMALL = {
    "0.3M": problem.Size(64, 5, 1, 1, 172),  # stories260K, with heads of 64
    "1M": problem.Size(128, 4, 2, 1, 344),
    "4M": problem.Size(256, 4, 4, 2, 688),  # the embedded model
}
VOCAB_SIZE = 4096


def config_of(size: str) -> LlamaConfig:
    """Return the shape of a size of `peers/problem.py` or of `SMALL`."""
    if size not in SMALL:
        return problem.config_of(size, "long")
    shape = vars(SMALL[size])
    return LlamaConfig(
        **shape, head_dim=64, vocab_size=VOCAB_SIZE, max_position_embeddings=8192, tie_word_embeddings=True
    )


def model_folder(size: str, cache: Path) -> Path:
    """Return a folder with the configuration and the embedded tokenizer; weights are random ones."""
    folder = cache / size
    folder.mkdir(parents=True, exist_ok=True)
    config_of(size).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED_FOLDER / name, folder / name)
    return folder


def corpus_of(length: int, count: int, *, is_uneven: bool = False) -> Corpus:
    """Return `count` random documents of `length` tokens (uneven: of 20 to 180 % of that), the second half learnt."""
    random = np.random.default_rng(0)
    lengths = random.integers(length // 5, length * 9 // 5, count) if is_uneven else np.full(count, length)
    documents = [
        (random.integers(3, VOCAB_SIZE, n).astype(np.int32), np.arange(n) >= n // 2) for n in map(int, lengths)
    ]
    return Corpus.from_documents(documents, ["made"] * count)


class Steps:
    """The steps of one setting."""

    def __init__(self, row: dict[str, Any], methods: dict[str, Any]) -> None:
        torch.manual_seed(0)
        length, documents = row["length"], row["documents"]
        train = corpus_of(length, documents * 8, is_uneven=row.get("is_uneven", False))
        mapping = {
            "model": {"name": str(model_folder(row["size"], Path(row["cache"]))), "weights": "random"},
            "data": {"source": "made", "max_length": 8192},
            "methods": {"packing": {"row_tokens": row["row_tokens"]}, **methods},
            "batch": {"documents": documents, "micro_batch_size": row.get("micro_batch_size", 1)},
            "device": "cpu",
        }
        self.plan = settle(recipe_from_mapping(mapping), problem.prepared(train, train.take([])))
        self.run = assemble(self.plan)
        self.optimizer = self.run.make_optimizer(parameter_groups(self.run))
        set_learning_rate(self.optimizer, 1e-4)
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.steps = GlobalBatches(train, self.plan.recipe.batch, 0).from_step(0)

    def step(self) -> tuple[int, float]:
        """Do the next one; return its tokens and seconds."""
        train, run = self.plan.data.train, self.run
        started = time.perf_counter()
        documents = next(self.steps)[1]
        rows = run.layout.micro_batches(documents, train.lengths)
        batches = (run.layout.build(each, train) for each in rows)
        float(gradients(run, batches, int(train.num_supervised[documents].sum()), self.scaler))
        float(clipped_norm(run, self.optimizer, self.scaler))
        update(run, self.optimizer, self.scaler)
        return int(train.lengths[documents].sum()), time.perf_counter() - started


def timed(row: dict[str, Any]) -> dict[str, Any]:
    """Return speed and memory of one setting."""
    before = resident_bytes()
    steps = Steps(row, row["methods"])
    steps.step()
    done = [steps.step() for _ in range(row["steps"])]
    rates = [tokens / seconds for tokens, seconds in done]
    return {
        "tokens_per_second": round(statistics.median(rates), 1),
        "slowest": round(min(rates), 1),
        "fastest": round(max(rates), 1),
        "tokens_per_step": round(statistics.mean(tokens for tokens, _ in done)),
        "peak_bytes": peak_bytes() - before,
        "methods": sorted(method.name for method in steps.plan.recipe.methods or ()),
    }


def compared(row: dict[str, Any]) -> dict[str, Any]:
    """Return how much faster the compiled kernels are than torch's own operators, step by step in turns."""
    named = {"attention": {"kind": "per_document"}}  # who names it gets no kernels by default
    sides = [Steps(row, {**row["methods"], **more}) for more in (named, {})]
    if "fused" not in {method.name for method in sides[1].plan.recipe.methods or ()}:
        raise SystemExit("there is no C++ compiler, so there is nothing to compare")
    for side in sides:
        side.step()
        side.step()
    seconds: list[list[float]] = [[], []]
    for _ in range(row["steps"]):
        for side, found in zip(sides, seconds, strict=True):
            found.append(side.step()[1])
    plain, fused = (statistics.median(each) for each in seconds)
    ratios = sorted(a / b for a, b in zip(*seconds, strict=True))
    return {
        "plain_seconds": round(plain, 5),
        "fused_seconds": round(fused, 5),
        "speedup": round(plain / fused, 3),
        "speedup_low": round(ratios[len(ratios) // 4], 3),
        "speedup_high": round(ratios[-1 - len(ratios) // 4], 3),
    }


def resident_bytes() -> int:
    """Return what is resident now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    """Return the most that was ever resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    setting = json.loads(sys.argv[1])
    print(json.dumps({"kernels": compared}.get(setting["kind"], timed)(setting)))
