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
from pathlib import Path
from typing import Any

import torch

from tunewise.reproduce.optimizer_states import bytes_of, train

VARIANTS = (
    "bf16", "fp8_lm", "all fp32", "gradient fp8", "first moment fp8", "second moment fp8", "second moment fp8_e5m2",
    "second moment fp16", "master fp16", "master fp8", "adamw_8bit", "adamw_4bit", "adam_mini", "apollo",
)  # fmt: skip
"""Of `optimizer_states.VARIANTS`."""

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
    for variant in VARIANTS:
        for seed in range(options.seeds):
            if f"{variant} {seed}" not in runs:
                runs[f"{variant} {seed}"] = train(variant, seed, options.steps)
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
