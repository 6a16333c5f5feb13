"""How fast and how large micro-batches are, as a figure."""

from __future__ import annotations

from tunewise.lab.findings import BatchFindings, ThroughputLine
from tunewise.report import numbers
from tunewise.report.blocks import Chart
from tunewise.report.charts import style


def micro_batches(batch: BatchFindings) -> Chart | None:
    """Speed and memory against the micro-batch; None where they were not measured."""
    found = sorted(batch.throughput, key=lambda each: each.micro_batch_size)
    if not found:
        return None
    x = [each.micro_batch_size for each in found]
    symbols = ["diamond" if size == batch.micro_batch_size else "circle" for size in x]
    colours = ["var(--chosen)" if size == batch.micro_batch_size else "var(--measured)" for size in x]
    marker = {"color": colours, "symbol": symbols, "size": [12 if s == "diamond" else 8 for s in symbols]}
    speeds = [each.tokens_per_second for each in found]
    hover = [f"{size} rows: {numbers.rate(speed)}" for size, speed in zip(x, speeds, strict=True)]
    bars = style.errors(speeds, "var(--measured)")
    data = [
        *(_fitted(batch.line, x, found[-1].tokens / found[-1].micro_batch_size) if batch.line else ()),
        style.points(x, [each.middle for each in speeds], "", hover, marker=marker, error_y=bars),
    ]  # fmt: skip
    sized = [(each.micro_batch_size, each.peak_tensor_bytes) for each in found if each.peak_tensor_bytes]
    unit, scale = style.byte_scale(size for _, size in sized)
    if sized:
        rows, sizes = zip(*sized, strict=True)
        said = [f"{row} rows: {numbers.num_bytes(size)}" for row, size in sized]
        heights = [size / scale for size in sizes]
        data += [style.line(rows, heights, "var(--dim-mark)", 1.5, yaxis="y2")]
        data += [style.points(rows, heights, "var(--dim-mark)", said, yaxis="y2", marker={"size": 7})]
    figure = style.layout(
        360,
        xaxis=style.log2_axis(x, "micro-batch, rows", anchor="y2" if sized else "y"),
        yaxis=style.axis("tokens/s", domain=[0.42 if sized else 0.0, 1.0], rangemode="tozero", nticks=5),
    )
    if sized:
        figure["yaxis2"] = style.axis(f"peak, {unit}", domain=[0.0, 0.32], rangemode="tozero", anchor="x", nticks=4)
    parts = [f"{size} rows: {numbers.rate(speed)}" for size, speed in zip(x, speeds, strict=True)]
    return Chart(
        "micro-batches",
        "Speed and memory of each micro-batch",
        f"Speed by micro-batch: {'; '.join(parts)}. Chosen: {batch.micro_batch_size}.",
        {"data": data, "layout": figure},
        {},
        "How the chosen batch passes through the machine; this changes speed and memory, not what is learnt.",
    )


def _fitted(fit: ThroughputLine, x: list[int], tokens_per_row: float) -> list[style.Figure]:
    grid = [x[0] * (x[-1] / x[0]) ** (index / 40) for index in range(41)]
    speeds = [tokens_per_row * rows / (fit.t0_seconds + fit.t1_seconds_per_row * rows) for rows in grid]
    return [style.line(grid, speeds, "var(--dim-mark)", 1.5, line={"dash": "dot"})]
