"""From torch's profiler to seconds and FLOPs of each phase of a step.

A phase is "forward" or "backward" and a part of the model ("attention", "norm", "linear", ...), or "optimizer", "data".
The part of a forward operator is the innermost module around it that is marked; the part of a backward operator is that
of the forward operator with the same autograd sequence number.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRotaryEmbedding

from tunewise.layers.blocks import FusedMLP
from tunewise.layers.document_kernel import pairs_of
from tunewise.layers.linear import is_linear
from tunewise.layers.lora import LoRALinear

OUTSIDE = "other"
INT8_IN_PLACE = ("tunewise::int8_matmul_", "tunewise::int8_matmul_packed_")
INT8_PRODUCTS = ("tunewise::int8_matmul", *INT8_IN_PLACE)

THIN_PRODUCTS = {"tunewise::thin_gradient": 1, "tunewise::thin_gradient_and_product_": 2, "tunewise::thin_update_": 1}
"""Products of rows, their first operand, with their thin side, the second; and how many of them."""

PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::linear", "tunewise::quantize_rows", *INT8_PRODUCTS}
PRODUCTS |= {"tunewise::thin_product", *THIN_PRODUCTS}
"""Operators that are linear layers' work wherever they stand, but for the loss."""
DOCUMENT_ATTENTION = {"tunewise::document_attention_": (6, 2), "tunewise::document_attention_backward_": (10, 5)}
"""Where the documents' counts stand among the operands, and how many products a pair of query and key goes through."""

_BACKWARD = "autograd::engine::evaluate_function"


def part_of(module: nn.Module) -> str | None:
    """Say which part of the model a module's own operators are."""
    if isinstance(module, LoRALinear) or is_linear(module):
        return "linear"
    if isinstance(module, LlamaRotaryEmbedding):
        return "rotary table"
    if "Attention" in type(module).__name__ or isinstance(module, LlamaAttention):
        return "attention"
    if isinstance(module, LlamaMLP | FusedMLP):
        return "swiglu"
    if "Norm" in type(module).__name__:
        return "norm"
    return "embedding" if isinstance(module, nn.Embedding) else None


@contextmanager
def marked(model: nn.Module) -> Iterator[None]:
    """Put the name of its part around each module's forward pass; what is under none of them is the loss or "other"."""
    handles = []
    open_records: list[Any] = []

    def enter(part: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            record = torch.profiler.record_function(f"phase:{part}")
            record.__enter__()
            open_records.append(record)

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        open_records.pop().__exit__(None, None, None)

    for module in model.modules():
        part = part_of(module)
        if part is not None:
            handles.append(module.register_forward_pre_hook(enter(part)))
            handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def by_phase(profile: torch.profiler.profile, steps: float, step_seconds: float) -> dict[str, dict[str, Any]]:
    """Return for each phase its share, its seconds of `step_seconds`, its FLOPs a step and its operators' shares."""
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CPU]
    part_by_sequence: dict[int, str] = {}
    for event in events:
        if event.sequence_nr >= 0 and not _is_backward(event):
            part_by_sequence.setdefault(event.sequence_nr, _forward_part(event))
    seconds: dict[str, float] = defaultdict(float)
    flops: dict[str, float] = defaultdict(float)
    operators: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event in events:
        phase = _phase(event, part_by_sequence)
        own = event.self_cpu_time_total * 1e-6
        seconds[phase] += own
        name = "(Python)" if event.name.startswith(("phase:", _BACKWARD)) else event.name
        operators[phase][name] += own
        flops[phase] += _flops(event)
    total = sum(seconds.values())
    found = {}
    for phase, own in seconds.items():
        by_operator = sorted(operators[phase].items(), key=lambda item: -item[1])
        found[phase] = {
            "share": own / total,
            "seconds": own / total * step_seconds,
            "flops": flops[phase] / steps,
            "operators": {name: part / total for name, part in by_operator[:8]},
        }
    return found


def _ancestors(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _is_backward(event: Any) -> bool:
    return any(each.name.startswith(_BACKWARD) for each in _ancestors(event))


def _forward_part(event: Any) -> str:
    for each in _ancestors(event):
        if each.name.startswith("phase:"):
            return str(each.name.removeprefix("phase:"))
        if "CrossEntropy" in each.name or "cross_entropy" in each.name:
            return "loss"
    return OUTSIDE


def _phase(event: Any, part_by_sequence: dict[int, str]) -> str:
    is_backward = _is_backward(event)
    part = OUTSIDE if is_backward else _forward_part(event)
    if is_backward:
        parts = (part_by_sequence.get(each.sequence_nr) for each in _ancestors(event))
        part = next((part for part in parts if part is not None), OUTSIDE)
    if part not in ("loss", "optimizer") and any(each.name in PRODUCTS for each in _ancestors(event)):
        part = "linear"
    if part in ("optimizer", "data", OUTSIDE) and not is_backward:
        return part
    return f"{'backward' if is_backward else 'forward'} {part}"


def _flops(event: Any) -> float:
    """FLOPs of matrix products; of those that the profiler does not know from their shapes."""
    if event.name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"):
        return float(event.flops or 0)
    if event.name == "aten::addmm_":
        (rows, inner), (_, columns) = event.input_shapes[1:3]
        return 2.0 * rows * inner * columns
    if event.name == "tunewise::thin_product":
        (rows, inner), (thin, _) = event.input_shapes[:2]
        return 2.0 * rows * inner * thin
    if event.name in THIN_PRODUCTS:
        (rows, inner), (_, thin) = event.input_shapes[:2]
        return 2.0 * rows * inner * thin * THIN_PRODUCTS[event.name]
    if event.name in INT8_IN_PLACE:
        (rows, columns), (_, inner) = event.input_shapes[:2]
        return 2.0 * rows * columns * inner
    if event.name in INT8_PRODUCTS:
        (rows, _), (one, other) = event.input_shapes[0], event.input_shapes[2]
        return 2.0 * rows * one * other
    if event.name in DOCUMENT_ATTENTION:
        first, products = DOCUMENT_ATTENTION[event.name]
        counts, lengths, heads, _, size, window = event.concrete_inputs[first : first + 6]
        return 2.0 * pairs_of(counts, lengths, window) * heads * size * products
    if event.name.startswith("aten::_scaled_dot_product_flash_attention_for_cpu"):
        is_backward = event.name.endswith("backward")
        rows, heads, length, size = event.input_shapes[1 if is_backward else 0]
        return 2.0 * rows * heads * length * length * size * (5 if is_backward else 2)
    return 0.0
