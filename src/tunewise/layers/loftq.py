"""LoftQ: a low-rank update that starts as what quantization has lost.

    A, B = the R largest singular values of W - Q, so that Q + s B A is near W     Li et al. 2023 (arXiv 2310.08659)

One iteration of the paper's algorithm 1, as peft's `replace_lora_weights_loftq` does it: more of them would quantize
another weight than the base model's, and an adapter file holds no base.

Shape suffixes: I in_features, O out_features, R rank, K singular values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunewise.errors import InputError
from tunewise.layers.linear import has_values, weight_of
from tunewise.layers.lora import LoRALinear


@torch.no_grad()
def start_from_quantization_error(layer: LoRALinear, original_OI: Tensor) -> None:
    """Give A and B of a layer over a quantized base their first values.

    Args:
        layer: whose base holds Q.
        original_OI: W, the weight before quantization.

    Raises:
        InputError: the rank is above the weight's.
    """
    if layer.rank > min(layer.in_features, layer.out_features):
        raise InputError(
            f"init 'loftq' needs a rank of at most {min(layer.in_features, layer.out_features)} for a layer of "
            f"{layer.in_features} x {layer.out_features}, but the rank is {layer.rank}."
        )
    if not has_values(original_OI):
        return
    quantized_OI = weight_of(layer.base_layer, torch.float32)
    lost_OI = original_OI.to(quantized_OI) - quantized_OI
    left_OK, singular_K, right_KI = torch.linalg.svd(lost_OI, full_matrices=False)
    root_R = (singular_K[: layer.rank] / layer.scale).sqrt()
    layer.lora_A.weight.copy_(root_R[:, None] * right_KI[: layer.rank])
    layer.lora_B.weight.copy_(left_OK[:, : layer.rank] * root_R)
