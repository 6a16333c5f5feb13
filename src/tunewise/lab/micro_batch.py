"""How the chosen batch passes through the machine: rows at once by memory and speed, the batch itself unchanged."""

from __future__ import annotations

from dataclasses import dataclass

from tunewise.lab.findings import Throughput, ThroughputLine
from tunewise.lab.outcome import Interval, Measurement
from tunewise.lab.throughput import b95, fit_line
from tunewise.units import format_bytes

ALIGNMENT = 8
"""Positions of a micro-batch that matrix units like a multiple of; packed rows are padded to 64 already."""


@dataclass(frozen=True)
class MicroBatch:
    """The rows at once, how many micro-batches a step then has, and why."""

    size: int
    count: float
    reason: str


def throughput_of(measured: Measurement) -> tuple[tuple[Throughput, ...], ThroughputLine | None]:
    """Return the measured throughput by size of the micro-batch, and the line through it."""
    points = tuple(
        Throughput(
            micro_batch_size=each.micro_batch_size,
            tokens=each.tokens,
            seconds=each.seconds,
            tokens_per_second=Interval(
                middle=each.tokens / each.seconds.middle,
                low=each.tokens / each.seconds.high,
                high=each.tokens / each.seconds.low,
            ),
            peak_tensor_bytes=each.peak_tensor_bytes,
        )
        for each in measured.micro_batches
    )
    update = measured.update_seconds.middle if measured.update_seconds else None
    return points, fit_line(points, update) if points else None


def choose_micro_batch(points: tuple[Throughput, ...], rows_per_step: float, limit_bytes: int) -> MicroBatch:
    """Return the smallest micro-batch that is nearly as fast as the fastest one that fits.

    Args:
        points: measured; not empty.
        rows_per_step: rows of the chosen batch.
        limit_bytes: what tensors may take.
    """
    fitting = (
        tuple(p for p in points if p.peak_tensor_bytes is None or p.peak_tensor_bytes <= limit_bytes) or points[:1]
    )
    useful = tuple(p for p in fitting if p.micro_batch_size <= max(1.0, rows_per_step)) or fitting[:1]
    size = b95(useful)
    chosen = next(point for point in useful if point.micro_batch_size == size)
    fastest = max(useful, key=lambda point: point.tokens_per_second.middle)
    share = chosen.tokens_per_second.middle / fastest.tokens_per_second.middle
    memory = "" if chosen.peak_tensor_bytes is None else f", {format_bytes(chosen.peak_tensor_bytes)}"
    reason = (
        f"{size} rows at once reach {share:.0%} of the best speed that was measured ({fastest.micro_batch_size} rows)"
        f"{memory}"
    )
    largest = points[-1].micro_batch_size
    if fitting[-1].micro_batch_size < largest:
        reason += f"; {largest} rows do not fit"
    return MicroBatch(size, max(1.0, rows_per_step / size), reason)
