"""What a run has saved, loaded again as a run: the files themselves are judged, not what was in memory."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from tunewise.engine.assemble import Plan, assemble
from tunewise.engine.build import build
from tunewise.errors import InputError
from tunewise.export.parts import load_adapter
from tunewise.methods.low_rank import LowRank
from tunewise.methods.method import Run
from tunewise.methods.precision import Precision
from tunewise.recipe import ModelSpec, Recipe, Slot
from tunewise.workload.model import load_config, load_model, load_tokenizer


def saved_run(plan: Plan, folder: Path) -> Run:
    """Return a run around what lies in a run folder's `adapter/` or `model/`.

    Raises:
        InputError: nothing was saved there, or it cannot be loaded.
    """
    recipe = plan.recipe
    if (folder / "model").is_dir():
        spec = recipe.model.model_copy(update={"name": str(folder / "model"), "weights": "pretrained"})
        return whole_model_run(recipe, spec, plan.device)
    if not (folder / "adapter").is_dir():
        raise InputError(f"There is no result in '{folder}': neither adapter/ nor model/. Finish the run first.")
    adapters = recipe.in_slot(Slot.ADAPTER)
    if len(adapters) == 1 and isinstance(adapters[0], LowRank) and getattr(adapters[0], "init", "") != "pissa":
        run = assemble(plan)
    else:  # what is saved has other sizes than what was trained (PiSSA), or brings its modules along
        run = whole_model_run(_without_adapters(recipe), recipe.model, plan.device)
        run.recipe = recipe
    run.model = load_adapter(run.model, folder / "adapter").eval()
    return run


def whole_model_run(recipe: Recipe, spec: ModelSpec, device: torch.device) -> Run:
    """Return a run of a complete recipe around the weights that `spec` names."""
    precision = recipe.get(Precision)
    assert precision is not None, "complete() fills the slot PRECISION"
    config = load_config(spec)
    model = load_model(spec, config, precision.loading_dtype(recipe), recipe.seed)
    return build(recipe, model, device)


def saved_tokenizer(plan: Plan, folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer that lies beside the result, or the plan's where none does (peft's adapters)."""
    for place in (folder / "adapter", folder / "model"):
        if any(place.glob("tokenizer*")):
            return load_tokenizer(ModelSpec(name=str(place)))
    return plan.tokenizer


def _without_adapters(recipe: Recipe) -> Recipe:
    kept = tuple(method for method in recipe.methods or () if method.slot != Slot.ADAPTER)
    return recipe.replace(methods=kept)
