"""The figures of benchmarks/quality/forgetting.py: shares of the plain run of the same seed, convexity, verdicts."""

from __future__ import annotations

from typing import Any

from benchmarks.quality.forgetting_table import summary, table


def run(arm: str, seed: int, gain: float, forgetting: float) -> dict[str, Any]:
    base = [5.0, 2.0]
    return {"kind": "run", "world": "w", "arm": arm, "seed": seed, "gain": gain, "forgetting": forgetting, "base": base,
            "tokens": 100}  # fmt: skip


def sweep(task: list[float], general: list[float]) -> dict[str, Any]:
    points = list(map(list, zip((0.0, 0.5, 0.75, 1.0), task, general, strict=True)))
    return {"kind": "sweep", "world": "w", "arm": "plain", "seed": 0, "points": points}


ROWS = [
    run("plain", 0, 1.0, 0.8),
    run("plain", 1, 2.0, 0.4),
    run("replay 1 %", 0, 0.9, 0.2),
    run("replay 1 %", 1, 2.0, 0.3),
]


def test_shares_are_of_the_plain_run_of_the_same_seed() -> None:
    replay = summary(ROWS)["w"]["arms"]["replay 1 %"]
    assert replay["removed"]["mean"] == ((1 - 0.2 / 0.8) + (1 - 0.3 / 0.4)) / 2
    assert replay["gain_kept"]["mean"] == (0.9 + 1.0) / 2
    assert replay["agrees"] is False, "half is not most"
    better = [*ROWS[:2], run("replay 1 %", 0, 0.9, 0.1), run("replay 1 %", 1, 2.0, 0.1)]
    assert summary(better)["w"]["arms"]["replay 1 %"]["agrees"] is True


def test_convex_is_said_of_convex_curves_only() -> None:
    convex, bent = [3.0, 2.4, 2.2, 2.1], [2.0, 2.4, 2.5, 2.55]
    found = summary([*ROWS, sweep(convex, [2.0, 2.1, 2.3, 2.8])])["w"]["scaling"]
    assert found["convex"] == {"task": True, "general": True}
    assert found["agrees"] is True
    assert found["shares"]["0.75"]["removed"] == 1 - (2.3 - 2.0) / (2.8 - 2.0)
    assert summary([*ROWS, sweep(convex, bent)])["w"]["scaling"]["convex"]["general"] is False


def test_an_average_is_held_against_the_mean_run() -> None:
    soup = {"kind": "soup", "world": "w", "arm": "average of the seeds", "seed": 0, "losses": [3.4, 2.5], "lost": 0.2}
    assert summary([*ROWS, soup])["w"]["average"]["agrees"] is True
    assert summary([*ROWS, {**soup, "losses": [3.6, 2.5]}])["w"]["average"]["agrees"] is False


def test_the_table_has_every_arm_and_its_verdict() -> None:
    printed = table(summary([*ROWS, sweep([3.0, 2.4, 2.2, 2.1], [2.0, 2.1, 2.3, 2.8])]))
    assert "| plain | 1.500 ± 0.707 | 0.600 ± 0.283 |" in printed
    assert "50% | 95%" in printed
    assert printed.count("as published") == 2
    assert printed.count("not so") == 1
