"""Modules that stand in for transformers' own in a decoder block, with the same children under the same names.

A replacement is made for known families whose modules have the known children and options, and is compared with the
original when a run is built (`methods.fused`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from tunewise.layers.attention import DocumentLayout
from tunewise.layers.fused import FusedRMSNorm, can_compute
from tunewise.layers.linear import compute_dtype, is_linear
from tunewise.layers.lora import LoRALinear
from tunewise.layers.native import SUFFIXES
from tunewise.layers.products import attend
from tunewise.layers.siblings import gated_mlp, siblings
from tunewise.layers.twins import Twin

_SILU = (nn.SiLU, type(ACT2FN["silu"]))

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Phi3", "Granite")
"""How the names of modules begin whose norms, MLPs and attentions are the plain ones (transformers 5.23)."""

MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "granite"})
"""The same families as transformers' configurations name them; relatives ("qwen2_moe") have other modules."""

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class FusedMLP(Twin):
    """down(silu(gate(x)) * up(x)), with the layers of the MLP that stood here."""

    def __init__(self, original: Any) -> None:
        super().__init__(original)
        self.gate_proj, self.up_proj, self.down_proj = original.gate_proj, original.up_proj, original.down_proj

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (..., hidden_size) to the same."""
        return gated_mlp(hidden_states, self.gate_proj, self.up_proj, self.down_proj)


class FusedAttention(Twin):
    """Projections, rotary positions and attention per document in the compiled kernels.

    Where a mask or a cache is given (generating), or the numbers are no fp32 or bf16 of the CPU, the module that stood
    here computes.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    head_dim: int

    def __init__(self, original: Any, documents: DocumentLayout) -> None:
        super().__init__(original)
        for name, child in original.named_children():
            setattr(self, name, child)
        self.documents = documents
        self.head_dim, self.scaling = original.head_dim, original.scaling
        self.layer_idx, self.config, self.is_causal = original.layer_idx, original.config, True
        reads_config = type(original).__name__.startswith("Mistral")  # where other families keep it in the module
        self.window = getattr(original.config if reads_config else original, "sliding_window", None)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return ((R, L, hidden_size), None)."""
        rows, width, _ = hidden_states.shape
        kernels = self.documents.kernels
        is_plain = attention_mask is None and past_key_values is None and self.documents.is_for(rows, width)
        is_plain = is_plain and position_embeddings[0].shape[-1] == self.head_dim
        is_known = can_compute(hidden_states) and compute_dtype(hidden_states) in SUFFIXES
        if kernels is None or not is_plain or not is_known:
            computed: tuple[Tensor, Tensor | None] = self.original()(
                hidden_states, position_embeddings, attention_mask, past_key_values=past_key_values, **kwargs
            )
            return computed
        query, key, value = siblings(hidden_states, (self.q_proj, self.k_proj, self.v_proj))
        cos_TD, sin_TD = (self._per_token(part, rows, query.dtype) for part in position_embeddings)
        plan = self.documents.plan(query, rows, width)
        heads = (query.shape[-1] // self.head_dim, key.shape[-1] // self.head_dim, self.head_dim)
        query_TX, key_TX, value_TX = (part.flatten(0, 1) for part in (query, key, value))
        rotary = (cos_TD, sin_TD)
        output_TX = attend(query_TX, key_TX, value_TX, plan, heads, self.scaling, self.window or 0, rotary)
        (output,) = siblings(output_TX.view(rows, width, -1), (self.o_proj,))
        return output, None

    @staticmethod
    def _per_token(part: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
        """Return cos or sin for every token, (T, D); models give one row of positions where all rows have the same."""
        return part.expand(rows, -1, -1).flatten(0, 1).to(dtype).contiguous()


def fused_twin(module: Any, documents: DocumentLayout | None) -> nn.Module | None:
    """Return a replacement for a norm, an MLP or an attention whose parts are the known ones, else None.

    Args:
        module: of a decoder.
        documents: the run's layout, where attention may be replaced.
    """
    if not type(module).__name__.startswith(FAMILIES):
        return None
    children = dict(module.named_children())
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if type(module).__name__.endswith("RMSNorm") and isinstance(weight, nn.Parameter) and isinstance(eps, float):
        return FusedRMSNorm(weight, eps, module) if weight.ndim == 1 and not children else None
    linear = all(is_linear(child) or isinstance(child, LoRALinear) for n, child in children.items() if n != "act_fn")
    if set(children) in ({"gate_proj", "up_proj", "down_proj", "act_fn"}, {"gate_proj", "up_proj", "down_proj"}):
        is_silu = isinstance(getattr(module, "act_fn", None), _SILU)
        return FusedMLP(module) if linear and is_silu else None
    if documents is not None and set(children) == set(_PROJECTIONS) and linear:
        known = all(hasattr(module, name) for name in ("head_dim", "scaling", "layer_idx", "config"))
        return FusedAttention(module, documents) if known and module.head_dim % 2 == 0 else None
    return None
