"""Keep a pre-trained run as the embedded model: rounded to bf16, and judged once more on the held-out source text.

python examples/embedded/keep.py runs/embedded src/tunewise/embedded
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tunewise.engine.assemble import assemble, settle
from tunewise.engine.evaluate import validation_loss
from tunewise.methods.reading import load_recipe, recipe_from_mapping


def main(run_folder: Path, target: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(run_folder / "model", dtype=torch.bfloat16)
    model.save_pretrained(target)
    (target / "model.safetensors").chmod(0o644)
    mapping = load_recipe(run_folder / "recipe.yaml").to_mapping()
    mapping["model"] = {"name": str(target)}
    plan = settle(recipe_from_mapping(mapping))
    run = assemble(plan)
    documents = range(len(plan.data.validation))
    loss = validation_loss(run, plan.data.validation, documents, run.layout)
    num_bytes = (target / "model.safetensors").stat().st_size
    print(f"{num_bytes / 1e6:.1f} MB; validation loss {loss:.4f} nats per token over {len(documents)} held-out windows")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
