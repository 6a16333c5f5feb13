"""Does multiplying in 8 bits change what is learnt? The same seeds and records with and without, on the embedded model.

    python benchmarks/quality/int8_parity.py --json int8_parity.json

Arms: LoRA over the bf16 base; over an int8 base that is unpacked for every product (only the weights are rounded);
over the same base multiplied in 8 bits (the inputs' rows too, and the gradients'); with the output head multiplied so
as well (its gradients rounded at random). Every arm starts from the same factors and meets the same documents in the
same order. Judged are the differences of the validation loss to the first arm, seed by seed, against what another seed
alone changes."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from tunewise.engine.run_folder import versions
from tunewise.reproduce.learning import FUSED, arm, figures_of

ARMS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "int8 unpacked": {"quantize": {"kind": "int8"}},
    "int8 products": {"quantize": {"kind": "int8", "compute": "int8"}},
    "int8 head too": {"quantize": {"kind": "int8", "compute": "int8", "head_compute": "int8"}},
}


def main(arguments: argparse.Namespace) -> int:
    losses: dict[str, list[float]] = {name: [] for name in ARMS}
    first: dict[str, list[float]] = {name: [] for name in ARMS}
    for seed in range(arguments.seeds):
        for name, methods in ARMS.items():
            recipe = arm({"lora": {"rank": 8}, **FUSED, **methods}, seed=seed, steps=arguments.steps, rate=2e-3)
            figures = figures_of(recipe)
            losses[name].append(round(figures["loss"], 5))
            first[name].append(round(figures["first"], 5))
            print(f"seed {seed} {name:14} {figures['first']:.4f} -> {figures['loss']:.4f}", flush=True)
    summary: dict[str, Any] = {"seeds_standard_deviation": round(statistics.stdev(losses["bf16"]), 5)}
    for name in list(ARMS)[1:]:
        gaps = [ours - plain for ours, plain in zip(losses[name], losses["bf16"], strict=True)]
        summary[name] = {
            "mean_gap": round(statistics.mean(gaps), 5),
            "standard_error": round(statistics.stdev(gaps) / len(gaps) ** 0.5, 5),
            "gaps": [round(gap, 5) for gap in gaps],
        }
    result = {
        "summary": summary,
        "losses_before": first,
        "losses": losses,
        "setting": {"steps": arguments.steps, "seeds": arguments.seeds},
        "versions": versions(),
    }
    print(json.dumps(summary))
    arguments.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--json", type=Path, required=True)
    sys.exit(main(parser.parse_args()))
