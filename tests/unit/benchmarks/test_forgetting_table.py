"""The figures of benchmarks/quality/forgetting.py: shares of the plain run of the same seed, convexity, verdicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from benchmarks.quality.forgetting_plot import write
from benchmarks.quality.forgetting_table import summary, table

from tunewise.report.charts.svg import Mark, Plot, Series, draw

SVG = "{http://www.w3.org/2000/svg}"


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


SOUP = {"kind": "soup", "world": "w", "arm": "average of the seeds", "seed": 0, "losses": [3.4, 2.5], "lost": 0.2}
FIGURES = summary([*ROWS, sweep([3.0, 2.4, 2.2, 2.1], [2.0, 2.1, 2.3, 2.8]), SOUP])


def test_the_pictures_show_every_arm_with_its_published_direction(tmp_path: Path) -> None:
    arms, swept = write(FIGURES, tmp_path)
    assert [file.name for file in (arms, swept)] == ["forgetting-w-arms.svg", "forgetting-w-sweep.svg"]
    texts = {
        file: [element.text or "" for element in ElementTree.parse(file).iter(f"{SVG}text")] for file in (arms, swept)
    }
    for number, (name, arm) in enumerate(FIGURES["w"]["arms"].items(), 1):
        (place,) = [n for n, text in enumerate(texts[arms]) if text.startswith(f"{number}  {name}: ")]
        assert texts[arms][place + 1][:30] == arm["published"][:30]
        assert texts[arms][place + 2] == {True: "here: as published", False: "here: not so"}[arm["agrees"]]
        assert str(number) in texts[arms]
    assert "here: as published" in texts[swept]
    assert "task loss: convex" in texts[swept]
    assert any(text.startswith("at 0.75: 89% of the gain kept, 6") for text in texts[swept])


def test_marks_and_error_bars_lie_where_the_numbers_say(tmp_path: Path) -> None:
    arms, swept = write(FIGURES, tmp_path)
    circles = [c for c in ElementTree.parse(arms).iter(f"{SVG}circle") if float(c.get("cx", 0)) < 460]
    gains = [arm["gain"]["mean"] for arm in FIGURES["w"]["arms"].values()] + [FIGURES["w"]["average"]["gain"]]
    heights = [float(circle.get("cy", 0)) for circle in circles]
    assert len(circles) == len(gains)
    order = sorted(range(len(gains)), key=lambda n: gains[n])
    assert [heights[n] for n in order] == sorted(heights, reverse=True), "up is more"
    scale = (heights[0] - heights[1]) / (gains[0] - gains[1])
    assert heights[2] - heights[0] == pytest.approx(scale * (gains[2] - gains[0]), abs=0.2), "linear"
    lines = [line.get("points", "") for line in ElementTree.parse(swept).iter(f"{SVG}polyline")]
    assert [len(points.split()) for points in lines] == [4, 4]


def test_nothing_is_drawn_of_nothing() -> None:
    with pytest.raises(ValueError, match="needs marks"):
        draw(Plot("", "", "", ()))
    with pytest.raises(ValueError, match="finite"):
        draw(Plot("", "", "", (Series("s", (Mark(float("nan"), 1.0),)),)))
    assert "<script>" not in draw(Plot("<script>", "", "", (Series("s", (Mark(0.0, 1.0, "<script>"),)),)))
