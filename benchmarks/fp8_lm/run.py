"""FP8-LM (Peng et al. 2023, arXiv 2310.18313) on a small model: loss against bf16 AdamW, the decoupling, the bytes.

    python benchmarks/fp8_lm/run.py --json OUT [--seeds 3] [--steps 80]

A Llama of 0.5 M parameters is trained from scratch on the `stdlib` text by tunewise's own training loop, once for each
variant and seed (weights and data order alike within a seed), and its validation loss is taken at the end. "Noise" is
the standard deviation of the reference's loss over seeds. Bytes are counted on the tensors of the optimizer's state and
of the gradients. Finished runs are kept in OUT, so the same command goes on after a kill; a variant is compared as soon
as all its seeds are there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from tunewise.engine.assemble import assemble, settle
from tunewise.engine.run_folder import RunFolder
from tunewise.engine.step import parameter_groups
from tunewise.engine.train import Training
from tunewise.layers.fp8_lm import stored_gradients_of
from tunewise.methods.method import Run
from tunewise.methods.reading import recipe_from_mapping
from tunewise.workload.model import EMBEDDED_FOLDER
from tunewise.workload.prepare import Prepared

CONFIG = LlamaConfig(
    vocab_size=4096, hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
)  # fmt: skip
PURE = {"compute": "bf16", "trainable": "same"}
PLAIN = dict.fromkeys(("gradient", "first_moment", "second_moment", "master"), "fp32")
BETAS = {"beta2": 0.95}
VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {"precision": {"compute": "bf16"}, "adamw": BETAS},
    "fp8_lm": {"precision": PURE, "fp8_lm": BETAS},
    "all fp32": {"precision": PURE, "fp8_lm": BETAS | PLAIN},
    "gradient fp8": {"precision": PURE, "fp8_lm": BETAS | PLAIN | {"gradient": "fp8"}},
    "first moment fp8": {"precision": PURE, "fp8_lm": BETAS | PLAIN | {"first_moment": "fp8"}},
    "second moment fp8": {"precision": PURE, "fp8_lm": BETAS | PLAIN | {"second_moment": "fp8"}},
    "second moment fp8_e5m2": {"precision": PURE, "fp8_lm": BETAS | PLAIN | {"second_moment": "fp8_e5m2"}},
    "second moment fp16": {"precision": PURE, "fp8_lm": BETAS | PLAIN | {"second_moment": "fp16"}},
    "master fp16": {"precision": PURE, "fp8_lm": BETAS | PLAIN | {"master": "fp16"}},
    "master fp8": {"precision": PURE, "fp8_lm": BETAS | PLAIN | {"master": "fp8"}},
    "adamw_8bit": {"precision": {"compute": "bf16"}, "adamw_8bit": BETAS},
    "adamw_4bit": {"precision": {"compute": "bf16"}, "adamw_4bit": BETAS},
    "adam_mini": {"precision": {"compute": "bf16"}, "adam_mini": BETAS},
    "apollo": {"precision": {"compute": "bf16"}, "apollo": BETAS | {"rank": 16}},
}
"""The reference, the whole method, each precision lowered alone (the rest in fp32), and other small states."""

BYTES_OF = ("bf16", "fp8_lm", "adamw_8bit", "adamw_4bit", "adam_mini", "apollo")
PAPER = {
    "fp8_lm": "loss as with bf16",
    "gradient fp8": "as with bf16 (with automatic scaling)",
    "first moment fp8": "as with fp32",
    "second moment fp8": "worse, diverges",
    "master fp16": "as with fp32 (with a scale a tensor)",
    "master fp8": "worse",
    "adamw_8bit": "as 32-bit (Dettmers et al.)",
    "adamw_4bit": "as 32-bit (Li et al.)",
    "adam_mini": "as AdamW (Zhang et al.)",
    "apollo": "as AdamW or better (Zhu et al.)",
}


def train(variant: str, seed: int, steps: int, folder: Path, data: list[Prepared]) -> dict[str, float]:
    """Train one variant and return its last validation loss; `data` keeps what the first run has prepared."""
    CONFIG.save_pretrained(folder)
    mapping = {
        "model": {"name": str(folder / "config.json"), "weights": "random", "tokenizer": str(EMBEDDED_FOLDER)},
        "data": {"source": "stdlib", "max_length": 128, "max_records": 400, "validation_fraction": 0.05},
        "objective": "pretrain",
        "methods": {"packing": {"row_tokens": 256}, "attention": {"kind": "sdpa"}, **VARIANTS[variant]},
        "batch": {"documents": 8, "micro_batch_size": 4},
        "training": {"steps": steps, "learning_rate": 4e-3, "spike": None},
        "evaluation": {"every": steps, "max_documents": 40},
        "device": "cpu",
        "seed": seed,
    }
    plan = settle(recipe_from_mapping(mapping, "benchmark"), data[0] if data else None)
    data[:] = [plan.data]
    run_folder = RunFolder(folder / "run")
    run_folder.open()
    run = assemble(plan)
    training = Training(
        run, plan.data.train, plan.data.validation, plan.num_steps, run_folder, lambda entry: None, saves=False
    )
    outcome = training.run()
    run_folder.close()
    assert outcome.best_loss is not None
    return {"loss": outcome.best_loss, "seconds": outcome.seconds}


def bytes_of(variant: str) -> dict[str, float]:
    """Return bytes a parameter of the gradients, of each part of the state and of the weights, counted on tensors."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        CONFIG.save_pretrained(folder)
        mapping = {
            "model": {"name": str(folder / "config.json"), "weights": "random", "tokenizer": str(EMBEDDED_FOLDER)},
            "data": {"source": "stdlib", "max_length": 128, "max_records": 60},
            "objective": "pretrain",
            "methods": VARIANTS[variant],
            "training": {"steps": 1},
            "device": "cpu",
        }
        run = assemble(settle(recipe_from_mapping(mapping, "benchmark")))
    optimizer = run.make_optimizer(parameter_groups(run))
    count = sum(parameter.numel() for _, parameter in run.trainable())
    sum((parameter.float() ** 2).sum() for _, parameter in run.trainable()).backward()  # type: ignore[union-attr]
    found = {"gradient": _gradient_bytes(run, optimizer)}
    optimizer.step()
    for entries in optimizer.state.values():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                part = key.removesuffix("_scale")
                found[part] = found.get(part, 0) + value.nbytes
    weights = sum(parameter.nbytes for _, parameter in run.trainable())
    has_master = "master" in found
    found["master" if not has_master else "computed with"] = weights
    return {part: round(size / count, 3) for part, size in found.items()}


def _gradient_bytes(run: Run, optimizer: torch.optim.Optimizer) -> int:
    stored = stored_gradients_of(optimizer)
    if stored is not None:
        return sum(tensor.nbytes for tensor in stored.tensors())
    return sum(parameter.grad.nbytes for _, parameter in run.trainable() if parameter.grad is not None)


def summary(runs: dict[str, dict[str, float]], seeds: int) -> dict[str, Any]:
    """Compare every variant with the reference, seed by seed."""
    if any(f"bf16 {seed}" not in runs for seed in range(seeds)):
        return {}
    reference = [runs[f"bf16 {seed}"]["loss"] for seed in range(seeds)]
    noise = statistics.stdev(reference)
    table = {}
    complete = [each for each in VARIANTS if all(f"{each} {seed}" in runs for seed in range(seeds))]
    for variant in complete:
        losses = [runs[f"{variant} {seed}"]["loss"] for seed in range(seeds)]
        differences = [loss - plain for loss, plain in zip(losses, reference, strict=True)]
        mean = statistics.mean(differences)
        table[variant] = {
            "losses": [round(loss, 4) for loss in losses],
            "difference": round(mean, 4),
            "standard_error": round(statistics.stdev(differences) / seeds**0.5, 4),
            "within_noise": abs(mean) <= noise,
            "paper": PAPER.get(variant),
        }
    return {"noise": round(noise, 4), "variants": table}


def main() -> None:
    """Run what is not there yet and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80)
    options = parser.parse_args()
    kept = json.loads(options.json.read_text()) if options.json.is_file() else {}
    runs: dict[str, dict[str, float]] = kept.get("runs", {}) if kept.get("steps") == options.steps else {}
    found: dict[str, Any] = {"torch": torch.__version__, "steps": options.steps}
    counted = kept.get("bytes_per_parameter") or {variant: bytes_of(variant) for variant in BYTES_OF}
    found["bytes_per_parameter"] = counted
    data: list[Prepared] = []
    for variant in VARIANTS:
        for seed in range(options.seeds):
            if f"{variant} {seed}" not in runs:
                with tempfile.TemporaryDirectory() as name:
                    runs[f"{variant} {seed}"] = train(variant, seed, options.steps, Path(name), data)
                print(f"{variant} {seed}: {runs[f'{variant} {seed}']['loss']:.4f}", flush=True)
            found |= summary(runs, options.seeds) | {"runs": runs}
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"noise (standard deviation of bf16 over seeds): {found['noise']}")
    for variant, row in found["variants"].items():
        error = f"{row['difference']:+.4f} +- {row['standard_error']:.4f}"
        print(f"{variant:24} {error}  within noise: {row['within_noise']}")
    print(json.dumps(found["bytes_per_parameter"], indent=1))


if __name__ == "__main__":
    main()
