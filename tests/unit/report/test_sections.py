"""What the sections say and draw: the numbers of the findings, and why something is missing."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.unit.report.sample_batch import BATCHES, SEED_NOISE, batch
from tests.unit.report.sample_methods import methods
from tests.unit.report.samples import CASES, COSTS, findings, training
from tunewise.lab.findings import Findings
from tunewise.lab.outcome import Interval
from tunewise.report.blocks import Block, Chart, Code, Group, Note, Section, Table, Words, bars, charts_of
from tunewise.report.charts.arms import thinned
from tunewise.report.charts.style import log_ticks, shortened
from tunewise.report.sections import sections_of
from tunewise.report.sections.effects import ladder_steps
from tunewise.report.sections.head import date_in_words, head_of

FULL = {"batch-curve", "rounds", "learning-rates", "micro-batches", "pareto", "contribution-time"} | {
    "contribution-memory", "main-effects", "pairs-time", "pairs-memory", "predicted-time", "predicted-memory",
    "loss-curves", "training",
}  # fmt: skip


def section(found: Findings, name: str) -> Section:
    return next(each for each in sections_of(found) if each.id == name)


def flat(blocks: tuple[Block, ...]) -> list[Block]:
    return [inner for block in blocks for inner in (block.blocks if isinstance(block, Group) else (block,))]


def words(part: Section) -> str:
    said: list[str] = []
    for block in flat(part.blocks):
        if isinstance(block, Note):
            said.append(block.text)
        elif isinstance(block, Words):
            said += block.paragraphs
        elif isinstance(block, Table):
            said += [f"{cell.text} {cell.under}" for row in block.rows for cell in row.cells] + [block.foot]
        elif isinstance(block, Chart):
            said.append(block.caption)
        elif isinstance(block, Code):
            said.append(block.text)
    return "\n".join(said)


def table(found: Findings, name: str, caption: str) -> Table:
    tables = [each for each in flat(section(found, name).blocks) if isinstance(each, Table)]
    return next(each for each in tables if each.caption == caption)


def chart(found: Findings, name: str) -> Chart:
    return next(each for each in charts_of(sections_of(found)) if each.id == name)


def trace(drawn: Chart, **wanted: Any) -> dict[str, Any]:
    found: dict[str, Any] = next(t for t in drawn.figure["data"] if all(t.get(k) == v for k, v in wanted.items()))
    return found


def test_a_whole_tuning_has_every_figure() -> None:
    assert {each.id for each in charts_of(sections_of(findings()))} == FULL


@pytest.mark.parametrize("case", sorted(CASES))
def test_no_figure_is_empty_and_no_section_is_blank(case: str) -> None:
    for part in sections_of(CASES[case]()):
        assert part.blocks, part.id
        assert words(part).strip() or any(isinstance(block, Chart) for block in flat(part.blocks))
    for drawn in charts_of(sections_of(CASES[case]())):
        assert any(t.get("x") or t.get("z") for t in drawn.figure["data"]), drawn.id


@pytest.mark.parametrize(
    ("case", "part", "why"),
    [
        ("batch_only", "methods", "No methods were tried"),
        ("batch_only", "training", "Nothing was trained in the end"),
        ("batch_only", "elsewhere", "No plan was made for another machine"),
        ("methods_only", "batch", "No batch study was run"),
        ("methods_only", "training", "Winner and runner-up were not compared"),
        ("cut_short", "methods", "stopped by its budget of 30 s after 7 trials"),
        ("one_method", "interactions", "Only packing could be switched"),
        ("no_validation", "ladder", "There is no validation loss, so equal quality is not shown"),
        ("no_validation", "training", "Without validation data it is not known"),
        ("batch_only", "left-out", "Nothing was excluded"),
        ("one_batch", "batch", "Only one batch size gave a result, so there is no curve"),
        ("one_batch", "training", "No arm of the batch study left a loss curve"),
        ("one_batch", "interactions", "was not measured: the budget does not suffice for a factorial design"),
    ],
)
def test_what_is_missing_says_why(case: str, part: str, why: str) -> None:
    assert why in words(section(CASES[case](), part))


def test_the_batch_curve_marks_choice_band_and_what_was_dropped() -> None:
    drawn = chart(findings(), "batch-curve")
    study = batch()
    best = min(point.loss.middle for point in study.curve if point.budget_tokens == 324_000)
    band = next(shape for shape in drawn.figure["layout"]["shapes"] if shape["fillcolor"] == "var(--band)")
    assert (band["y0"], band["y1"]) == (best, best + study.tie_band)
    noise = next(shape for shape in drawn.figure["layout"]["shapes"] if shape["fillcolor"] == "var(--noise-band)")
    assert (noise["x0"], noise["x1"]) == (3600, 6100), "the estimator with the narrower interval"
    losses = next(t for t in drawn.figure["data"] if "error_y" in t)
    assert losses["x"] == [1024, 2048, 4096]
    assert losses["error_y"]["array"] == pytest.approx([2 * SEED_NOISE / math.sqrt(3)] * 3)
    crosses = next(t for t in drawn.figure["data"] if t.get("marker", {}).get("symbol") == "x")
    assert crosses["x"] == [512, 8192, 16384]
    diamond = next(t for t in drawn.figure["data"] if t.get("marker", {}).get("symbol") == "diamond")
    assert diamond["x"] == [4096]
    runs = [t for t in drawn.figure["data"] if t.get("yaxis") == "y3"][-1]
    assert runs["x"] == list(BATCHES)
    assert drawn.figure["layout"]["xaxis"]["tickvals"] == list(BATCHES)


def test_a_noise_scale_without_bound_has_no_band_and_says_so() -> None:
    found = CASES["cut_short"]()
    drawn = chart(found, "batch-curve")
    assert "vertical band" not in drawn.caption
    assert not [s for s in drawn.figure["layout"]["shapes"] if s["fillcolor"] == "var(--noise-band)"]
    assert drawn.numbers is not None
    assert [cell.text for cell in drawn.numbers.rows[0].cells[1:3]] == ["lost in the noise", "900 to no bound"]


def test_a_noise_scale_outside_of_the_axis_is_told_at_its_edge() -> None:
    two, single = batch().noise
    far = single.model_copy(update={"tokens": None, "low": 90_000.0, "high": None})
    near = two.model_copy(update={"tokens": 60.0, "low": 40.0, "high": 90.0})
    labels = chart(findings(batch=batch(noise=(near, far))), "batch-curve").figure["layout"]["annotations"]
    assert {"← 40.0 to 90.0", "90,000 to no bound →"} <= {label["text"] for label in labels}


def test_the_verdict_on_each_batch() -> None:
    rows = table(findings(), "batch", "Every batch size tried").rows
    assert {row.cells[0].text: row.cells[3].text for row in rows} == {
        "512": "dropped after 108,000 tokens",
        "1,024": "as good, within noise",
        "2,048": "lowest loss, but slower",
        "4,096": "chosen",
        "8,192": "dropped after 108,000 tokens",
        "16,384": "dropped after 36,000 tokens",
    }
    assert [row.is_chosen for row in rows] == [False, False, False, True, False, False]


def test_estimators_that_contradict_each_other_are_named() -> None:
    two, single = batch().noise
    apart = batch(noise=(two, single.model_copy(update={"low": 9000.0, "tokens": 9500.0, "high": 9900.0})))
    assert "contradict" in words(section(findings(batch=apart), "batch"))
    assert "agree within their intervals" in words(section(findings(), "batch"))


def test_every_rung_shows_time_memory_and_loss_with_what_is_known_about_them() -> None:
    rows = table(findings(), "ladder", "One method after the other").rows
    assert [row.cells[0].text for row in rows] == ["baseline", "+ packing", "+ bf16", "+ chunked loss"]
    assert rows[1].cells[0].under == "padded → packed"
    for row, trial in zip(rows, methods().trials[:1], strict=False):
        assert trial.step_seconds is not None
        assert row.cells[1].text == f"{trial.step_seconds.middle:.2f} s"
    assert all(" to " in row.cells[1].under for row in rows)
    assert all(row.cells[5].under == "± 0.012" for row in rows)
    assert [round(row.cells[3].bar.share, 2) for row in rows if row.cells[3].bar] == [1.0, 0.88, 0.51, 0.37]


def test_a_loss_of_one_seed_says_so() -> None:
    found = CASES["methods_only"]()
    rows = table(found, "ladder", "One method after the other").rows
    assert {row.cells[5].under for row in rows} == {"one seed"}
    assert "the noise between seeds was not measured" in words(section(found, "ladder"))


def test_a_baseline_that_does_not_run_is_no_stumbling_block() -> None:
    base = methods()
    gone = {"step_seconds": None, "tokens_per_second": None, "peak_tensor_bytes": None, "outcome": "out of memory"}
    trials = (base.trials[0].model_copy(update=gone), *base.trials[1:])
    found = findings(methods=base.model_copy(update={"trials": trials}))
    assert "the baseline did not run: out of memory" in " ".join(tile.under for tile in head_of(found).tiles)
    rows = table(found, "ladder", "One method after the other").rows
    assert (rows[0].cells[1].text, rows[0].cells[0].under) == ("n/a", "out of memory")
    assert rows[1].cells[2].text == "n/a"


def test_the_front_is_numbered_from_the_fastest() -> None:
    rows = table(findings(), "front", "What no other combination beats").rows
    assert [row.cells[0].text[0] for row in rows] == ["1", "2", "3", "4"]
    drawn = chart(findings(), "pareto")
    assert [label["text"] for label in drawn.figure["layout"]["annotations"]] == [f"<b>{n}</b>" for n in (1, 2, 3, 4)]
    ring = trace(drawn, name="chosen")
    assert ring["y"] == [pytest.approx(136.6, abs=0.5)]
    assert len(trace(drawn, name="not measured")["x"]) == 3


def test_what_a_rung_multiplies_by() -> None:
    steps = ladder_steps(methods())
    assert set(steps) == {"packing", "bf16", "chunked loss"}
    time, memory = steps["packing"]
    assert time is not None
    assert memory is not None
    assert time.low < time.middle < time.high
    assert time.middle == pytest.approx(0.46, rel=0.06)
    assert memory.middle == pytest.approx(0.88, rel=1e-3)


def test_a_method_that_is_not_in_the_final_recipe_has_no_ratio_there() -> None:
    rows = table(findings(), "contributions", "Alone, in the ladder, left out").rows
    assert [cell.text for cell in rows[3].cells] == ["checkpointing", "+29 %", "–", "–", "−39 %", "–", "–", "0.000"]
    assert rows[2].cells[1].tone == "dim", "+2 % with an interval around zero is no effect"
    assert rows[0].cells[1].tone == ""


def test_the_product_against_the_whole() -> None:
    said = words(section(findings(), "interactions"))
    assert "The whole is 1.09 times the product: together they save less time than one by one." in said
    assert "The two cannot be told apart: the effects simply multiply." in said
    assert "1 of 12 can be told from none" in said
    drawn = chart(findings(), "pairs-time").figure["data"][0]
    assert drawn["text"][0][0].startswith("<b>×1.1")
    assert drawn["z"][0][1] is None


def test_two_methods_are_listed_and_not_mapped() -> None:
    found = findings(methods=methods(names=("packing", "bf16")))
    rows = table(found, "interactions", "Pairs of methods").rows
    assert [row.cells[0].text for row in rows] == ["packing × bf16", "packing × bf16"]
    assert rows[0].cells[3].text == "together they save less"


def test_predictions_are_judged() -> None:
    drawn = chart(findings(), "predicted-memory")
    assert "16 combinations: the prediction is off by 0.9 % at the median" in drawn.caption
    diagonal = drawn.figure["layout"]["shapes"][0]
    assert (diagonal["x0"], diagonal["x1"]) == (diagonal["y0"], diagonal["y1"])


def test_loss_curves_of_all_arms() -> None:
    drawn = chart(findings(), "loss-curves")
    dim = trace(drawn, name="earlier rounds")
    assert dim["x"].count(None) == sum(arm.rung < 2 for arm in batch().arms)
    assert len(drawn.figure["data"]) - 1 == sum(arm.rung == 2 for arm in batch().arms)
    assert [t["name"] for t in drawn.figure["data"] if t.get("showlegend")] == ["1,024", "2,048", "4,096 (chosen)"]


def test_the_cost_adds_up() -> None:
    said = words(section(findings(), "cost"))
    assert "The search took 4.39 min, which costs 0.0059 at 0.08 an hour, 2.2 times the final training" in said
    assert f"Trials run: {sum(cost.num_trials for cost in COSTS)}, of them without a result: 0" in said
    shares = [row.cells[2].text for row in table(findings(), "cost", "Time by part").rows]
    assert sum(int(share.removesuffix(" %")) for share in shares) == pytest.approx(100, abs=2)


def test_everything_that_failed_is_listed_with_its_reason() -> None:
    said = words(section(CASES["with_failures"](), "left-out"))
    for reason in (
        "out of memory",
        "no answer for 60 s: killed",
        "not finite at step 9",
        "its gradient differs by 0.31",
    ):
        assert reason in said
    assert "the interpreter crashed (signal 11)" in words(section(CASES["with_failures"](), "training"))


def test_a_training_that_made_it_worse_says_so() -> None:
    worse = findings(training=training(best_loss=3.6))
    assert "did not fall: from 3.520 to 3.600" in words(section(worse, "training"))


def test_the_top_of_the_page() -> None:
    head = head_of(findings())
    assert head.title == "embedded on stdlib"
    assert head.subject == "AMD EPYC 9B45, 2 cores · 11 February 2026, 14:32 UTC"
    assert len(head.sentences) == 3
    assert head.warning == ""
    values = {tile.title: f"{tile.value} {tile.unit}".strip() for tile in head.tiles}
    assert values == {
        "Batch": "4,096 tokens", "Speed": "2.83×", "Peak memory": "137 MiB", "Validation loss": "1.884 nats",
        "Final training": "118 s", "Cost of finding out": "4.39 min",
    }  # fmt: skip
    assert head_of(CASES["cut_short"]()).warning.startswith("stopped by its budget")
    assert date_in_words("yesterday") == "yesterday"


def test_the_recipe_and_the_command_can_be_copied() -> None:
    codes = [block for block in section(findings(), "recipe").blocks if isinstance(block, Code)]
    assert [code.text for code in codes] == ["tunewise train runs/tuned/recipe.yaml", findings().recipe_yaml]


def test_the_pieces() -> None:
    assert log_ticks(0.4, 1.4, most=4) == [0.5, 0.7, 1.0, 1.4]
    assert log_ticks(0.97, 1.05) == [1.0]
    assert len(log_ticks(1e-5, 1e5)) >= 1
    assert shortened("a" * 40, 9) == "aaaa…aaaa"
    curve = batch().arms[-1].curve
    assert thinned(curve, 3) == [curve[0], curve[6], curve[12]]
    one, none = bars([Interval(middle=1.0, low=0.5, high=2.0), None])
    assert none is None
    assert one is not None
    assert (one.share, one.low, one.high) == (0.5, 0.25, 1.0)
