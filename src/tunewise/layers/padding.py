"""Sizes rounded up to what matrix units like, with zeros that stay zeros: vocabulary and LoRA rank.

Vocabulary: the output head (and a tied embedding) gets rows of zeros and a bias that is 0 for real entries and so
negative for the others that their probability is 0 in any dtype; so is their gradient. Rank: A gets rows and B columns
of zeros, each of which multiplies the other's gradient, so both stay zero.

Shape suffixes: V vocabulary, D hidden size, O out_features, I in_features, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tunewise.errors import Conflict
from tunewise.layers.head import base_model_of
from tunewise.layers.linear import is_tied
from tunewise.layers.lora import LoRALinear

_NEVER = -1e9
"""Added to the logits of entries that do not exist; exp of it is 0, and fp16 makes it minus infinity."""


@torch.no_grad()
def pad_vocabulary(model: nn.Module, multiple: int) -> Callable[[], None] | None:
    """Pad the output head to a multiple, and return how to undo it; None when it is one already.

    Raises:
        Conflict: the head is no plain linear layer without bias, or its logits are capped.
    """
    base = base_model_of(model)
    head: Any = base.get_output_embeddings()
    if type(head) is not nn.Linear or len(list(head.parameters())) != 1:
        raise Conflict("pad.vocabulary: the output head is no plain linear layer without bias. Set it to null.")
    if getattr(base.config.get_text_config(), "final_logit_softcapping", None) is not None:
        raise Conflict("pad.vocabulary: this model caps its logits, so no padding can be excluded. Set it to null.")
    size = head.out_features
    missing = -size % multiple
    if not missing:
        return None
    embedding = base.get_input_embeddings() if is_tied(base) else None
    bias_V = head.weight.new_zeros(size + missing)
    bias_V[size:] = _NEVER
    _resize(head, embedding, torch.cat([head.weight, head.weight.new_zeros(missing, head.in_features)]))
    head.bias = nn.Parameter(bias_V, requires_grad=False)

    def undo() -> None:
        head.register_parameter("bias", None)
        _resize(head, embedding, head.weight.detach()[:size].clone())

    return undo


@torch.no_grad()
def pad_rank(layer: LoRALinear, multiple: int) -> int:
    """Pad a LoRA layer's factors to a multiple and return by how much; its scale stays, so its update does too."""
    missing = -layer.rank % multiple
    if missing:
        weight_RI, weight_OR = layer.lora_A.weight, layer.lora_B.weight
        weight_RI.data = torch.cat([weight_RI, weight_RI.new_zeros(missing, layer.in_features)])
        weight_OR.data = torch.cat([weight_OR, weight_OR.new_zeros(layer.out_features, missing)], dim=1)
    return missing


def _resize(head: nn.Linear, embedding: nn.Module | None, weight_VD: Tensor) -> None:
    head.weight.data = weight_VD
    head.out_features = len(weight_VD)
    if isinstance(embedding, nn.Embedding):
        embedding.num_embeddings = len(weight_VD)
