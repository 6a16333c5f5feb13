"""The figures that every table of predictions against measurements ends in."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def summary_of(errors: Sequence[float], num_left_out: int) -> dict[str, int | float | None]:
    """Return the figures of some rows; None for those that no row can have.

    Args:
        errors: (predicted - measured) / measured of the rows that were used.
        num_left_out: how many others there were.
    """
    sizes = sorted(map(abs, errors))
    return {
        "rows_used": len(errors),
        "rows_left_out": num_left_out,
        "median_error": statistics.median(sizes) if sizes else None,
        "p90_error": sizes[min(len(sizes) - 1, int(0.9 * len(sizes)))] if sizes else None,
        "worst_error": sizes[-1] if sizes else None,
        "bias": statistics.mean(errors) if errors else None,
        "under_predictions": sum(error < 0 for error in errors),
    }
