"""What litgpt's code does otherwise than ours, as methods that a dry run can watch (its model.py and lora.py, 2024).

One linear layer makes queries, keys and values, and LoRA is one layer over it: one dropout for all three, and an update
that is padded into place where only some of them have one. Its 4-bit layers are those of bitsandbytes in 2024.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tunewise.layers.head import CausalHead
from tunewise.layers.lora import LoRALinear
from tunewise.layers.quantized import FourBitLinear
from tunewise.methods.method import Run
from tunewise.recipe import Fidelity, Method, Slot
from tunewise.workload.batches import IGNORED, MicroBatch

FUSED = ("query_key_value", "qkv_proj", "c_attn")
"""Names of layers that make queries, keys and values at once."""


class LossOfChunks(Method):
    """Logits made in chunks, all of them then converted to fp32 and kept until the next ones are there.

    Chunks are not capped, whatever the configuration says (`GPT.forward` of litgpt/lora.py, in 2024).
    """

    name: ClassVar[str] = "loss_of_chunks"
    slot: ClassVar[Slot] = Slot.LOSS
    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING

    chunk_tokens: int = 128

    def apply(self, run: Run) -> None:
        """Set the loss."""
        head, kept = CausalHead.of(run.model), dict[str, list[Tensor]]()

        def loss(run: Run, batch: MicroBatch) -> Tensor:
            hidden_RLD = head.hidden(run.model, batch.input_ids_RL, batch.position_ids_RL)
            made = [head.output(part) for part in hidden_RLD.split(self.chunk_tokens, dim=1)]
            kept["logits"] = [logits.float() for logits in made]
            del made
            labels = batch.labels_RL.split(self.chunk_tokens, dim=1)
            parts = [
                F.cross_entropy(logits.flatten(0, 1), part.flatten(), ignore_index=IGNORED, reduction="sum")
                for logits, part in zip(kept["logits"], labels, strict=True)
            ]
            return torch.stack(parts).sum().float()

        run.loss = loss


class _KeptInput(torch.autograd.Function):
    """The identity, which holds its argument as long as the graph lives, not only until backward."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.kept = input
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class EarlyBitsandbytes(Method):
    """4-bit layers as bitsandbytes had them in 2024 (MatMul4Bit), with weights quantized from fp16 (Fabric's plugin).

    Each keeps its input (`ctx.tensors = (A, B)`) and unpacks its weight into fp16, then copies it into the compute
    dtype (`dequantize_4bit(B, quant_state).to(A.dtype)`).
    """

    name: ClassVar[str] = "early_bitsandbytes"
    slot: ClassVar[Slot] = Slot.KERNELS
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    def apply(self, run: Run) -> None:
        """Hook the layers."""
        for module in run.model.modules():
            if isinstance(module, FourBitLinear):
                module.register_forward_pre_hook(lambda _, arguments: (_KeptInput.apply(arguments[0]),))
                module.dense_weight = partial(_unpacked_twice, module.dense_weight)  # type: ignore[method-assign]


def _unpacked_twice(dense_weight: Callable[[torch.dtype], Tensor], dtype: torch.dtype) -> Tensor:
    return dense_weight(torch.float16).to(dtype)


class FusedLoRA(Method):
    """LoRA of q, k and v as one layer with one dropout.

    Attributes:
        num_parts: how many of q, k and v have an update. With less than three the update is copied into a larger
            tensor (`zero_pad`), and index_copy's derivative keeps what it has copied.
    """

    name: ClassVar[str] = "fused_lora"
    slot: ClassVar[Slot] = Slot.KERNELS
    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING

    num_parts: int

    def apply(self, run: Run) -> None:
        """Let the layers compute as litgpt's do."""
        for parent in run.model.modules():
            layers = {name: part for name, part in parent.named_children() if isinstance(part, LoRALinear)}
            separate = [name for name in ("q_proj", "k_proj", "v_proj") if name in layers]
            shared = _Dropout(max(1, len(separate)))
            for name, layer in layers.items():
                is_attention = name in separate or name in FUSED
                dropout = shared if name in separate else _Dropout(1)
                is_padded = is_attention and self.num_parts < 3
                num_layers = 2 if name == "gate_up_proj" else 1  # two layers there
                layer.forward = partial(_lora, layer, dropout, is_padded, num_layers)  # type: ignore[method-assign]


class _Dropout:
    """A dropout whose result serves several layers: it is made for the first and let go with the last of them."""

    def __init__(self, num_uses: int) -> None:
        self._num_uses, self._left, self._dropped = num_uses, 0, torch.empty(0)

    def __call__(self, input: Tensor, rate: float) -> Tensor:
        if self._left == 0:
            self._left, self._dropped = self._num_uses, F.dropout(input, rate)
        self._left -= 1
        dropped = self._dropped
        if self._left == 0:
            self._dropped = torch.empty(0)
        return dropped


def _lora(layer: LoRALinear, dropout: _Dropout, is_padded: bool, num_layers: int, input: Tensor) -> Tensor:
    rate = layer.dropout if layer.training else 0.0
    output: Tensor = layer.base_layer(input)
    lows = [F.linear(dropout(input, rate), layer.lora_A.weight) for _ in range(num_layers)]
    parts = layer.lora_B.weight.chunk(num_layers)
    update = torch.cat([F.linear(low, part) for low, part in zip(lows, parts, strict=True)], dim=-1)
    return output + layer.scale * (_Padded.apply(update) if is_padded else update)


class _Padded(torch.autograd.Function):
    """A copy, as index_copy makes one, which keeps its argument for backward."""

    @staticmethod
    def forward(ctx: Any, update: Tensor) -> Tensor:
        ctx.save_for_backward(update)
        return update.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        del ctx
        return grads[0].clone()


class OwnAttention(Method):
    """Attention as litgpt feeds it: shared heads are written out, others are views into the fused layer's output.

    transformers' Falcon hands shared heads over as they are, and of torch's kernels only the plainest one takes them,
    which keeps all scores.
    """

    name: ClassVar[str] = "own_attention"
    slot: ClassVar[Slot] = Slot.KERNELS
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    def apply(self, run: Run) -> None:
        """Watch the calls that the loss makes."""
        inner = run.loss

        def loss(run: Run, batch: MicroBatch) -> Tensor:
            with _Attention():
                return inner(run, batch)

        run.loss = loss


class _Attention(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key, value = args[:3]
            repeats = query.shape[1] // key.shape[1]
            if repeats > 1:
                key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
            else:
                value = _InFused.apply(value)
            args, kwargs = (query, key, value, *args[3:]), {**(kwargs or {}), "enable_gqa": False}
        return func(*args, **(kwargs or {}))


class _InFused(torch.autograd.Function):
    """The values as a third of the tensor that holds queries and keys as well, which lives as long as they do."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        if value.untyped_storage().nbytes() > value.numel() * value.element_size():
            return value.view_as(value)
        return value.new_empty((3, *value.shape))[2].copy_(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        del ctx
        return grads[0]
