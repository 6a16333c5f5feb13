"""Predicted tokens a second against published ones.

    python benchmarks/estimate/throughput.py --csv FILE --json OUT [--configs FOLDER]

The CSV has the columns of `training_throughput.csv`. A prediction is the roofline of one GPU's own work: its
micro-batches forward and backward, and its share of the optimizer's update where the state is sharded. What GPUs send
to each other is not in it, so rows of more than one node are left out. It is corrected as plans are that know the
machine from the catalogue only: by `calibration.CATALOGUED`, three numbers for all rows, read off these very rows.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PretrainedConfig

from tunewise.engine.dry_run import BatchShape, dry_run
from tunewise.engine.work import Work, WorkKey
from tunewise.errors import InputError, TunewiseError
from tunewise.machine.catalogue import find
from tunewise.machine.machine import Machine
from tunewise.methods import complete
from tunewise.methods.reading import recipe_from_mapping
from tunewise.planner.calibration import CATALOGUED
from tunewise.planner.predict import profile_of
from tunewise.planner.roofline import launch_seconds, seconds_of
from tunewise.recipe import ModelSpec
from tunewise.workload.model import load_config

MOST_GPUS = 8
"""Of one node; between nodes the network decides."""

MPT = {
    "125m": (768, 12, 12), "350m": (1024, 24, 16), "760m": (1536, 24, 12), "1b": (2048, 24, 16), "3b": (2560, 32, 20),
    "7b": (4096, 32, 32), "13b": (5120, 40, 40), "30b": (7168, 48, 56), "70b": (8192, 80, 64),
}  # fmt: skip
"""hidden size, blocks, heads: llm-foundry's configurations."""

MPT_VOCABULARY = 50368


class LeftOut(Exception):
    """Why a row cannot be reproduced."""


@dataclass(frozen=True)
class Row:
    """One published measurement as a recipe."""

    id: str
    source: str
    model: str
    config: PretrainedConfig
    methods: dict[str, Any]
    length: int
    micro_batch_size: int
    accumulation: int
    machine: Machine
    num_gpus: int
    measured: float


def read(line: dict[str, str], configs: Path) -> Row:
    """Return a line of the CSV as a recipe.

    Raises:
        LeftOut: it cannot be reproduced, and why.
    """
    if line["status"] != "measured":
        raise LeftOut(f"status '{line['status']}'")
    if not line["throughput_tokens_s_gpu"]:
        raise LeftOut("no tokens a second (a time without the number of tokens)")
    if int(line["n_gpus"]) > MOST_GPUS:
        raise LeftOut("more than one node")
    if line["activation_cpu_offload"] == "True":
        raise LeftOut("activations offloaded to the host")
    return Row(
        id=line["id"],
        source=line["source"],
        model=line["model"],
        config=config_of(line["model"], int(line["seq_len"]), configs),
        methods=methods_of(line),
        length=int(line["seq_len"]),
        micro_batch_size=int(line["micro_batch"]),
        accumulation=int(line["grad_accum"] or 1),
        machine=machine_of(line["gpu"]),
        num_gpus=int(line["n_gpus"]),
        measured=float(line["throughput_tokens_s_gpu"]),
    )


def config_of(model: str, length: int, configs: Path) -> PretrainedConfig:
    """Return the configuration of a model's name."""
    size = model.lower().removeprefix("mpt-")
    if model.lower().startswith("mpt-") and size in MPT:
        hidden_size, num_blocks, num_heads = MPT[size]
        # The same products as MPT: a plain feed-forward of four times the width, one head each, a tied vocabulary.
        return AutoConfig.for_model(
            "gpt_neox",
            hidden_size=hidden_size,
            intermediate_size=4 * hidden_size,
            num_hidden_layers=num_blocks,
            num_attention_heads=num_heads,
            vocab_size=MPT_VOCABULARY,
            max_position_embeddings=length,
            use_parallel_residual=False,
            tie_word_embeddings=True,
        )
    file = configs / f"{model.split('/')[-1]}.json"
    if not file.is_file():
        raise LeftOut(f"no configuration of '{model}'")
    return load_config(ModelSpec(name=str(file)))


def methods_of(line: dict[str, str]) -> dict[str, Any]:
    """Return the recipe's methods."""
    precisions = {
        "amp_bf16": {"compute": "bf16"},
        "bf16": {"compute": "bf16", "trainable": "same"},
        "bfloat16": {"compute": "bf16", "trainable": "same"},
        "amp_fp16": {"compute": "fp16"},
        "fp32": {"compute": "fp32"},
        "tf32": {"compute": "tf32"},
    }
    if line["precision"] not in precisions:
        raise LeftOut(f"precision {line['precision']}")
    methods: dict[str, Any] = {"precision": precisions[line["precision"]], "whole_loss": {}}
    if "lora" in line["kind"].lower():
        methods["lora"] = {}
    if line["activation_ckpt"] == "True":
        methods["checkpointing"] = {}
    return methods


def machine_of(gpu: str) -> Machine:
    """Return the catalogue's machine."""
    try:
        return find(gpu.replace("_", " "))
    except InputError as error:
        raise LeftOut(str(error)) from None


def predict(row: Row, known: dict[Any, Any]) -> float:
    """Return tokens a second on one GPU; equal dry runs are made once."""
    key = (row.model, json.dumps(row.methods, sort_keys=True), row.length, row.micro_batch_size, row.machine.name)
    if key not in known:
        known[key] = _work(row)
    seconds = seconds_of(known[key], row.machine)
    micro = max(seconds.linear + seconds.attention, seconds.calls * launch_seconds(row.machine))
    update = max(seconds.update / row.num_gpus, seconds.update_calls * launch_seconds(row.machine))
    tokens = row.accumulation * row.micro_batch_size * row.length
    return tokens / (CATALOGUED[1] * (row.accumulation * micro + update))


def _work(row: Row) -> dict[WorkKey, Work]:
    mapping = {
        "model": {"name": row.model, "weights": "random"},
        "data": "none",
        "methods": row.methods,
        "batch": {"documents": row.micro_batch_size, "micro_batch_size": row.micro_batch_size},
    }
    recipe = complete(recipe_from_mapping(mapping, f"row {row.id}"), row.config, torch.device("cuda"))
    shape = BatchShape.uniform(row.micro_batch_size, row.length)
    return dict(dry_run(recipe, row.config, "cuda", shape, profile=profile_of(row.machine)).work)


def summary(rows: list[dict[str, Any]], left_out: Counter[str]) -> dict[str, Any]:
    """Return what the rows come to; errors are (predicted - measured) / measured."""
    errors = [row["error"] for row in rows]
    sizes = sorted(map(abs, errors))
    low, middle, high = CATALOGUED
    ratios = [middle * row["predicted"] / row["measured"] for row in rows]
    return {
        "rows_used": len(rows),
        "rows_left_out": sum(left_out.values()),
        "left_out_because": dict(left_out),
        "median_error": statistics.median(sizes),
        "p90_error": float(np.quantile(sizes, 0.9)),
        "worst_error": max(sizes),
        "bias": statistics.median(errors),
        "under_predictions": sum(error < 0 for error in errors),
        "inside_interval": sum(low <= ratio <= high for ratio in ratios) / len(ratios),
        "time_measured_over_roofline": {
            f"p{share}": float(np.quantile(ratios, share / 100)) for share in (5, 10, 50, 90, 95)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    shared = Path(__file__).resolve().parents[3] / "shared" / "data" / "configs"
    parser.add_argument("--configs", type=Path, default=shared, help="folder of config.json files by model name")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    left_out: Counter[str] = Counter()
    known: dict[Any, Any] = {}
    with options.csv.open(encoding="utf-8", newline="") as stream:
        for line in csv.DictReader(stream):
            try:
                row = read(line, options.configs)
                predicted = predict(row, known)
            except (LeftOut, TunewiseError) as reason:
                left_out[str(reason)] += 1
                continue
            error = (predicted - row.measured) / row.measured
            content = {"id": row.id, "source": row.source, "model": row.model, "gpu": row.machine.name}
            content |= {"length": row.length, "micro_batch_size": row.micro_batch_size, "num_gpus": row.num_gpus}
            rows.append({**content, "methods": row.methods, "measured": row.measured, "predicted": predicted,
                         "error": error})  # fmt: skip
    if not rows:
        raise SystemExit(f"no row of {options.csv} can be used: {dict(left_out)}")
    sources = {}
    for name in dict.fromkeys((row["source"], row["gpu"]) for row in rows):
        part = [row for row in rows if (row["source"], row["gpu"]) == name]
        sources[" on ".join(name)] = summary(part, Counter())
    content = {"summary": summary(rows, left_out), "sources": sources, "rows": rows}
    options.json.write_text(json.dumps(content, indent=1), encoding="utf-8")
    print(json.dumps({"summary": content["summary"], "sources": sources}, indent=1))


if __name__ == "__main__":
    main()
