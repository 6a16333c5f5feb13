"""Recipe -> everything that a training (or a measurement) needs, in the order in which it depends on each other.

device -> configuration -> defaults -> tokenizer -> data -> number of steps -> weights -> run
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tunewise.engine.asking import AskedBase
from tunewise.engine.build import build
from tunewise.engine.schedule import total_steps
from tunewise.errors import Conflict
from tunewise.layers import native
from tunewise.methods.compatibility import refuse_conflicts
from tunewise.methods.defaults import choose_device, complete, complete_intervals, default_kernels
from tunewise.methods.low_rank import LowRank
from tunewise.methods.method import Run
from tunewise.methods.precision import Precision
from tunewise.methods.streaming import Stream
from tunewise.recipe import Recipe, Slot
from tunewise.workload.batches import GlobalBatches
from tunewise.workload.corpus import Corpus
from tunewise.workload.diagnosis import Diagnosis, Statistics
from tunewise.workload.mapped import load_mapped
from tunewise.workload.model import context_length, load_config, load_model, load_tokenizer, resize_vocabulary
from tunewise.workload.prepare import Prepared, prepare


@dataclass(frozen=True)
class Plan:
    """What is settled before any weight is loaded: the complete recipe, the data and the number of steps."""

    recipe: Recipe
    device: torch.device
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    data: Prepared
    num_steps: int


def settle(recipe: Recipe, data: Prepared | None = None) -> Plan:
    """Complete the recipe and prepare its data; cheap, and most of a user's mistakes show here.

    Args:
        recipe: what is to be done.
        data: the recipe's data where they were prepared before; None prepares them.

    Raises:
        InputError: recipe, model folder or data are wrong.
        Conflict: the recipe's methods contradict each other.
    """
    device = choose_device(recipe.device)
    config = load_config(recipe.model)
    recipe = complete(recipe, config, device)
    refuse_conflicts(recipe)
    tokenizer = load_tokenizer(recipe.model)
    if data is None:
        vocab_size = len(tokenizer) if recipe.model.resize_vocabulary else config.get_text_config().vocab_size
        context = context_length(config)
        base = AskedBase(recipe, tokenizer, context, lambda asked: _base_run(asked, config, device, tokenizer))
        data = prepare(recipe, tokenizer, context, max(vocab_size, 1), base)
    num_steps = total_steps(GlobalBatches(data.train, recipe.batch, recipe.seed), recipe.training)
    return Plan(complete_intervals(recipe, num_steps), device, config, tokenizer, data, num_steps)


def _base_run(
    recipe: Recipe, config: PretrainedConfig, device: torch.device, tokenizer: PreTrainedTokenizerBase
) -> Run:
    """Build a run of the base, which data are asked of before there are any."""
    none = Corpus.from_documents([], [])
    diagnosis = Diagnosis((), Statistics(0, 0, 0, 0, (), 0.0))
    data = Prepared(none, none, [], diagnosis, "")
    return assemble(Plan(complete(recipe, config, device), device, config, tokenizer, data, 0))


def assemble(plan: Plan) -> Run:
    """Load the weights and build the run that the plan's recipe describes.

    Raises:
        InputError: the weights are missing or damaged.
        Conflict: the recipe's methods contradict each other, this model or this device.
    """
    recipe = plan.recipe
    precision = recipe.get(Precision)
    assert precision is not None, "complete() fills the slot PRECISION"
    dtype, why_whole = precision.loading_dtype(recipe), None
    mapped = load_mapped(recipe.model, plan.config, dtype) if recipe.get(Stream) is not None else None
    if isinstance(mapped, PreTrainedModel):
        model = mapped
    else:
        model, why_whole = load_model(recipe.model, plan.config, dtype, recipe.seed), mapped
    if recipe.model.resize_vocabulary and len(plan.tokenizer) > model.get_input_embeddings().num_embeddings:
        _require_trained_embeddings(recipe)
        resize_vocabulary(model, len(plan.tokenizer))
    torch.manual_seed(recipe.seed)
    run = build(recipe, model, plan.device)
    kernels = default_kernels(recipe.methods or (), plan.config, plan.device)
    if kernels is not None and (reason := native.why_not()) is not None:
        run.say(f"without the compiled kernels, which are the default on a CPU: {reason}")
    if why_whole is not None:
        run.say(f"stream: all weights were in memory once while loading, because {why_whole}")
    torch.manual_seed(recipe.seed)  # what building drew from the generator must not depend on the methods
    return run


def _require_trained_embeddings(recipe: Recipe) -> None:
    """New rows of a vocabulary are noise until they are trained."""
    low_rank = recipe.get(LowRank)
    if recipe.in_slot(Slot.ADAPTER) and (low_rank is None or not low_rank.modules_to_save):
        raise Conflict(
            "model.resize_vocabulary adds tokens whose embeddings nobody trains: name the embedding and the head in "
            "methods.lora.modules_to_save (for Llama: [embed_tokens, lm_head]), or fine-tune without an adapter."
        )
