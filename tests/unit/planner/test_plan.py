"""Plans: what is chosen and why, limits, the way out when nothing fits, and the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tunewise
from tunewise.cli import app
from tunewise.errors import InputError
from tunewise.machine.machine import Machine
from tunewise.methods.reading import load_recipe
from tunewise.planner import choose
from tunewise.planner.choose import NothingFits
from tunewise.planner.footprint import Footprint, footprint
from tunewise.planner.plan import Plan, plan
from tunewise.recipe import Fidelity, Recipe

Card = Callable[[int], Machine]
AMPLE, TIGHT, VERY_TIGHT, TOO_SHORT, TOO_SMALL = 8000, 200, 160, 140, 40
"""MiB. With documents of 1024 tokens: all fits; checkpointing; nf4 as well; shorter documents; nothing."""

ADAPTER: dict[str, Any] = {"length": 1024, "wanted": ("lora",)}


def names(found: Plan) -> set[str]:
    return {method.name for method in found.recipe.methods or ()}


def test_what_fits_without_a_memory_method_does_not_get_one(tiny: str, card: Card) -> None:
    found = tunewise.plan(tiny, machine=card(AMPLE), **ADAPTER)
    assert not names(found) & {"checkpointing", "quantize", "adamw_8bit"}
    assert "No method that only saves memory is needed." in found.reasons
    assert any("fits without all blocks checkpointed" in each.reason for each in found.rejected)


def test_a_tight_memory_gets_what_it_needs_and_the_reason(tiny: str, card: Card) -> None:
    found = plan(tiny, machine=card(TIGHT), **ADAPTER)
    assert "checkpointing" in names(found)
    assert "quantize" not in names(found)
    assert any("needed, because with 'activations kept' it needs" in reason for reason in found.reasons)
    assert found.best.is_confirmed
    assert found.best.peak_bytes <= found.limit_bytes < found.usable_bytes
    assert found.limit_bytes == int(found.usable_bytes * (1 - choose.SAFETY_MARGIN))
    assert {"checkpointing", "quantize"} <= names(plan(tiny, machine=card(VERY_TIGHT), **ADAPTER))


def test_every_combination_is_chosen_or_rejected_with_a_reason(tiny: str, card: Card) -> None:
    found = plan(tiny, machine=card(TIGHT), **ADAPTER)
    labels = {row.label for row in found.front}
    assert found.best.label in labels
    assert len({each.choice.label for each in found.rejected} | labels) == found.num_combinations
    assert all(each.reason for each in found.rejected)


def test_nothing_on_the_front_beats_another(tiny: str, card: Card) -> None:
    rows = plan(tiny, machine=card(AMPLE), length=1024, unwanted=("quantize",)).front
    order = list(Fidelity)
    keys = [
        (row.peak_bytes, row.step_seconds.middle, (order.index(row.fidelity), row.num_approximations)) for row in rows
    ]
    assert len(keys) > 2
    for first in keys:
        others = [other for other in keys if other != first]
        assert not any(a <= first[0] and b <= first[1] and c <= first[2] for a, b, c in others)


def test_wishes_and_quality(tiny: str, card: Card) -> None:
    machine = card(AMPLE)
    assert "quantize" in names(plan(tiny, length=1024, machine=machine, wanted=("quantize",)))
    full = plan(tiny, length=1024, machine=machine, quality="rounding")
    assert not names(full) & {"lora", "quantize"}
    assert full.best.fidelity == "rounding"


def test_limits_of_time_and_cost(tiny: str, card: Card) -> None:
    machine = card(AMPLE)
    free = plan(tiny, machine=machine, price=3.0, num_documents=1600, **ADAPTER)
    assert free.best.cost is not None
    assert free.best.cost.middle == pytest.approx(3.0 * free.best.run_seconds.middle / 3600)
    assert free.best.run_seconds.middle == pytest.approx(300 * free.best.step_seconds.middle)
    with pytest.raises(NothingFits, match=r"drop the limits of time and cost: .*iB, .* at a price of \d"):
        plan(tiny, machine=machine, price=3.0, num_documents=1600, time=free.best.run_seconds.middle / 2, **ADAPTER)
    with pytest.raises(InputError, match="--documents"):
        plan(tiny, length=1024, machine=machine, time="1h")
    with pytest.raises(InputError, match="--price"):
        plan(tiny, length=1024, machine=machine, num_documents=100, cost=5)


def test_a_time_that_nothing_keeps_costs_no_traces_of_full_fine_tuning(
    tiny: str, card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNEWISE_CACHE", str(tmp_path))
    traced: list[str] = []

    def seen(recipe: Recipe, *arguments: Any, **options: Any) -> Footprint:
        names = {method.name for method in recipe.methods or ()}
        traced.append("lora" if "lora" in names else " ".join(sorted(names & {"checkpointing", "adafactor", "lion"})))
        return footprint(recipe, *arguments, **options)

    monkeypatch.setattr("tunewise.planner.predict.footprint", seen)
    with pytest.raises(NothingFits, match="drop the limits of time"):
        plan(tiny, machine=card(TIGHT), length=1024, num_documents=1600, time=0.001)
    assert "lora" in traced
    assert not {name for name in traced if name} - {"lora"}  # of full fine-tuning only what all its variants share


def test_wishes_that_exclude_each_other_are_named(tiny: str, card: Card) -> None:
    with pytest.raises(NothingFits, match=r"None comes into question: \d+ .*; \d+ with lora, which was not wanted\."):
        plan(tiny, machine=card(TIGHT), length=1024, wanted=("quantize",), unwanted=("lora",))


def test_when_nothing_fits_the_nearest_recipe_is_named(tiny: str, card: Card) -> None:
    with pytest.raises(NothingFits) as caught:
        plan(tiny, machine=card(VERY_TIGHT), unwanted=("quantize",), **ADAPTER)
    assert caught.value.give_up == "allow quantize"
    assert caught.value.nearest is not None
    assert {"quantize", "lora"} <= {method.name for method in caught.value.nearest.methods or ()}
    with pytest.raises(NothingFits, match="if you cut documents to 512 tokens") as cut:
        plan(tiny, length=1024, machine=card(TOO_SHORT))
    assert cut.value.nearest is not None
    assert cut.value.nearest.data.max_length == 512
    with pytest.raises(NothingFits, match="smallest machine of the catalogue") as hopeless:
        plan(tiny, length=1024, machine=card(TOO_SMALL))
    assert hopeless.value.nearest is None


def test_the_learning_rate_belongs_to_the_chosen_methods(tiny: str, card: Card) -> None:
    lora = plan(tiny, machine=card(AMPLE), **ADAPTER).recipe.training.learning_rate
    full = plan(tiny, machine=card(AMPLE), length=1024, quality="rounding").recipe.training.learning_rate
    assert lora == pytest.approx(10 * (full or 0), rel=0.1)
    fixed = plan(tiny, machine=card(AMPLE), settings=("training.learning_rate=1e-4",), **ADAPTER)
    assert fixed.recipe.training.learning_rate == 1e-4


def test_the_second_time_nothing_is_traced_again(tiny: str, card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    first = plan(tiny, machine=card(TIGHT), **ADAPTER)

    def forbidden(*arguments: Any, **options: Any) -> None:
        raise AssertionError("traced again")

    monkeypatch.setattr("tunewise.planner.footprint.TraceJob", forbidden)
    monkeypatch.setattr("tunewise.planner.predict.dry_run", forbidden)
    second = plan(tiny, machine=card(TIGHT), **ADAPTER)
    assert second.best == first.best
    assert second.rejected == first.rejected


def test_shapes_that_run_badly_are_named(tiny: str) -> None:
    found = plan(tiny, machine="A100 80GB", **ADAPTER)
    assert any("vocabulary 8001: pad to 8064" in sentence for sentence in found.advice)


def test_the_command_writes_a_recipe_that_training_reads(tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "recipe.yaml"
    options = ["plan", tiny, "--length", "1024", "--machine", "T4", "--with", "lora", "--memory", "4GB"]
    result = CliRunner().invoke(app, [*options, "--json", "--out", str(out)])
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    recipe = load_recipe(out)
    assert recipe.to_mapping() == content["best"]["recipe"]
    assert content["usable_bytes"] < 4e9
    assert sum(content["best"]["kinds"].values()) < content["best"]["peak_bytes"]
    assert content["rejected"][0]["reason"]
    peaks = {
        moment: sum(size for kind, size in kinds.items() if kind != "host")
        for moment, kinds in content["moments"].items()
    }
    assert list(peaks) == ["forward", "backward", "update", "evaluation", "save"]
    assert max(peaks.values()) == sum(content["best"]["kinds"].values())
    assert content["moments"]["save"]["host"] > 0
    assert sum(content["speed_limits"].values()) == pytest.approx(1)


def test_the_table_says_what_limits(tiny: str) -> None:
    result = CliRunner().invoke(app, ["plan", tiny, "--length", "1024", "--machine", "T4", "--with", "lora"])
    assert result.exit_code == 0, result.output
    for words in (
        "memory at the peak",
        "peak by moment",
        "limited by memory traffic",
        "head-room above the margin",
        "rejected",
    ):
        assert words in result.stdout


def test_explaining_a_method_shows_before_and_after(tiny: str) -> None:
    options = ["plan", tiny, "--length", "1024", "--machine", "T4", "--with", "lora"]
    result = CliRunner().invoke(app, [*options, "--explain", "checkpointing", "--json"])
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    without, with_it = content["without"], content["with_it"]
    assert with_it["kinds"]["activations"] < without["kinds"]["activations"]
    assert with_it["step_flops"] > without["step_flops"]
    assert with_it["kinds"]["weights"] == without["kinds"]["weights"]
    assert with_it["trainable"] == without["trainable"]
    assert content["notes"] == ["The recommended plan does not have checkpointing."]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "Give either data or a length"),
        ({"length": 64, "data": "x.jsonl"}, "Give either data or a length"),
        ({"length": 100000}, "the model's context"),
        ({"length": 64, "machine": "RTX 9999"}, "nearest is"),
        ({"length": 64, "quality": "best"}, "exact, rounding or learning"),
        ({"length": 64, "memory": "100MB"}, "context"),
        ({"length": 64, "settings": ("methods.lora.rank=4",)}, "--with METHOD"),
    ],
)
def test_bad_questions_are_errors(tiny: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        plan(tiny, **{"machine": "T4", **options})
