"""Seconds of a step as a function of how its documents lie in micro-batches, from two traced sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tunewise.machine.machine import Machine
from tunewise.planner.footprint import Footprint
from tunewise.planner.load import Rows
from tunewise.planner.roofline import Seconds, launch_seconds


@dataclass(frozen=True)
class TimeLine:
    """Seconds as a function of a micro-batch's positions and of its documents' squares.

    Attributes:
        constant, slope: device seconds of a micro-batch, and of each of its positions, without attention's products.
        attention: seconds for each unit of the documents' squared lengths.
        update: of clipping and the optimizer's step.
        calls, update_calls: operators launched.
    """

    constant: float
    slope: float
    attention: float
    update: float
    calls: float
    update_calls: float

    @staticmethod
    def through(seen: Footprint, first: Seconds, second: Seconds) -> TimeLine:
        """Return the line through what a footprint's two sizes take."""
        tokens = seen.tokens
        slope = (second.linear - first.linear) / (tokens[1] - tokens[0]) if tokens[1] > tokens[0] else 0.0
        return TimeLine(
            constant=first.linear - slope * tokens[0],
            slope=slope,
            attention=second.attention / seen.squares[1],
            update=first.update,
            calls=second.calls,
            update_calls=first.update_calls,
        )

    def __add__(self, other: TimeLine) -> TimeLine:
        return TimeLine(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def __sub__(self, other: TimeLine) -> TimeLine:
        return TimeLine(*(getattr(self, name) - getattr(other, name) for name in self.__dataclass_fields__))

    def only_update(self) -> TimeLine:
        """Return what belongs to the update, which no micro-batch changes."""
        return TimeLine(0.0, 0.0, 0.0, self.update, 0.0, self.update_calls)

    def without_update(self) -> TimeLine:
        """Return what belongs to the micro-batches."""
        return replace(self, update=0.0, update_calls=0.0)

    def step(self, rows: Rows, machine: Machine) -> float:
        """Return the seconds of a global step; a CUDA device works while the host launches ahead."""
        per_micro = rows.positions_per_step / max(rows.micro_batches_per_step, 1e-9)
        count = rows.micro_batches_per_step
        device = count * max(0.0, self.constant + self.slope * per_micro) + self.attention * rows.squares_per_step
        device += max(0.0, self.update)
        host = (count * self.calls + self.update_calls) * launch_seconds(machine)
        return max(device, host) if machine.kind == "cuda" else device + host
