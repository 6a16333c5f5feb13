"""The mask that transformers makes for rows of one document each, where positions have no values to see that by.

With `sdpa` transformers looks at position_ids: where no row holds two documents it makes no mask at all and lets the
kernel be causal by itself. Fake positions cannot be looked at, so in a dry run it would always make the mask. The
layout knows better; this implementation differs from "sdpa" in nothing else.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

NAME = "tunewise_dry_sdpa"


def use_unpacked_mask(model: PreTrainedModel) -> None:
    """Let a model that attends by transformers' "sdpa" believe that no row holds two documents."""
    if model._supports_attention_backend and model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, sdpa_attention_forward)
        AttentionMaskInterface.register(NAME, _unpacked_mask)
        model.set_attn_implementation(NAME)


def _unpacked_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    window = kwargs.get("local_size")
    visible = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    mask: Tensor | None = sdpa_mask(*args, **{**kwargs, "mask_function": visible, "allow_is_causal_skip": True})
    return mask
