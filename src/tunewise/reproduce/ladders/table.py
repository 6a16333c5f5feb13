"""From measurements to the table: each row beside the published one, single effects, their product and the whole."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

from tunewise.lab.effects import cumulative
from tunewise.lab.outcome import Failed, Interval, Measurement, OutOfMemory, speed_of
from tunewise.reproduce.ladders.ladder import Ladder, Row, Whole

SAME = 0.02
"""Speeds that differ by less than this share are called equal."""


@dataclass(frozen=True)
class Measured:
    """A row's repetitions."""

    row: Row
    outcomes: tuple[Measurement | OutOfMemory | Failed, ...]

    @property
    def good(self) -> list[Measurement]:
        """The measurements among the outcomes."""
        return [outcome for outcome in self.outcomes if isinstance(outcome, Measurement)]

    @property
    def speed(self) -> Interval | None:
        """Tokens per second: the median of the repetitions, the lowest and the highest quartile of any of them."""
        return speed_of(self.good)

    @property
    def peak_bytes(self) -> int | None:
        """The most that tensors took in any repetition."""
        return max(
            (found.peak_tensor_bytes for found in self.good if found.peak_tensor_bytes is not None), default=None
        )

    @property
    def problem(self) -> str | None:
        """Why there is no measurement."""
        bad = [outcome.reason for outcome in self.outcomes if not isinstance(outcome, Measurement)]
        return bad[0] if bad else None


Results = dict[str, Measured]


def table(ladder: Ladder, results: Results) -> dict[str, Any]:
    """Return everything that the JSON says about the rows."""
    wholes = [found for whole in ladder.wholes if (found := _whole(ladder, results, whole)) is not None]
    order, signs = _memory_order(ladder, results), _speed_signs(ladder, results)
    main = wholes[0] if wholes else {}
    return {
        "summary": {
            "rows": sum(1 for row in ladder.rebuilt if results[row.name].good),
            "memory_order_kept": order["kept"],
            "memory_pairs_kept": f"{order['pairs_kept']} of {order['pairs']}",
            "speed_signs_agree": signs["agree"],
            "speed_signs": signs["rows"],
            "product_speed": main.get("product_speed"),
            "whole_speed": main.get("whole_speed"),
            "synergy": main.get("synergy_speed"),
            "published_synergy": main.get("published_synergy_speed"),
        },
        "rows": [_row(ladder, results, row) for row in ladder.rows],
        "wholes": wholes,
        "memory_order": order,
        "speed_signs": signs,
    }


def _row(ladder: Ladder, results: Results, row: Row) -> dict[str, Any]:
    found = results.get(row.name)
    return {
        "name": row.name,
        "effect": row.effect,
        "over": row.over,
        "is_single": row.is_single,
        "note": row.note,
        "problem": found.problem if found else None,
        "repeats": len(found.good) if found else 0,
        "tokens_per_second": None if found is None or found.speed is None else found.speed.model_dump(),
        "peak_tensor_bytes": found.peak_bytes if found else None,
        "losses": list(found.good[0].losses) if found and found.good else [],
        "published": None if row.published is None else vars(row.published),
        "to_start": _ratios(ladder, results, row, ladder.start),
        "to_over": None if row.over is None else _ratios(ladder, results, row, row.over),
    }


def _ratios(ladder: Ladder, results: Results, row: Row, other: str) -> dict[str, float | None]:
    """Return speed and memory of `row` over those of `other`, measured and published."""
    mine, theirs = results.get(row.name), results.get(other)
    published, base = row.published, ladder.row(other).published
    return {
        "speed": _quotient(mine.speed, theirs.speed) if mine and theirs else None,
        "memory": mine.peak_bytes / theirs.peak_bytes
        if mine and theirs and mine.peak_bytes and theirs.peak_bytes
        else None,
        "published_speed": published.speed / base.speed if published and base else None,
        "published_memory": published.memory / base.memory if published and base else None,
    }


def _quotient(one: Interval | None, other: Interval | None) -> float | None:
    return one.middle / other.middle if one is not None and other is not None else None


def _singles(ladder: Ladder) -> dict[str, Row]:
    return {row.effect: row for row in ladder.rows if row.is_single and row.effect is not None}


def _whole(ladder: Ladder, results: Results, whole: Whole) -> dict[str, Any] | None:
    """Hold a row that has several effects against the product of the single ones."""
    singles = [_singles(ladder)[effect] for effect in whole.effects]
    alone = [_ratios(ladder, results, row, str(row.over)) for row in singles]
    together = _ratios(ladder, results, ladder.row(whole.row), ladder.start)
    mine, start = results[whole.row], results[ladder.start]
    speeds, memories = [each["speed"] for each in alone], [each["memory"] for each in alone]
    if mine.speed is None or start.speed is None or None in speeds:
        return None
    interval = Interval(
        middle=mine.speed.middle / start.speed.middle,
        low=mine.speed.low / start.speed.high,
        high=mine.speed.high / start.speed.low,
    )
    speed = cumulative([float(value or math.nan) for value in speeds], interval)
    memory = math.prod(float(value or math.nan) for value in memories)
    published = [each["published_speed"] for each in alone]
    product = None if None in published else math.prod(float(value or math.nan) for value in published)
    published_whole = together["published_speed"]
    return {
        "row": whole.row,
        "effects": dict(zip(whole.effects, alone, strict=True)),
        "product_speed": speed.product,
        "whole_speed": speed.whole.middle,
        "whole_speed_interval": [speed.whole.low, speed.whole.high],
        "synergy_speed": speed.synergy,
        "product_memory": memory,
        "whole_memory": together["memory"],
        "synergy_memory": None if together["memory"] is None else together["memory"] / memory,
        "published_product_speed": product,
        "published_whole_speed": published_whole,
        "published_synergy_speed": published_whole / product if product and published_whole else None,
    }


def _memory_order(ladder: Ladder, results: Results) -> dict[str, Any]:
    """Compare the order of the rows by memory with the published one, pair by pair."""
    heavy = [
        (row.name, row.published.memory, peak)
        for row in ladder.rebuilt
        if row.published is not None and (peak := results[row.name].peak_bytes) is not None
    ]
    pairs = list(itertools.combinations(heavy, 2))
    swapped = [f"'{one[0]}' and '{other[0]}'" for one, other in pairs if (one[1] - other[1]) * (one[2] - other[2]) <= 0]
    return {
        "kept": not swapped,
        "pairs": len(pairs),
        "pairs_kept": len(pairs) - len(swapped),
        "swapped": swapped,
        "published": [name for name, _, _ in sorted(heavy, key=lambda each: -each[1])],
        "measured": [name for name, _, _ in sorted(heavy, key=lambda each: -each[2])],
    }


def _speed_signs(ladder: Ladder, results: Results) -> dict[str, Any]:
    """Say for which rows what is added makes faster, slower or neither, as published."""
    compared = {}
    for row in ladder.rebuilt:
        over = row.over
        ratios = _ratios(ladder, results, row, over) if over else None
        if ratios and ratios["speed"] is not None and ratios["published_speed"] is not None:
            compared[row.name] = (_sign(ratios["speed"]), _sign(ratios["published_speed"]))
    differing = {
        name: f"{mine} here, {theirs} as published" for name, (mine, theirs) in compared.items() if mine != theirs
    }
    return {"rows": len(compared), "agree": len(compared) - len(differing), "differing": differing, "same_within": SAME}


def _sign(ratio: float) -> str:
    return "faster" if ratio > 1 + SAME else "slower" if ratio < 1 - SAME else "equal"
