"""One DyLoRA run against a LoRA run of the largest rank, cut: the validation loss at every rank, over several seeds.

    python benchmarks/dylora/run.py --json OUT [--seeds 3] [--steps 60] [--seconds N]

The embedded model learns from the standard library's docstrings. A DyLoRA of rank 16 (the paper's scale alpha / b, and
the constant scale), and a LoRA of rank 16 in the same number of steps, are evaluated at ranks 1 to 16. The LoRA is
cut in two ways: its first ranks, as DyLoRA's; and the best approximation of its update by singular values, which
nobody gets without work. LoRAs that were trained at the small ranks are what one run has to replace. Finished
trainings are kept beside OUT; with --seconds no training begins after so long, and the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunewise import api
from tunewise.engine.evaluate import validation_loss
from tunewise.engine.run_folder import versions
from tunewise.layers.dylora import DyLoRALinear
from tunewise.layers.lora import LoRALinear, lora_layers
from tunewise.methods.method import Run
from tunewise.reproduce.qdylora import cut_first

RANK = 16
RANKS = (1, 2, 4, 8, 16)
UNFINISHED = 75
"""Exit code: the same command goes on (EX_TEMPFAIL of sysexits.h)."""

ARMS: dict[str, dict[str, Any]] = {
    "dylora": {"dylora": {"rank": RANK}},
    "dylora, constant scale": {"dylora": {"rank": RANK, "scale_by_rank": False}},
    "lora r16": {"lora": {"rank": RANK, "alpha": RANK}},
    "lora r1": {"lora": {"rank": 1, "alpha": 1}},
    "lora r4": {"lora": {"rank": 4, "alpha": 4}},
}
"""What is trained; every scale at full rank is 1."""


def recipe(arm: str, seed: int, steps: int) -> dict[str, Any]:
    """Return the recipe of an arm."""
    return {
        "model": "embedded",
        "data": {"source": "stdlib", "max_records": 600, "max_length": 256},
        "methods": {**ARMS[arm], "packing": {"row_tokens": 512}, "precision": {"compute": "fp32"}},
        "batch": {"documents": 16, "micro_batch_size": 4},
        "training": {"steps": steps, "learning_rate": 2e-3},
        "evaluation": {"every": steps, "keep_best": False, "max_documents": 60},
        "checkpoints": {"every": steps},
        "device": "cpu",
        "seed": seed,
    }


@torch.no_grad()
def cut_best(layer: LoRALinear, rank: int) -> LoRALinear:
    """Return the layer of this rank that is nearest to the whole update."""
    cut = LoRALinear(layer.base_layer, rank, layer.scale)
    left, singular, right = torch.linalg.svd(layer.lora_B.weight @ layer.lora_A.weight, full_matrices=False)
    cut.lora_A.weight.copy_(singular[:rank, None].sqrt() * right[:rank])
    cut.lora_B.weight.copy_(left[:, :rank] * singular[:rank].sqrt())
    return cut


def losses_by_rank(folder: Path) -> dict[str, dict[int, float]]:
    """Return the validation losses of a finished run, cut to every rank in both ways."""
    run, plan = api._trained(folder, folder / "none")
    layers = lora_layers(run.model)
    most = next(iter(layers.values())).rank
    found: dict[str, dict[int, float]] = {}
    for way, cut in (("first", cut_first), ("best", cut_best)):
        found[way] = {}
        for rank in (rank for rank in RANKS if rank <= most):
            for name, layer in layers.items():
                run.model.set_submodule(name, cut(layer, rank))
            found[way][rank] = evaluate(run, plan.data.validation)
        if isinstance(next(iter(layers.values())), DyLoRALinear):
            break
    return found


def evaluate(run: Run, validation: Any) -> float:
    """Return the validation loss of what is in the run now."""
    assert isinstance(run.model, nn.Module)
    documents = list(range(min(60, len(validation))))
    loss = validation_loss(run, validation, documents, run.layout)
    assert loss is not None
    return loss


def summarize(losses: dict[str, dict[int, dict[str, dict[int, float]]]]) -> dict[str, Any]:
    """Return means and deviations over seeds, and by how much DyLoRA is below the cut LoRA."""
    table: dict[str, dict[int, list[float]]] = {}
    for arm, seeds in losses.items():
        for ways in seeds.values():
            for way, ranks in ways.items():
                for rank, loss in ranks.items():
                    table.setdefault(f"{arm}, {way} ranks", {}).setdefault(rank, []).append(loss)
    means = {
        arm: {rank: [round(statistics.mean(found), 4), round(statistics.stdev(found) if len(found) > 1 else 0.0, 4)]
              for rank, found in ranks.items()}
        for arm, ranks in table.items()
    }  # fmt: skip
    return {"mean_and_deviation": means}


def main() -> int:
    """Train what is not there yet, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="OUT")
    parser.add_argument("--folder", type=Path, help="where runs are kept; default: beside OUT")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seconds", type=float)
    arguments = parser.parse_args()
    home = arguments.folder or arguments.json.with_suffix(".runs")
    started, losses = time.monotonic(), dict[str, dict[int, dict[str, dict[int, float]]]]()
    for seed in range(arguments.seeds):
        for arm in ARMS:
            folder = home / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}-{arguments.steps}"
            kept = folder / "losses_by_rank.json"
            if not kept.is_file():
                if arguments.seconds is not None and time.monotonic() - started > arguments.seconds:
                    print("not finished; call again to go on")
                    return UNFINISHED
                if not (folder / "adapter").is_dir():
                    api.train(recipe(arm, seed, arguments.steps), out=folder)
                kept.write_text(json.dumps(losses_by_rank(folder)), encoding="utf-8")
                print(f"{time.monotonic() - started:6.1f} s {arm}, seed {seed}", flush=True)
            content = json.loads(kept.read_text(encoding="utf-8"))
            losses.setdefault(arm, {})[seed] = {
                way: {int(rank): loss for rank, loss in ranks.items()} for way, ranks in content.items()
            }
    result = {
        "command": "python benchmarks/dylora/run.py " + " ".join(sys.argv[1:]),
        **summarize(losses),
        "losses": losses,
        "versions": versions(),
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for arm, ranks in result["mean_and_deviation"].items():
        print(
            f"{arm:32}", "  ".join(f"r{rank} {mean:.4f}±{deviation:.4f}" for rank, (mean, deviation) in ranks.items())
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
