"""Which attention computes the model, and that packed documents never see each other."""

from __future__ import annotations

import itertools
from typing import ClassVar, Literal

import torch
from torch import nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from tunewise.errors import Conflict
from tunewise.layers.attention import per_document_attention
from tunewise.layers.head import base_model_of
from tunewise.methods.method import Run
from tunewise.recipe import Fidelity, Method, Recipe, Slot

AttentionKind = Literal["per_document", "sdpa", "eager", "flash"]

_registered = itertools.count()
"""Each run registers its attention under a name of its own: transformers' registry is global, a layout is a
run's."""

_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
"""Layer types that say what they attend to by their arguments alone; others (chunked, linear) need
transformers' masks."""


_WITH_SINKS = {
    "deepseek_v4", "flint", "gpt_oss", "granite_swa", "granitemoe_swa", "hy_v4", "mimo_v2_flash",
}  # fmt: skip
"""Model types whose softmax has a learnt sink, which attention per document has not (transformers 5.23)."""

_UNAWARE_OF_POSITIONS = {"falcon", "opt"}
"""Model types that make no block-diagonal mask of restarting positions and take one ready-made (transformers
5.23)."""


def default_attention_kind(
    model: type[PreTrainedModel] | PreTrainedModel, config: PretrainedConfig | None = None
) -> AttentionKind:
    """Return the best kind that a model supports: per_document, else sdpa, else eager.

    Args:
        model: the model, or its class.
        config: of a class; without it only the class is asked, not what kinds of layers this model has.
    """
    config = config or getattr(model, "config", None)
    is_plain = config is None or not (_foreign_layers(config) or config.model_type in _WITH_SINKS)
    if model._supports_attention_backend and is_plain:
        return "per_document"
    return "sdpa" if model._supports_sdpa else "eager"


def _foreign_layers(config: PretrainedConfig) -> list[str]:
    """Return the layer types of a configuration that attention per document knows nothing of."""
    return sorted(set(getattr(config.get_text_config(), "layer_types", None) or ()) - _KNOWN_LAYERS)


class Attention(Method):
    """How attention is computed.

    Formula: softmax(q k^T / sqrt(d) + mask) v, causal and inside a document.

    Source: Vaswani et al. 2017 (arXiv 1706.03762); Dao et al. 2022, "FlashAttention" (2205.14135), whose kernels
    torch's SDPA has. When to use: to compare kinds, or where the default does not know a model; `per_document`
    beside packing. When not: nothing is wrong with the default; `eager` keeps the matrix of all pairs of positions.

    Attributes:
        kind: "per_document", our own, which takes packed rows without a mask; "sdpa" or "eager",
            transformers' own, which mask the other documents of a packed row; "flash", FlashAttention-2 (the
            package flash-attn, CUDA).
    """

    name: ClassVar[str] = "attention"
    slot: ClassVar[Slot] = Slot.ATTENTION
    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING

    kind: AttentionKind = "per_document"

    def conflict(self, recipe: Recipe) -> str | None:
        """Virtual tokens in front of each row are no part of our layout of documents."""
        peft = next((method for method in recipe.methods or () if method.name == "peft"), None)
        if self.kind == "per_document" and getattr(peft, "is_prompt_learning", False):
            return (
                "attention per_document knows nothing of the virtual tokens that this peft method puts in "
                "front; use attention: {kind: sdpa}"
            )
        return None

    def apply(self, run: Run) -> None:
        """Set the model's attention.

        Raises:
            Conflict: the model or this machine cannot do it, or packed documents would see each other.
        """
        model = base_model_of(run.model)
        if self.kind == "per_document":
            _check_supported(model)
            name = f"tunewise_per_document_{next(_registered)}"
            use_varlen = run.device.type == "cuda" and (run.is_dry or _has_flash_kernel(run.device))
            AttentionInterface.register(name, per_document_attention(run.documents, use_varlen))
            model.set_attn_implementation(name)
        elif self.kind == "flash":
            _check_flash(run)
            _set(model, "flash_attention_2")
        else:
            _set(model, self.kind)
            config = model.config.get_text_config()
            if config.model_type in _UNAWARE_OF_POSITIONS and not getattr(config, "alibi", False):
                run.documents.mask_dtype = torch.bool if self.kind == "sdpa" else torch.float32
        if run.layout.row_tokens is not None:
            _refuse_recurrence(model)
        if run.layout.row_tokens is not None and not run.is_dry and documents_touch(run):
            raise Conflict(
                f"With attention: {self.kind}, {type(model).__name__} lets a packed document see the one "
                "before it. " + _instead_of_packing(self.kind, default_attention_kind(model))
            )


@torch.no_grad()
def documents_touch(run: Run) -> bool:
    """Say whether the second document of a packed row feels a change in the first one; a forward pass of 12
    tokens."""
    model = base_model_of(run.model)
    vocab_size = model.config.get_text_config().vocab_size
    token_ids = torch.arange(1, 13, device=run.device)
    others = torch.where(torch.arange(12, device=run.device) < 5, token_ids + 20, token_ids)
    position_ids = torch.cat([torch.arange(5), torch.arange(7)]).to(run.device)[None]
    was_training, lengths = run.model.training, run.documents.lengths
    run.model.eval()
    run.documents.lengths = ((5, 7),)
    autocast = torch.autocast(run.device.type, run.autocast_dtype, enabled=run.autocast_dtype is not None)
    try:
        with autocast:
            second, again = (
                model.base_model(
                    input_ids=ids[None] % vocab_size,
                    attention_mask=run.documents.mask(position_ids),
                    position_ids=position_ids,
                    use_cache=False,
                )
                .last_hidden_state[0, 5:]
                .float()
                for ids in (token_ids, others)
            )
    finally:
        run.documents.lengths = lengths
        run.model.train(was_training)
    # Both passes have the same shapes, so only a mixture of experts rounds differently; a leak is of the
    # order of 1.
    is_16_bit = run.autocast_dtype is not None or run.storage_dtype.itemsize == 2
    tolerance = 1e-2 if is_16_bit else 1e-5
    return bool((second - again).abs().max() > tolerance * second.abs().max())


def _instead_of_packing(kind: AttentionKind, best: AttentionKind) -> str:
    return "Leave packing out." if kind == best else f"Use attention: {{kind: {best}}}, or leave packing out."


def _refuse_recurrence(model: PreTrainedModel) -> None:
    """State spaces and convolutions over positions know no documents: what one leaves behind enters the next."""
    mixer = next((name for name, module in model.named_modules() if isinstance(module, nn.Conv1d)), None)
    if mixer is not None:
        raise Conflict(
            f"{type(model).__name__} carries a state from position to position ('{mixer}'), so a packed document would "
            "feel the one before it. Leave packing out."
        )


def _check_supported(model: PreTrainedModel) -> None:
    name = type(model).__name__
    instead = "sdpa" if model._supports_sdpa else "eager"
    if not model._supports_attention_backend:
        raise Conflict(
            f"{name} computes its attention itself, not through transformers' AttentionInterface, so it "
            f"cannot attend per document. Use attention: {{kind: {instead}}}."
        )
    config: PretrainedConfig = model.config.get_text_config()
    foreign = _foreign_layers(config)
    if foreign:
        raise Conflict(
            f"{name} has layers of the type '{foreign[0]}', whose mask attention per document does not know. "
            f"Use attention: {{kind: {instead}}}."
        )
    if getattr(config, "use_bidirectional_attention", None):
        raise Conflict(f"{name} attends in both directions here. Use attention: {{kind: {instead}}}.")


def _check_flash(run: Run) -> None:
    if run.device.type != "cuda":
        raise Conflict("attention: flash needs a CUDA device. Use attention: {kind: per_document}.")
    if not is_flash_attn_2_available():
        raise Conflict(
            "attention: flash needs the package flash-attn, which is not installed (pip install flash-attn "
            "--no-build-isolation). attention: {kind: per_document} uses the flash kernels that torch brings "
            "along."
        )
    rows = max(run.layout.micro_batch_size, run.recipe.evaluation.micro_batch_size or 1)
    if run.layout.row_tokens is not None and rows > 1:
        raise Conflict(
            "attention: flash separates packed documents only when a micro-batch is one row (transformers "
            "reads them from position_ids of batch size 1). Set batch.micro_batch_size and "
            "evaluation.micro_batch_size to 1, or use attention: {kind: per_document}."
        )


def _set(model: PreTrainedModel, implementation: str) -> None:
    """Ask transformers for one of its own implementations; it raises, or only warns, when the model has not
    got it."""
    problem = f"{type(model).__name__} has no '{implementation}' attention"
    if model.config._attn_implementation == implementation:
        return
    try:
        model.set_attn_implementation(implementation)
    except (ValueError, ImportError) as error:
        instead = default_attention_kind(model)
        reason = str(error).splitlines()[0]
        raise Conflict(f"{problem}: {reason} Use attention: {{kind: {instead}}}.") from error
    if _present(model) != implementation:
        raise Conflict(f"{problem}; it stays with '{_present(model)}'.")


def _present(model: PreTrainedModel) -> str:
    return str(model.config._attn_implementation)


def _has_flash_kernel(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)
