"""What padding to multiples (`pad`) does to the time of a step on this machine.

    python benchmarks/shapes/run.py --json OUT

Steps of a small Llama (forward, backward, update) with an odd size and with the padded one, timed in turns; the ratio
is of the medians, with the quartiles of the ratio of neighbours. Run it on a GPU where there is one: the rules were
made for its matrix units.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig

from tunewise.engine.build import build
from tunewise.engine.step import gradients, parameter_groups, set_learning_rate, update
from tunewise.methods import complete
from tunewise.methods.precision import Precision
from tunewise.methods.reading import recipe_from_mapping
from tunewise.workload.corpus import Corpus
from tunewise.workload.model import random_model

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "vocabulary 32001 to 32064": ({}, {"pad": {"vocabulary": 64, "rank": None}}, 64),
    "LoRA rank 6 to 8": ({"lora": {"rank": 6}}, {"pad": {"vocabulary": None, "rank": 8}}, 64),
    "length 61 to 64": ({}, {"pad": {"vocabulary": None, "rank": None, "length": 64}}, 61),
}
"""Methods of both sides, the padding, and the documents' length."""


def step_of(methods: dict[str, Any], compute: str, length: int) -> Callable[[], None]:
    """Return a function that does one step of eight documents."""
    config = LlamaConfig(
        vocab_size=32001, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mapping = {
        "model": {"name": "x", "weights": "random"},
        "data": {"source": "y"},
        "methods": {"precision": {"compute": compute}, **methods},
        "batch": {"documents": 8, "micro_batch_size": 8},
        "device": device.type,
    }
    recipe = complete(recipe_from_mapping(mapping, "benchmark"), config, device)
    precision = recipe.get(Precision)
    assert precision is not None
    run = build(recipe, random_model(config, precision.loading_dtype(recipe), 0), device)
    optimizer, scaler = run.make_optimizer(parameter_groups(run)), torch.amp.GradScaler(device.type, enabled=False)
    ids, marks = np.arange(length, dtype=np.int32), np.ones(length, dtype=np.bool_)
    corpus = Corpus.from_documents([(ids, marks)] * 8, ["made"] * 8)
    (rows,) = run.layout.micro_batches(range(8), corpus.lengths)
    batch = run.layout.build(rows, corpus)

    def step() -> None:
        set_learning_rate(optimizer, 1e-4)
        gradients(run, [batch], int(corpus.num_supervised.sum()), scaler)
        update(run, optimizer, scaler)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def compare(plain: Callable[[], None], padded: Callable[[], None], turns: int) -> dict[str, float]:
    """Time both in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns + 3):
        for number, step in enumerate((plain, padded)):
            started = time.perf_counter()
            step()
            if turn >= 3:
                times[number].append(time.perf_counter() - started)
    ratios = [after / before for before, after in zip(*times, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    before, after = (statistics.median(each) for each in times)
    return {
        "plain_seconds": round(before, 5),
        "padded_seconds": round(after, 5),
        "ratio": round(after / before, 3),
        "lower_quartile": round(low, 3),
        "upper_quartile": round(high, 3),
    }


def main() -> None:
    """Compare every case in fp32 and bf16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=20)
    options = parser.parse_args()
    found: dict[str, Any] = {"torch": torch.__version__, "turns": options.turns}
    for case, (methods, pad, length) in CASES.items():
        for compute in ("fp32", "bf16"):
            sides = (step_of(methods, compute, length), step_of({**methods, **pad}, compute, length))
            row = found[f"{case}, {compute}"] = compare(*sides, options.turns)
            print(f"{case}, {compute}: {row}", flush=True)
    options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
