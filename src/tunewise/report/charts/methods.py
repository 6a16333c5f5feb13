"""The combinations of methods as figures: time against memory, and what was predicted against what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tunewise.lab.findings import MethodFindings, MethodTrial
from tunewise.lab.outcome import Interval
from tunewise.report import numbers
from tunewise.report.blocks import Chart, Table
from tunewise.report.charts import style

QUALITIES = (
    ("exact", "the same numbers", "circle", "var(--measured)"),
    ("rounding", "other rounding", "square", "var(--rounding)"),
    ("learning", "another learning problem", "triangle-up", "var(--predicted)"),
)
"""What a combination promises about the numbers, from best to worst: name, in words, symbol, colour."""


def fidelity(methods: MethodFindings, trial: MethodTrial) -> str:
    """Return the weakest promise among a combination's methods."""
    promises = {factor.name: factor.fidelity for factor in methods.factors}
    order = [name for name, *_ in QUALITIES]
    return max((promises.get(name, "exact") for name in trial.on), key=order.index, default="exact")


def is_measured(trial: MethodTrial) -> bool:
    """Tell whether both time and memory of a trial are known."""
    return trial.step_seconds is not None and trial.peak_tensor_bytes is not None


def fronts(methods: MethodFindings) -> list[MethodTrial]:
    """Return the trials of the front, fastest first."""
    found = [trial for trial in methods.trials if trial.label in methods.front and is_measured(trial)]
    return sorted(found, key=lambda trial: trial.step_seconds.middle if trial.step_seconds else math.inf)


def pareto(methods: MethodFindings, table: Table) -> Chart | None:
    """Time against memory of every combination; None where nothing was measured."""
    measured = [trial for trial in methods.trials if is_measured(trial)]
    if not measured:
        return None
    times = [trial.step_seconds.middle for trial in measured if trial.step_seconds]
    sizes = [trial.peak_tensor_bytes for trial in measured if trial.peak_tensor_bytes]
    (unit, scale), (size_unit, size_scale) = _scales(measured)
    data, labels = [], []
    unmeasured = [
        t for t in methods.trials if not is_measured(t) and t.predicted_step_seconds and t.predicted_peak_bytes
    ]
    if unmeasured:
        data.append(_predicted_only(unmeasured, scale, size_scale))
    front = fronts(methods)
    if len(front) > 1:
        x = [trial.step_seconds.middle / scale for trial in front if trial.step_seconds]
        y = [(trial.peak_tensor_bytes or 0) / size_scale for trial in front]
        data.append(style.line(x, y, "var(--dim-mark)", 1.4, line={"shape": "hv", "dash": "dot"}, showlegend=False))
    for name, words, symbol, colour in QUALITIES:
        mine = [trial for trial in measured if fidelity(methods, trial) == name]
        if mine:
            data.append(_measured_marks(mine, scale, size_scale, colour, symbol, words))
    for index, trial in enumerate(front, 1):
        labels.append(_number(index, trial, scale, size_scale, trial.label == methods.chosen))
    data += [_ring(trial, scale, size_scale) for trial in measured if trial.label == methods.chosen]
    said = "; ".join(f"{each.label}, {_time_and_memory(each)}" for each in front)
    figure = style.layout(
        460,
        showlegend=True,
        xaxis=_log_axis(f"time of a step, {unit}", [time / scale for time in times]),
        yaxis=_log_axis(f"peak memory, {size_unit}", [size / size_scale for size in sizes]),
        annotations=labels,
    )
    return Chart(
        "pareto",
        "",
        f"{len(measured)} combinations by time of a step and peak memory; {len(front)} are on the front: {said}.",
        {"data": data, "layout": figure},
        {"legend.font.size": 11},
        "Left is faster, down is smaller, on logarithmic axes. The numbered ones are the front: nothing else is at "
        "least as good in time, memory and quality. The ring is the chosen one. Shape and colour say what a "
        "combination promises about the numbers.",
        table,
    )  # fmt: skip


def _time_and_memory(trial: MethodTrial) -> str:
    return f"{numbers.seconds(trial.step_seconds)} a step, {numbers.num_bytes(trial.peak_tensor_bytes)}"


def _scales(trials: Sequence[MethodTrial]) -> tuple[tuple[str, float], tuple[str, float]]:
    return (
        style.second_scale(trial.step_seconds.middle for trial in trials if trial.step_seconds),
        style.byte_scale(trial.peak_tensor_bytes for trial in trials if trial.peak_tensor_bytes),
    )


def _log_axis(title: str, values: list[float]) -> style.Figure:
    """Methods multiply time and memory, so equal ratios are at equal distances."""
    low, high = min(values) / 1.25, max(values) * 1.25
    ticks = style.log_ticks(low, high, most=6)
    limits = [math.log10(low), math.log10(high)]
    return style.axis(title, type="log", range=limits, tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])


def _predicted_only(trials: list[MethodTrial], scale: float, size_scale: float) -> style.Figure:
    x = [trial.predicted_step_seconds.middle / scale for trial in trials if trial.predicted_step_seconds]
    y = [(trial.predicted_peak_bytes or 0) / size_scale for trial in trials]
    hover = [
        f"<b>{style.safe(trial.label)}</b><br>predicted {numbers.seconds(trial.predicted_step_seconds)}, "
        f"{numbers.num_bytes(trial.predicted_peak_bytes)}<br>{style.safe(trial.outcome)}"
        for trial in trials
    ]
    hollow = {"line": {"color": "var(--dim-mark)", "width": 1.3}, "size": 8}
    return style.points(x, y, style.CLEAR, hover, "circle", name="not measured", marker=hollow, cliponaxis=True)


def _measured_marks(
    trials: list[MethodTrial], scale: float, size_scale: float, colour: str, symbol: str, words: str
) -> style.Figure:
    times = [trial.step_seconds for trial in trials if trial.step_seconds]
    scaled = [rescaled(each, scale) for each in times]
    hover = [
        f"<b>{style.safe(trial.label)}</b><br>{numbers.seconds(trial.step_seconds)} a step<br>"
        f"{numbers.num_bytes(trial.peak_tensor_bytes)}<br>"
        + (f"loss {numbers.nats(trial.loss)} nats" if trial.loss is not None else "no validation loss")
        for trial in trials
    ]
    y = [(trial.peak_tensor_bytes or 0) / size_scale for trial in trials]
    x = [each.middle for each in scaled]
    return style.points(
        x, y, colour, hover, symbol, name=words, error_x=style.errors(scaled, colour), marker={"size": 10}
    )


def _ring(trial: MethodTrial, scale: float, size_scale: float) -> style.Figure:
    x = [trial.step_seconds.middle / scale if trial.step_seconds else 0.0]
    y = [(trial.peak_tensor_bytes or 0) / size_scale]
    ring = {"size": 20, "line": {"color": "var(--chosen)", "width": 2.5}}
    return style.points(x, y, "var(--chosen)", [], "circle-open", name="chosen", marker=ring)


def _number(index: int, trial: MethodTrial, scale: float, size_scale: float, is_chosen: bool) -> style.Figure:
    x = trial.step_seconds.middle / scale if trial.step_seconds else 1.0
    colour = "var(--chosen)" if is_chosen else "var(--ink)"
    shift = {"xshift": 14, "yshift": 13} if is_chosen else {"xshift": 10, "yshift": 10}
    y = (trial.peak_tensor_bytes or 1) / size_scale
    ground = {"bgcolor": "var(--paper)", "borderpad": 0}
    return style.label(f"<b>{index}</b>", math.log10(x), math.log10(y), colour, **ground, **shift)


def predicted_time(methods: MethodFindings) -> Chart | None:
    """Predicted against measured time of a step; None where nothing was both."""
    pairs = [
        (trial.label, trial.predicted_step_seconds, trial.step_seconds)
        for trial in methods.trials
        if trial.predicted_step_seconds and trial.step_seconds
    ]
    unit, scale = style.second_scale(pair[2].middle for pair in pairs)
    return _against("predicted-time", "Time of a step", unit, scale, pairs, numbers.seconds)


def predicted_memory(methods: MethodFindings) -> Chart | None:
    """Predicted against measured peak memory; None where nothing was both."""
    pairs = [
        (trial.label, _sharp(trial.predicted_peak_bytes), _sharp(trial.peak_tensor_bytes))
        for trial in methods.trials
        if trial.predicted_peak_bytes and trial.peak_tensor_bytes
    ]
    unit, scale = style.byte_scale(pair[2].middle for pair in pairs)
    return _against("predicted-memory", "Peak memory", unit, scale, pairs, numbers.num_bytes)


def relative_errors(pairs: Sequence[tuple[str, Interval, Interval]]) -> list[float]:
    """Return |predicted / measured - 1| of each pair, sorted."""
    return sorted(abs(predicted.middle / measured.middle - 1) for _, predicted, measured in pairs)


def _sharp(size: float | None) -> Interval:
    value = float(size or 0.0)
    return Interval(middle=value, low=value, high=value)


def _against(
    id_: str, what: str, unit: str, scale: float, pairs: list[tuple[str, Interval, Interval]], form: numbers.Form
) -> Chart | None:
    if not pairs:
        return None
    hover = [
        f"<b>{style.safe(name)}</b><br>predicted {form(predicted)}<br>measured {form(measured)}"
        for name, predicted, measured in pairs
    ]
    first = [rescaled(predicted, scale) for _, predicted, _ in pairs]
    second = [rescaled(measured, scale) for _, _, measured in pairs]
    low = 0.8 * min(each.middle for each in (*first, *second))
    high = 1.25 * max(each.middle for each in (*first, *second))
    marks = style.points([each.middle for each in first], [each.middle for each in second], "var(--measured)", hover)
    marks |= {"error_x": style.errors(first, "var(--dim)"), "error_y": style.errors(second, "var(--dim)")}
    limits = [math.log10(low), math.log10(high)]
    ticks = style.log_ticks(low, high)
    scale_axis = {"type": "log", "range": limits, "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    found = relative_errors(pairs)
    figure = style.layout(
        380,
        xaxis=style.axis(f"predicted, {unit}", **scale_axis),
        yaxis=style.axis(f"measured, {unit}", **scale_axis),
        shapes=[style.rule(low, high, low, high)],
    )
    middle = found[len(found) // 2]
    said = f"{len(pairs)} combinations: the prediction is off by {100 * middle:.1f} % at the median, "
    said += f"{100 * found[-1]:.1f} % at worst."
    return Chart(id_, what, said, {"data": [marks], "layout": figure}, {}, said + " On the dotted line both are equal.")


def rescaled(value: Interval, scale: float) -> Interval:
    """Return a quantity in a unit of that size."""
    return Interval(middle=value.middle / scale, low=value.low / scale, high=value.high / scale)
