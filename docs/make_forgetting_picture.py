"""Draw gain against forgetting from the benchmark's figures: every cure a point, the scaled run a curve.

python docs/make_forgetting_picture.py benchmarks/results/cpu-2core/forgetting.json
"""

from __future__ import annotations

import html
import json
import math
import sys
from pathlib import Path
from typing import Any

PICTURE = Path(__file__).parent / "pictures" / "forgetting.svg"
WIDTH, HEIGHT = 470, 400
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 44, 48
STYLE = """
text { font: 12px Inter, system-ui, sans-serif; fill: #26303b; }
.title { font-size: 14px; font-weight: 600; } .small { font-size: 10.5px; fill: #66717d; }
.grid { stroke: #e3e7eb; } .axis { stroke: #9aa4ae; } .curve { fill: none; stroke: #8b98a5; stroke-width: 1.5; }
.step { fill: #8b98a5; } .arm { fill: #1f6fb2; } .plain { fill: #c2410c; } .error { stroke: #1f6fb2; stroke-width: 1; }
@media (prefers-color-scheme: dark) {
  text { fill: #dde3e9; } .small { fill: #9aa7b3; } .grid { stroke: #2c343c; } .axis { stroke: #5c6772; }
  .arm { fill: #60a5e0; } .error { stroke: #60a5e0; } .plain { fill: #f28b54; }
}
"""


class Panel:
    """One model: its axes, and what is drawn between them."""

    def __init__(self, left: int, figures: dict[str, Any], title: str) -> None:
        self.left, self.figures, self.title = left, figures, title
        arms, scaling = figures["arms"].values(), figures.get("scaling")
        self.curve: list[tuple[float, float, float]] = []
        if scaling is not None:
            task, general = scaling["task"], scaling["general"]
            points = zip(scaling["factors"], general, task, strict=True)
            self.curve = [(factor, lost - general[0], task[0] - loss) for factor, lost, loss in points]
        xs = [arm["forgetting"]["mean"] for arm in arms] + [x for _, x, _ in self.curve] + [0.0]
        ys = [arm["gain"]["mean"] for arm in arms] + [y for _, _, y in self.curve] + [0.0]
        self.x_low, self.x_high = min(xs), max(xs) + 0.22 * (max(xs) - min(xs))
        self.y_low, self.y_high = min(ys), max(ys) + 0.08 * (max(ys) - min(ys))

    def x(self, value: float) -> float:
        """From nats of forgetting to pixels."""
        inner = WIDTH - LEFT - RIGHT
        return self.left + LEFT + inner * (value - self.x_low) / (self.x_high - self.x_low)

    def y(self, value: float) -> float:
        """From nats of gain to pixels."""
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - self.y_low) / (self.y_high - self.y_low)

    def draw(self) -> list[str]:
        """Return the panel's elements."""
        left, right, bottom = self.left + LEFT, self.left + WIDTH - RIGHT, HEIGHT - BOTTOM
        drawn = [text(left, 22, self.title, "title")]
        for tick in ticks(self.x_low, self.x_high):
            drawn += [line(self.x(tick), TOP, self.x(tick), bottom, "grid")]
            drawn += [text(self.x(tick), bottom + 16, f"{tick:g}", "small", "middle")]
        for tick in ticks(self.y_low, self.y_high):
            drawn += [line(left, self.y(tick), right, self.y(tick), "grid")]
            drawn += [text(left - 6, self.y(tick) + 4, f"{tick:g}", "small", "end")]
        drawn += [line(left, bottom, right, bottom, "axis"), line(left, TOP, left, bottom, "axis")]
        drawn += [text((left + right) / 2, HEIGHT - 12, "forgetting, nats per token of its own domain", "", "middle")]
        drawn += [text(left, 38, "gain on Shakespeare, nats per token", "small")]
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for _, x, y in self.curve)
        drawn += [f'<polyline class="curve" points="{path}"/>'] if self.curve else []
        for factor, x, y in self.curve:
            drawn += [f'<circle class="step" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="2"/>']
            if factor in (0.25, 0.5, 0.75, 1.25):
                drawn += [text(self.x(x) - 5, self.y(y) - 5, f"×{factor:g}", "small", "end")]
        return drawn + self._arms()

    def _arms(self) -> list[str]:
        drawn, taken = [], []
        for name, arm in sorted(self.figures["arms"].items(), key=lambda item: item[1]["gain"]["mean"]):
            x, y = self.x(arm["forgetting"]["mean"]), self.y(arm["gain"]["mean"])
            for deviation, dx, dy in ((arm["forgetting"]["deviation"], 1, 0), (arm["gain"]["deviation"], 0, 1)):
                if deviation is not None:
                    far_x = abs(self.x(deviation) - self.x(0.0)) * dx
                    far_y = abs(self.y(deviation) - self.y(0.0)) * dy
                    drawn += [line(x - far_x, y - far_y, x + far_x, y + far_y, "error")]
            kind = "plain" if name == "plain" else "arm"
            drawn += [f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>']
            label_y = y + 4
            while any(abs(label_y - other_y) < 13 and abs(x - other_x) < 95 for other_x, other_y in taken):
                label_y -= 13
            taken.append((x, label_y))
            drawn += [text(x + 9, label_y, name)]
        return drawn


def ticks(low: float, high: float) -> list[float]:
    """Return some four to seven round numbers between two."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= raw)
    return [round(step * number, 10) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def text(x: float, y: float, content: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(content)}</text>'


def main(file: Path) -> None:
    found = json.loads(file.read_text(encoding="utf-8"))["summary"]
    drawn = []
    for number, (world, figures) in enumerate(found.items()):
        seeds = figures["arms"]["plain"]["gain"]["seeds"]
        drawn += Panel(number * WIDTH, figures, f"{world}, {seeds} seeds").draw()
    size = f'viewBox="0 0 {WIDTH * len(found)} {HEIGHT}" width="{WIDTH * len(found)}" height="{HEIGHT}"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n<style>{STYLE}</style>\n'
    PICTURE.write_text(svg + "\n".join(drawn) + "\n</svg>\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
