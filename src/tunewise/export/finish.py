"""What a training leaves behind: the adapter or the model, saved, read again and compared with what was trained.

A saved file is believed only after reading it again: its tensors equal the trained ones, some `lora_B` is not zero,
tied weights are tied, and the logits on a probe are those of the run. Nothing appears under its final name before.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tunewise.engine.checkpoint import storage_errors
from tunewise.engine.step import autocast
from tunewise.errors import InputError, VerificationError
from tunewise.export.adapter import WEIGHTS, load_adapter, save_adapter, save_peft
from tunewise.export.merge import merge_adapters
from tunewise.export.parameters import load_parameters, save_parameters
from tunewise.export.parts import Part, parts_of
from tunewise.export.quantized import load_quantized, save_quantized
from tunewise.layers.dylora import cut_dylora
from tunewise.layers.head import base_model_of
from tunewise.layers.lora import lora_layers
from tunewise.layers.twins import own_modules
from tunewise.methods.bottleneck import BottleneckAdapter
from tunewise.methods.dylora import DyLoRA
from tunewise.methods.lora import LoRA
from tunewise.methods.low_rank import LowRank
from tunewise.methods.method import Run
from tunewise.methods.qalora import QALoRA
from tunewise.recipe import ModelSpec
from tunewise.workload.model import load_config, load_model, locate, quiet_transformers

PROBE_TOKENS = 32
"""How many positions the logits are compared on."""

MERGE_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 8e-2, torch.float16: 2e-2}
"""How far the logits of a merged model may be from the unmerged ones', relative to their largest: the dtype's rounding
of the merged weights, through all layers."""


@dataclass(frozen=True)
class Saved:
    """What was saved: "adapter" or "model", where, and the largest relative difference of logits after reading it."""

    kind: str
    folder: Path
    max_difference: float


def save_result(run: Run, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Saved:
    """Save what `run` trained: `adapter/` when it trained an adapter, else `model/`.

    Raises:
        VerificationError: what was read again differs from what was trained; the files stay for inspection.
        StorageError: the disk is full or read-only.
    """
    run.model.eval()
    run.documents.lengths = None  # the probe is one document
    parts = parts_of(run)
    if parts:
        return _save_verified(folder / "adapter", "adapter", lambda place: _save_parts(run, parts, tokenizer, place))
    _undo_padding(run)
    return _save_verified(folder / "model", "model", lambda place: _save_model(run, run.model, tokenizer, place))


def save_cut(run: Run, rank: int, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Saved:
    """Save the first `rank` ranks of what DyLoRA trained as an ordinary LoRA adapter; the run is used up.

    Raises:
        VerificationError: what was read again differs from what was trained.
        StorageError: the disk is full or read-only.
    """
    method = cut_run(run, rank)
    run.model.eval()
    run.documents.lengths = None  # the probe is one document
    parts = parts_of(run)
    if len(parts) > 1:
        raise InputError(f"This run trained {' and '.join(parts)} together; one rank of it is no adapter by itself.")
    names = parts["lora"]
    return _save_verified(folder, "adapter", lambda place: _save_lora(run, method, tokenizer, place, names))


def cut_run(run: Run, rank: int) -> LoRA:
    """Turn the DyLoRA layers of a run into LoRA layers of their first `rank` ranks; return the method that they are.

    Raises:
        InputError: the run did not train DyLoRA, or not so many ranks.
    """
    method = run.recipe.get(DyLoRA)
    if method is None:
        raise InputError("Only what 'dylora' trained can be cut to a rank; this run trained something else.")
    if not 1 <= rank <= method.rank:
        raise InputError(f"rank {rank}: this run trained the ranks 1 to {method.rank}.")
    cut_dylora(run.model, rank)
    layer = next(iter(lora_layers(run.model).values()))
    shared = method.model_dump(include={"dropout", "target_modules", "exclude_modules", "modules_to_save"})
    return LoRA(rank=rank, alpha=layer.scale * rank, layers_to_transform=method.layers_to_transform, **shared)


def save_merged(run: Run, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Saved:
    """Merge `run`'s adapter into its base and save one model; the run is used up.

    Raises:
        VerificationError: the merged model's logits differ from the trained one's by more than rounding.
        StorageError: the disk is full or read-only.
    """
    run.model.eval()
    run.documents.lengths = None  # the probe is one document
    _undo_padding(run)
    trained_TV = probe_logits(run.model, run)
    merged = merge_adapters(run)
    difference = relative_difference(probe_logits(merged, run), trained_TV)
    tolerance = MERGE_TOLERANCE[run.storage_dtype]
    if difference > tolerance:
        raise VerificationError(
            f"Merging changed the logits by {difference:.1e} (relative), more than rounding explains ({tolerance:.0e})."
        )
    save = _save_quantized if run.recipe.get(QALoRA) is not None else _save_model
    return _save_verified(folder, "model", lambda place: save(run, merged, tokenizer, place))


def _undo_padding(run: Run) -> None:
    """A saved model has its own vocabulary."""
    if run.undo_padding is not None:
        run.undo_padding()
        run.undo_padding = None


@torch.no_grad()
def probe_logits(model: nn.Module, run: Run) -> Tensor:
    """Return fp32 logits (T, V) of fixed pseudo-random tokens; equal models give equal logits.

    `model` is the run's, or one made of it; it computes in the run's precision.
    """
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    generator = torch.Generator().manual_seed(0)
    ids_RL = torch.randint(0, config.vocab_size, (1, PROBE_TOKENS), generator=generator).to(run.device)
    with autocast(run):
        logits: Tensor = model(input_ids=ids_RL, use_cache=False).logits
    return logits[0, -PROBE_TOKENS:].float().cpu()


def relative_difference(one_TV: Tensor, other_TV: Tensor) -> float:
    """Return the largest difference of two logits, relative to the largest logit that is finite.

    A padded vocabulary has logits of minus infinity in fp16; on both sides they are equal.
    """
    difference_TV = (one_TV - other_TV).abs().masked_fill(one_TV == other_TV, 0.0)
    largest = other_TV.masked_fill(~other_TV.isfinite(), 0.0).abs().max()
    return float(difference_TV.max() / largest.clamp_min(1e-12))


def _save_verified(folder: Path, kind: str, save: Callable[[Path], float]) -> Saved:
    """Let `save` write and verify a folder aside, then give it its name; an older result makes room first."""
    aside, old = folder.with_name(f".partial-{folder.name}"), folder.with_name(f".old-{folder.name}")
    with storage_errors(f"cannot save to {folder}", kept=" The checkpoints are untouched; resume to save again."):
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        difference = save(aside)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    return Saved(kind, folder, difference)


def _save_parts(run: Run, parts: dict[Part, list[str]], tokenizer: PreTrainedTokenizerBase, place: Path) -> float:
    """Save each part, a single one in `place` itself."""
    difference = 0.0
    for part, names in parts.items():
        folder = place if len(parts) == 1 else place / part
        if part == "lora":
            difference = max(difference, _save_lora(run, _low_rank_of(run), tokenizer, folder, names))
        elif part == "parameters":
            difference = max(difference, _save_parameters(run, tokenizer, folder, names))
        else:
            save_peft(run.model, folder)
            _compare_tensors(folder)
    return difference


def _low_rank_of(run: Run) -> LowRank:
    method = run.recipe.get(LowRank)
    assert method is not None, "a part 'lora' has a method that made it"
    return method


def _save_parameters(run: Run, tokenizer: PreTrainedTokenizerBase, place: Path, names: list[str]) -> float:
    model = base_model_of(run.model)
    ids = {id(parameter) for name, parameter in run.trainable() if name in names}
    inner = [name for name, parameter in model.named_parameters() if id(parameter) in ids]
    save_parameters(model, inner, run.recipe.get(BottleneckAdapter), place, locate(run.recipe.model.name))
    _save_tokenizer(tokenizer, place)
    return _compare_after_reading(run, names, lambda: load_parameters(model, place))


def _save_lora(run: Run, method: LowRank, tokenizer: PreTrainedTokenizerBase, place: Path, names: list[str]) -> float:
    model = base_model_of(run.model)
    save_adapter(model, method, place, locate(run.recipe.model.name))
    _save_tokenizer(tokenizer, place)
    layers = lora_layers(model).values()
    if not any(bool(layer.lora_B.weight.any()) for layer in layers):
        raise VerificationError("Every lora_B is zero: the adapter has learnt nothing (is the learning rate zero?).")
    if isinstance(method, LoRA) and method.init == "pissa":
        return _compare_tensors(place)  # written as a LoRA of twice the rank, so it does not fit into these layers
    return _compare_after_reading(run, names, lambda: load_adapter(model, place))


def _compare_after_reading(run: Run, names: list[str], read: Callable[[], object]) -> float:
    """Set the parameters `names` to zero, let `read` fill them, and compare them and the logits with what was there."""
    parameters = {name: parameter for name, parameter in run.trainable() if name in set(names)}
    trained = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    before_TV = probe_logits(run.model, run)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.zero_()
    try:
        read()
        differing = [name for name, parameter in parameters.items() if not torch.equal(parameter, trained[name])]
        difference = relative_difference(probe_logits(run.model, run), before_TV)
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(trained[name])
    if differing or difference != 0.0:
        raise VerificationError(
            f"The saved adapter differs from the trained one, first in {(differing or ['logits'])[0]}."
        )
    return difference


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, place: Path) -> None:
    try:
        tokenizer.save_pretrained(place)
    except Exception as error:  # tokenizers 0.22 raises a bare Exception on a full disk; every other kind goes on
        if type(error) is not Exception:
            raise
        raise OSError(errno.ENOSPC, str(error)) from error


def _compare_tensors(place: Path) -> float:
    """Check that an adapter file can be read and holds something that is finite and not all zero."""
    try:
        with safe_open(place / WEIGHTS, framework="pt") as file:
            tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise VerificationError(f"The saved adapter cannot be read again: {error}") from error
    if not any(bool(tensor.any()) for tensor in tensors):
        raise VerificationError("The saved adapter holds nothing but zeros.")
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise VerificationError("The saved adapter holds numbers that are not finite.")
    return 0.0


def _save_quantized(run: Run, model: nn.Module, tokenizer: PreTrainedTokenizerBase, place: Path) -> float:
    """Save a merged model that is still quantized."""
    assert isinstance(model, PreTrainedModel)
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with own_modules(model):
        save_quantized(model, place)
        _save_tokenizer(tokenizer, place)
        again = load_quantized(place).to(run.device)
        again.set_attn_implementation("eager")
        difference = relative_difference(probe_logits(again, run), probe_logits(model, run))
    model.set_attn_implementation(implementation)
    if difference > 0.0:
        raise VerificationError(
            f"The saved model's logits differ from the trained one's by {difference:.1e} (relative)."
        )
    return difference


def _save_model(run: Run, model: nn.Module, tokenizer: PreTrainedTokenizerBase, place: Path) -> float:
    """Save a whole model in one dtype: that of its most precise weights, so that nothing trained is rounded."""
    assert isinstance(model, PreTrainedModel)
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    dtype = max(dtypes, key=lambda dtype: dtype.itemsize)
    if len(dtypes) > 1:
        model.to(dtype)
    before_TV = probe_logits(model, run)
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the run's own attention means nothing to who loads the model
    with quiet_transformers(str(place.parent)), own_modules(model):
        model.save_pretrained(place)
    _save_tokenizer(tokenizer, place)
    model.set_attn_implementation(implementation)
    spec = ModelSpec(name=str(place.resolve()), trust_remote_code=run.recipe.model.trust_remote_code)
    again = load_model(spec, load_config(spec), dtype, seed=0).to(run.device).eval()
    again.set_attn_implementation("eager")
    model.set_attn_implementation("eager")
    with own_modules(model):  # compiled kernels round otherwise
        eager_TV = probe_logits(model, run)
    difference = relative_difference(probe_logits(again, run), eager_TV)
    model.set_attn_implementation(implementation)
    if difference > 0.0:
        raise VerificationError(
            f"The saved model's logits differ from the trained one's by {difference:.1e} (relative)."
        )
    tied = model.config.get_text_config().tie_word_embeddings
    head = again.get_output_embeddings()
    if tied and head is not None and head.weight is not again.get_input_embeddings().weight:
        raise VerificationError("The saved model's embedding and head are not tied any more.")
    return relative_difference(eager_TV, before_TV)
