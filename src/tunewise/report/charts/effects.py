"""What each method contributes, as figures: alone, in the ladder, left out, and how methods change each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tunewise.lab.findings import Effect, MethodFindings
from tunewise.lab.outcome import Interval
from tunewise.report import numbers
from tunewise.report.blocks import Chart
from tunewise.report.charts import style


@dataclass(frozen=True)
class Contribution:
    """Ratios of one method, with over without; below one is faster or smaller."""

    name: str
    alone: Interval | None
    ladder: Interval | None
    left_out: Interval | None


SERIES = (
    ("alone", "alone", "circle", "var(--measured)"),
    ("ladder", "in the ladder", "diamond", "var(--predicted)"),
    ("left_out", "in the final recipe", "square", "var(--rounding)"),
)


UNTITLED = {"l": 58, "r": 14, "t": 12, "b": 26}
"""Margins of a figure whose horizontal axis has no title."""


def contributions(id_: str, title: str, found: Sequence[Contribution]) -> Chart | None:
    """Up to three ratios of every method, with intervals, around the line of no effect."""
    every = [value for each in found for value in (each.alone, each.ladder, each.left_out) if value]
    if not every:
        return None
    data = []
    for offset, (field, words, symbol, colour) in zip((-0.2, 0.0, 0.2), SERIES, strict=True):
        mine = [(row, each.name, value) for row, each in enumerate(found) if (value := getattr(each, field))]
        if mine:
            values = [value for *_, value in mine]
            hover = [f"<b>{style.safe(name)}</b><br>{words}: {numbers.ratio(value)}" for _, name, value in mine]
            bars = style.errors(values, colour)
            y = [row + offset for row, *_ in mine]
            data.append(style.points([v.middle for v in values], y, colour, hover, symbol, name=words, error_x=bars))
    figure = style.layout(
        84 + 54 * len(found),
        showlegend=True,
        margin=UNTITLED,
        xaxis=style.ratio_axis(every),
        yaxis=style.named_axis([each.name for each in found]),
        shapes=[_no_effect(len(found))],
    )
    said = "; ".join(f"{each.name} alone {numbers.ratio(each.alone)}" for each in found if each.alone)
    narrow = {"legend.font.size": 11, **_narrow(figure, [each.name for each in found])}
    return Chart(id_, title, f"{title}: {said}.", {"data": data, "layout": figure}, narrow)


def main_effects(methods: MethodFindings) -> Chart | None:
    """Main effects on time and memory with their intervals; None without a factorial."""
    names = [factor.name for factor in methods.factors]
    kinds = (
        ("time", methods.time_effects, "circle", "var(--measured)", -0.13),
        ("memory", methods.memory_effects, "square", "var(--rounding)", 0.13),
    )
    every, data = [], []
    for what, effects, symbol, colour, offset in kinds:
        mine = [(names.index(effect.term), effect) for effect in effects if effect.term in names]
        every += [effect.ratio for _, effect in mine]
        hover = [f"<b>{style.safe(effect.term)}</b><br>{what} {numbers.ratio(effect.ratio)}" for _, effect in mine]
        ratios = [effect.ratio for _, effect in mine]
        bars = style.errors(ratios, colour)
        y = [row + offset for row, _ in mine]
        data.append(style.points([r.middle for r in ratios], y, colour, hover, symbol, name=what, error_x=bars))
    if not every:
        return None
    figure = style.layout(
        84 + 46 * len(names),
        showlegend=True,
        margin=UNTITLED,
        xaxis=style.ratio_axis(every),
        yaxis=style.named_axis(names),
        shapes=[_no_effect(len(names))],
    )
    said = "; ".join(f"{effect.term} {numbers.ratio(effect.ratio)}" for effect in methods.time_effects)
    return Chart(
        "main-effects",
        "Main effects",
        f"Main effects on time: {said}.",
        {"data": data, "layout": figure},
        _narrow(figure, names),
        "What switching a method on multiplies time and memory by, averaged over all settings of the others; bars are "
        "95 % intervals.",
    )


def pairs_of(methods: MethodFindings, effects: tuple[Effect, ...]) -> dict[tuple[str, str], Interval]:
    """Return the two-way terms by their two names, in the order of the factors."""
    names = [factor.name for factor in methods.factors]
    by_term = {effect.term: effect.ratio for effect in effects}
    found = {}
    for index, one in enumerate(names):
        for other in names[index + 1 :]:
            ratio = by_term.get(f"{one} x {other}") or by_term.get(f"{other} x {one}")
            if ratio is not None:
                found[one, other] = ratio
    return found


def heat_map(id_: str, title: str, methods: MethodFindings, effects: tuple[Effect, ...]) -> Chart | None:
    """Two-way terms as a triangle of cells; None with fewer than three of them (a sentence says more)."""
    found = pairs_of(methods, effects)
    names = [factor.name for factor in methods.factors]
    if len(found) < 3:
        return None
    columns, rows = names[:-1], names[1:]
    z: list[list[float | None]] = []
    texts, hover = [], []
    for other in rows:
        ratios = [found.get((one, other)) for one in columns]
        z.append([None if ratio is None or ratio.middle <= 0 else math.log2(ratio.middle) for ratio in ratios])
        texts.append(["" if ratio is None else _cell(ratio) for ratio in ratios])
        hover.append(
            ["" if r is None else f"<b>{style.safe(one)} × {style.safe(other)}</b><br>{numbers.ratio(r)}"
             for one, r in zip(columns, ratios, strict=True)]
        )  # fmt: skip
    strongest = max([0.2, *(abs(value) for line in z for value in line if value is not None)])
    data = {
        "type": "heatmap", "z": z, "text": texts, "texttemplate": "%{text}", "hovertext": hover, "hoverinfo": "text",
        "zmin": -strongest, "zmax": strongest, "xgap": 3, "ygap": 3, "showscale": False, "hoverongaps": False,
        "colorscale": [[0.0, "var(--less)"], [0.5, "var(--neutral)"], [1.0, "var(--more)"]],
        "textfont": {"color": "var(--ink)", "size": 13},
    }  # fmt: skip
    ticks = {"showgrid": False, "tickfont": {"color": "var(--ink)", "size": 12}}
    figure = style.layout(
        70 + 50 * len(rows),
        margin=UNTITLED,
        xaxis=style.axis("", tickvals=list(range(len(columns))), ticktext=_labels(columns), tickangle=0, **ticks),
        yaxis=style.axis("", tickvals=list(range(len(rows))), ticktext=_labels(rows), autorange="reversed", **ticks),
    )
    said = "; ".join(f"{one} with {other} {numbers.ratio(ratio)}" for (one, other), ratio in found.items())
    narrow = {"xaxis.tickfont.size": 10, "yaxis.tickfont.size": 10}
    return Chart(id_, title, f"{title}: {said}.", {"data": [data], "layout": figure}, narrow)


def _narrow(figure: style.Figure, names: Sequence[str]) -> style.Figure:
    labels = {"yaxis.ticktext": style.short_names(names, 18), "yaxis.tickfont.size": 11}
    return labels | style.narrow_ratio_axis(figure["xaxis"])


def _labels(names: Sequence[str]) -> list[str]:
    return [style.safe(style.shortened(name, 18)).replace(" ", "<br>") for name in names]


def _cell(ratio: Interval) -> str:
    text = numbers.ratio(ratio).text
    return text if numbers.holds_one(ratio) else f"<b>{text}</b>"


def _no_effect(num_rows: int) -> style.Figure:
    return style.rule(1, 1, -0.5, num_rows - 0.5)
