"""From a measured ladder to findings: the order of memory, the effect of each row, and the product against the "
"whole."""

from __future__ import annotations

from typing import Any

from tunewise.lab.executor import Executor
from tunewise.reproduce.bench import Bench
from tunewise.reproduce.claim import Claim, Finding, Mark
from tunewise.reproduce.ladders.laboratory import open_bench
from tunewise.reproduce.ladders.ladder import Ladder
from tunewise.reproduce.ladders.table import Measured, Results, table
from tunewise.reproduce.reproduction import Table

QUARTILES = "interval from the quartiles of the steps"


def memory_claims() -> tuple[Claim, ...]:
    """Return what every ladder claims about memory."""
    return (
        Claim(key="memory order", says="memory of the rows is in the published order: share of all "
          "pairs", mark=Mark.READ,
              published=1.0, unit="", expects="above", neutral=0.5, tolerance=0.0),
        Claim(key="memory ratio", says="memory relative to the start: largest distance from the published share",
              mark=Mark.READ, published=0.0, unit="", tolerance=0.05),
    )  # fmt: skip


def speed_claim(ladder: Ladder, row_name: str) -> Claim:
    """Return the claim that a row is faster or slower than the row that it is compared with."""
    row = ladder.row(row_name)
    assert row.over is not None
    assert row.published is not None
    other = ladder.row(row.over).published
    assert other is not None
    ratio = row.published.speed / other.speed
    return Claim(
        key=row_name,
        says=f'speed of "{row_name}" over "{row.over}" ({row.published.speed:g} over {other.speed:g})',
        mark=Mark.READ,
        published=round(ratio, 3),
        expects="above" if ratio > 1 else "below",
        neutral=1.0,
    )


def measured(ladder: Ladder, bench: Bench, turns: int) -> Results:
    """Measure every row in a process of its own, in turns; finished trials are kept in the bench's folder."""
    with Executor() as executor:
        place = open_bench(ladder, "cpu", bench.folder / "ladder", executor)
        outcomes: dict[str, list[Any]] = {row.name: [] for row in ladder.rebuilt}
        for turn in range(turns):
            for number, row in enumerate(ladder.rebuilt):
                is_new = not place.is_measured(row, turn)
                outcome = place.measure(number, row, turn)
                outcomes[row.name].append(outcome)
                if is_new:
                    bench.say(f"{row.name}, turn {turn + 1}: {outcome.kind}, {outcome.trial_seconds:.1f} s")
                else:
                    bench.seconds_before += outcome.trial_seconds
    return {name: Measured(ladder.row(name), tuple(found)) for name, found in outcomes.items()}


def findings_of(ladder: Ladder, results: Results, rows: tuple[str, ...]) -> dict[str, Finding]:
    """Return the findings of `memory_claims` and of `speed_claim` for each of `rows`."""
    found = table(ladder, results)
    order = found["memory_order"]
    distances = [
        abs(ratios["memory"] - ratios["published_memory"])
        for row in found["rows"]
        if (ratios := row["to_start"])["memory"] is not None and ratios["published_memory"] is not None
    ]
    swapped = "; ".join(f"swapped: {pair}" for pair in order["swapped"])
    findings = {
        "memory order": Finding.exact(order["pairs_kept"] / order["pairs"], swapped),
        "memory ratio": Finding.exact(max(distances)),
    }
    for name in rows:
        over = ladder.row(name).over
        assert over is not None
        findings[name] = speed_ratio(results[name], results[over])
    return findings


def speed_ratio(one: Measured, other: Measured) -> Finding:
    """Return one speed over the other, with the interval that their quartiles allow."""
    if one.speed is None or other.speed is None:
        return Finding.untested(one.problem or other.problem or "not measured")
    mine, theirs = one.speed, other.speed
    return Finding(
        middle=mine.middle / theirs.middle, low=mine.low / theirs.high, high=mine.high / theirs.low, reason=QUARTILES
    )


def synergy(ladder: Ladder, results: Results) -> Finding:
    """Return the whole's speed over the product of the single effects, of the ladder's first whole."""
    wholes = table(ladder, results)["wholes"]
    if not wholes:
        return Finding.untested("a row of the product was not measured")
    whole = wholes[0]
    low, high = whole["whole_speed_interval"]
    product = whole["product_speed"]
    return Finding(middle=whole["synergy_speed"], low=low / product, high=high / product, reason=QUARTILES)


def table_of(ladder: Ladder, results: Results) -> Table:
    """Return the ladder's rows beside the published ones."""
    rows = []
    for row in table(ladder, results)["rows"]:
        speed, peak, start = row["tokens_per_second"], row["peak_tensor_bytes"], row["to_start"]
        absolute = (None if speed is None else round(speed["middle"]), None if peak is None else round(peak / 2**20, 1))
        relative = (start[key] for key in ("speed", "published_speed", "memory", "published_memory"))
        rows.append((row["name"], *absolute, *(None if each is None else round(each, 2) for each in relative)))
    return Table(
        title=f'rows beside "{ladder.start}"',
        columns=("row", "tokens/s", "peak MiB", "speed, to start", "published", "memory, to start", "published"),
        rows=tuple(rows),
    )
