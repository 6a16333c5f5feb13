"""Seconds of a step's operators on a machine: each takes as long as its arithmetic or its memory traffic.

Source: Williams et al. 2009, "Roofline". A matrix product runs at the machine's achievable rate of its dtype;
everything moves its operands and results once at the achievable bandwidth. On a CUDA device the host launches ahead, so
a step takes as long as the device or the host, whichever is longer; on a CPU each call's overhead is added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tunewise.engine.tracking import Moment
from tunewise.engine.work import Work, WorkKey
from tunewise.machine.machine import Dtype, Machine

BANDWIDTH_FRACTION = 0.85
"""Of a catalogued bandwidth, what copies and elementwise kernels reach (STREAM-like tests on A100 and H100)."""

CAUSAL_SHARE = 0.5
"""Flash kernels skip what causality hides; the counted FLOPs are those of the whole square."""

ATTENTION_FRACTION = 0.6
"""Flash attention's rate over the best matmul's: 50 to 73 % of A100's peak (Dao 2023), where matmuls reach 87 %."""

FLASH_2_FLOPS_PER_SECOND = 335e12
"""The most that FlashAttention-2 reaches on an H100, whose new instructions it does not use (Dao 2023, section 4)."""

CUDA_LAUNCH_SECONDS = 7e-6
"""Host time of one operator in eager torch, autograd and its share of Python included, where it was not measured."""

CPU_LAUNCH_SECONDS = 3e-6

CUDA_KERNEL_SECONDS = 2e-6
"""The shortest time between two kernels on the device."""

_DTYPES: dict[torch.dtype, Dtype] = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8",
    torch.int8: "int8",
}
_ATTENTION_WORDS = ("scaled_dot_product", "varlen", "flash")


@dataclass(frozen=True)
class Seconds:
    """Time of one micro-batch and of one update.

    Attributes:
        linear: device seconds of a micro-batch without attention's products.
        attention: device seconds of attention's products.
        update: device seconds of clipping and the optimizer's step.
        calls: operators launched in a micro-batch.
        update_calls: operators launched in an update.
    """

    linear: float
    attention: float
    update: float
    calls: float
    update_calls: float


def seconds_of(work: Mapping[WorkKey, Work], machine: Machine, *, tf32: bool = False) -> Seconds:
    """Return the time of a dry run's `work` (one micro-batch and one update) on `machine`."""
    linear = attention = update = calls = update_calls = 0.0
    for key, entry in work.items():
        seconds = _operator(key, entry, machine, tf32)
        if key.moment == Moment.UPDATE:
            update += seconds
            update_calls += entry.calls
        elif key.moment in (Moment.FORWARD, Moment.BACKWARD):
            calls += entry.calls
            if is_attention(key):
                attention += seconds
            else:
                linear += seconds
    return Seconds(linear, attention, update, calls, update_calls)


def limits_of(work: Mapping[WorkKey, Work], machine: Machine, *, tf32: bool = False) -> dict[str, float]:
    """Return the share of a micro-batch's and an update's operators that wait for arithmetic, attention or memory.

    A launch that hides behind the device's work is no share of it; where launching takes longer than all operators
    together, `launching` is the part of the step in which the device has nothing to do.
    """
    seconds = dict.fromkeys(("matrix products", "attention", "memory traffic"), 0.0)
    calls = 0.0
    for key, entry in work.items():
        if key.moment not in (Moment.FORWARD, Moment.BACKWARD, Moment.UPDATE):
            continue
        calls += entry.calls
        taken = _operator(key, entry, machine, tf32)
        computes = bool(entry.flops) and taken > entry.moved_bytes / bandwidth(machine)
        what = "attention" if is_attention(key) else "matrix products" if computes else "memory traffic"
        seconds[what] += taken
    busy, host = sum(seconds.values()), calls * launch_seconds(machine)
    seconds["launching"] = max(0.0, host - busy) if machine.kind == "cuda" else host
    total = sum(seconds.values())
    return {what: taken / total for what, taken in seconds.items()} if total else {}


def is_attention(key: WorkKey) -> bool:
    """Say whether this is a fused attention kernel, whose work grows with the square of a document."""
    return any(word in key.operator for word in _ATTENTION_WORDS)


def launch_seconds(machine: Machine) -> float:
    """Return the host's time for one operator."""
    if machine.launch_overhead_seconds is not None:
        return machine.launch_overhead_seconds
    return CUDA_LAUNCH_SECONDS if machine.kind == "cuda" else CPU_LAUNCH_SECONDS


def bandwidth(machine: Machine) -> float:
    """Return the bytes per second that kernels reach: what was measured, or a part of what is printed."""
    is_measured = any(reading.what in ("copy", "triad") for reading in machine.readings)
    return machine.bandwidth_bytes_per_second * (1.0 if is_measured else BANDWIDTH_FRACTION)


def _operator(key: WorkKey, entry: Work, machine: Machine, tf32: bool) -> float:
    shortest = CUDA_KERNEL_SECONDS * entry.calls if machine.kind == "cuda" else 0.0
    flops = entry.flops
    rate = 0.0
    if flops:
        rate = machine.achievable_flops(_dtype(key.dtype, machine, tf32))
        if is_attention(key):
            flops, rate = flops * CAUSAL_SHARE, min(rate * ATTENTION_FRACTION, FLASH_2_FLOPS_PER_SECOND)
    arithmetic = flops / rate if rate else 0.0
    return max(arithmetic, entry.moved_bytes / bandwidth(machine), shortest)


def _dtype(dtype: torch.dtype | None, machine: Machine, tf32: bool) -> Dtype:
    name = _DTYPES.get(dtype, "fp32") if dtype is not None else "fp32"
    if name == "fp32" and tf32 and "tf32" in machine.flops_per_second:
        return "tf32"
    if name == "int8" and name not in machine.flops_per_second:  # how much faster it is nobody measured
        name = "bf16"
    return name if name in machine.flops_per_second else "fp32"
