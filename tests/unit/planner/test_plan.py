"""Plans: what is chosen and why, limits, the way out when nothing fits, and the command line."""

from __future__ import annotations

import json
import time
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
from tunewise.planner.plan import Plan, plan

Card = Callable[[int], Machine]
AMPLE, TIGHT, TOO_SMALL = 1000, 40, 3


def names(found: Plan) -> set[str]:
    return {method.name for method in found.recipe.methods or ()}


def test_what_fits_without_a_memory_method_does_not_get_one(tiny: str, card: Card) -> None:
    found = tunewise.plan(tiny, length=256, machine=card(AMPLE))
    assert not names(found) & {"checkpointing", "quantize", "adamw_8bit"}
    assert "lora" in names(found)
    assert "No method that only saves memory is needed." in found.reasons
    assert any("fits without all blocks checkpointed" in each.reason for each in found.rejected)


def test_a_tight_memory_gets_what_it_needs_and_the_reason(tiny: str, card: Card) -> None:
    found = plan(tiny, length=256, machine=card(TIGHT))
    assert "checkpointing" in names(found)
    assert any("needed, because with 'activations kept' it needs" in reason for reason in found.reasons)
    assert found.best.is_confirmed
    assert found.best.peak_bytes <= found.limit_bytes < found.usable_bytes
    assert found.limit_bytes == int(found.usable_bytes * (1 - choose.SAFETY_MARGIN))


def test_every_combination_is_chosen_or_rejected_with_a_reason(tiny: str, card: Card) -> None:
    found = plan(tiny, length=256, machine=card(TIGHT))
    labels = {row.label for row in found.front}
    assert found.best.label in labels
    assert len({each.choice.label for each in found.rejected} | labels) == found.num_combinations
    assert all(each.reason for each in found.rejected)


def test_nothing_on_the_front_beats_another(tiny: str, card: Card) -> None:
    rows = plan(tiny, length=256, machine=card(TIGHT)).front
    keys = [(row.peak_bytes, row.step_seconds.middle, (str(row.fidelity), row.num_approximations)) for row in rows]
    for first in keys:
        beating = [k for k in keys if k != first and k[0] <= first[0] and k[1] <= first[1] and k[2] <= first[2]]
        assert not beating


def test_wishes_and_quality(tiny: str, card: Card) -> None:
    assert "quantize" in names(plan(tiny, length=256, machine=card(AMPLE), wanted=("quantize",)))
    full = plan(tiny, length=256, machine=card(AMPLE), quality="rounding")
    assert not names(full) & {"lora", "quantize"}
    assert full.best.fidelity == "rounding"


def test_limits_of_time_and_cost(tiny: str, card: Card) -> None:
    machine = card(AMPLE)
    free = plan(tiny, length=256, machine=machine, price=3.0, num_documents=1600)
    assert free.best.cost is not None
    assert free.best.cost.middle == pytest.approx(3.0 * free.best.run_seconds.middle / 3600)
    assert free.best.run_seconds.middle == pytest.approx(300 * free.best.step_seconds.middle)
    with pytest.raises(NothingFits, match="drop the limits of time and cost"):
        plan(tiny, length=256, machine=machine, num_documents=1600, time=free.best.run_seconds.middle / 2)
    with pytest.raises(InputError, match="--documents"):
        plan(tiny, length=256, machine=machine, time="1h")
    with pytest.raises(InputError, match="--price"):
        plan(tiny, length=256, machine=machine, num_documents=100, cost=5)


def test_when_nothing_fits_the_nearest_recipe_is_named(tiny: str, card: Card) -> None:
    wishes: dict[str, Any] = {"unwanted": ("checkpointing",), "wanted": ("whole_loss",), "quality": "exact"}
    with pytest.raises(NothingFits) as caught:
        plan(tiny, length=256, machine=card(TIGHT), **wishes)
    assert caught.value.nearest is not None
    assert caught.value.give_up
    assert "What fits, if you" in str(caught.value)
    with pytest.raises(NothingFits, match="smallest machine of the catalogue") as hopeless:
        plan(tiny, length=256, machine=card(TOO_SMALL))
    assert hopeless.value.nearest is None


def test_the_learning_rate_belongs_to_the_chosen_methods(tiny: str, card: Card) -> None:
    lora, full = (plan(tiny, length=64, machine=card(AMPLE), wanted=each) for each in (("lora",), ()))
    exact = plan(tiny, length=64, machine=card(AMPLE), quality="exact")
    assert lora.recipe.training.learning_rate == full.recipe.training.learning_rate
    assert lora.recipe.training.learning_rate == pytest.approx(10 * (exact.recipe.training.learning_rate or 0), rel=0.1)
    fixed = plan(tiny, length=64, machine=card(AMPLE), settings=("training.learning_rate=1e-4",))
    assert fixed.recipe.training.learning_rate == 1e-4


def test_the_second_time_nothing_is_traced_again(tiny: str, card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    first = plan(tiny, length=192, machine=card(TIGHT))

    def forbidden(*arguments: Any, **options: Any) -> None:
        raise AssertionError("traced again")

    monkeypatch.setattr("tunewise.planner.footprint.trace", forbidden)
    monkeypatch.setattr("tunewise.planner.predict.dry_run", forbidden)
    started = time.perf_counter()
    second = plan(tiny, length=192, machine=card(TIGHT))
    assert time.perf_counter() - started < 10
    assert second.best == first.best
    assert second.rejected == first.rejected


def test_shapes_that_run_badly_are_named(tiny: str) -> None:
    found = plan(tiny, length=64, machine="A100 80GB")
    assert any("vocabulary 1001: pad to 1024" in sentence for sentence in found.advice)


def test_the_command_writes_a_recipe_that_training_reads(tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "recipe.yaml"
    result = CliRunner().invoke(
        app, ["plan", tiny, "--length", "128", "--machine", "T4", "--memory", "4GB", "--json", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    recipe = load_recipe(out)
    assert recipe.to_mapping() == content["best"]["recipe"]
    assert content["usable_bytes"] < 4e9
    assert sum(content["best"]["kinds"].values()) < content["best"]["peak_bytes"]
    assert content["rejected"][0]["reason"]


def test_the_table_says_what_limits(tiny: str) -> None:
    result = CliRunner().invoke(app, ["plan", tiny, "--length", "128", "--machine", "T4"])
    assert result.exit_code == 0, result.output
    for words in ("memory at the peak", "head-room above the margin", "tokens/s", "rejected", "activations"):
        assert words in result.stdout


def test_explaining_a_method_shows_before_and_after(tiny: str) -> None:
    options = ["plan", tiny, "--length", "512", "--machine", "T4", "--explain", "checkpointing", "--json"]
    result = CliRunner().invoke(app, options)
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
