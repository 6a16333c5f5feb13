"""Whether a fast path computes the same: loss and gradient of one global batch against the plain form's.

The gradients are compared through their sketches (`engine.sketch`), whose difference has the norm of the gradients'
difference up to a few per cent. Tolerances: fp32 paths differ by the order of their sums, 16-bit ones by the rounding
of every product; a wrong gradient is off by its own size.
"""

from __future__ import annotations

from dataclasses import dataclass

from tunewise.engine.sketch import relative_error
from tunewise.lab.outcome import Gate

FP32_LOSS, FP32_GRADIENT = 1e-4, 1e-3
HALF_LOSS, HALF_GRADIENT = 2e-2, 1e-1


@dataclass(frozen=True)
class Verdict:
    """How far loss and gradient are off, relative to the plain form's, and what is allowed."""

    loss_error: float
    gradient_error: float
    loss_tolerance: float
    gradient_tolerance: float

    @property
    def passed(self) -> bool:
        """Whether both are within what is allowed; not-a-number is not."""
        return self.loss_error <= self.loss_tolerance and self.gradient_error <= self.gradient_tolerance

    @property
    def sentence(self) -> str:
        """In words."""
        return (
            f"first batch: loss off by {self.loss_error:.1e} (allowed {self.loss_tolerance:.0e}), gradient by "
            f"{self.gradient_error:.1e} (allowed {self.gradient_tolerance:.0e})"
        )


def compare(found: Gate, plain: Gate, *, is_half: bool) -> Verdict:
    """Compare a first batch with the plain form's.

    Args:
        found, plain: of the same documents, with the same weights and the same things trained.
        is_half: whether `found` computes in 16 bits.
    """
    loss_tolerance, gradient_tolerance = (HALF_LOSS, HALF_GRADIENT) if is_half else (FP32_LOSS, FP32_GRADIENT)
    return Verdict(
        loss_error=abs(found.loss - plain.loss) / max(abs(plain.loss), 1e-12),
        gradient_error=relative_error(found.sketch, plain.sketch),
        loss_tolerance=loss_tolerance,
        gradient_tolerance=gradient_tolerance,
    )
