"""How good the predictions were that pruned the trials."""

from __future__ import annotations

from tunewise.lab.findings import MethodFindings, TrainingResult
from tunewise.report import numbers
from tunewise.report.blocks import Block, Chart, Group, Note, Section, Words
from tunewise.report.charts.methods import predicted_memory, predicted_time

TITLE = "Predicted against measured"


def prediction_section(methods: MethodFindings, training: TrainingResult | None) -> Section:
    """Return the section on predictions."""
    charts = (predicted_time(methods), predicted_memory(methods))
    drawn: tuple[Chart | Words | Note, ...] = tuple(chart for chart in charts if chart is not None)
    blocks: list[Block] = []
    if drawn:
        blocks.append(Words(("The planner predicts every combination from a dry run before any is tried.",)))
        blocks.append(Group(drawn))
    else:
        blocks.append(Note("Nothing was both predicted and measured."))
    if training is not None and training.predicted_seconds is not None:
        blocks.append(
            Words(
                (
                    f"The final training was predicted to take {numbers.seconds(training.predicted_seconds)} and took "
                    f"{numbers.seconds(training.seconds)}.",
                )
            )
        )
    return Section("predictions", TITLE, "Predictions", tuple(blocks))
