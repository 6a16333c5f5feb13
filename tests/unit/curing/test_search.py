"""Which cures are tried, until when, and which one wins: cures whose outcomes a table gives."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.report.sample_cures import measured, report, uncured
from tunewise.curing.cures import AFTERWARDS, GATE_COST, Cure
from tunewise.curing.search import Question, search
from tunewise.lab.cure_findings import CureFindings
from tunewise.lab.outcome import Failed, JudgedState, Measurement, OutOfMemory
from tunewise.methods.reading import recipe_from_mapping

RECIPE = recipe_from_mapping({"model": "embedded", "data": "stdlib"})
CURES = (
    Cure(AFTERWARDS, "afterwards", 0.0),
    Cure("early-stop", "early stopping", 0.7, RECIPE),
    Cure("replay-1", "replay of 1 %", 1.0, RECIPE),
    Cure("kl", "KL to the base", 1.4, RECIPE),
)
SECONDS = 100.0


def state(name: str, gain: float, lost: float, *, passed: bool | None) -> JudgedState:
    quality = None if passed is None else report(passed=passed)
    folder = name if passed else ""
    return JudgedState(name=name, gain=measured(gain), forgetting=measured(lost), quality=quality, folder=folder)


OVER = state("scale-0.5", 0.3, 0.2, passed=None)
POOR = state("scale-0.25", 0.1, 0.04, passed=True)  # a tenth of the gain
GOOD = state("scale-0.5", 0.7, 0.04, passed=True)
TABLE: dict[str, Any] = {
    AFTERWARDS: (OVER,),
    "early-stop": (state("early-stop", 0.6, 0.045, passed=True),),
    "replay-1": (state("replay-1", 0.95, 0.03, passed=True),),
    "kl": (state("kl", 0.99, 0.03, passed=True),),
}


@dataclass
class Budget:
    """Pays for what is asked, and remembers it."""

    seconds: float
    table: dict[str, Any]
    asked: list[str] = field(default_factory=list)

    def attempt(self, cure: Cure, seconds: float) -> Measurement | OutOfMemory | Failed:
        self.asked.append(cure.name)
        self.seconds -= seconds
        found = self.table[cure.name]
        return found if isinstance(found, Failed) else Measurement(states=found, trial_seconds=seconds)


def find(budget: float, table: dict[str, Any] | None = None, **changes: Any) -> tuple[CureFindings, list[str]]:
    question = Question(uncured(), (), CURES, SECONDS, 0.05, Path("runs/t/cures"), lambda cure: cure.name)
    spent = Budget(budget, TABLE | (table or {}))
    return search(replace(question, **changes), spent.attempt, lambda: spent.seconds), spent.asked


def test_it_goes_on_until_nearly_all_of_the_gain_is_kept() -> None:
    found, asked = find(1e9)
    assert asked == [AFTERWARDS, "early-stop", "replay-1"]
    assert found.chosen == "replay-1", "early stopping passes, but keeps 60 % of the gain"
    assert [(cure.name, cure.is_needless) for cure in found.untried] == [("kl", True)]
    assert found.points[-1].kept == pytest.approx(0.95)
    assert "95% of the gain kept" in found.sentences[1]


def test_nothing_is_trained_when_the_free_ones_do() -> None:
    found, asked = find(1e9, {AFTERWARDS: (state("scale-0.75", 0.92, 0.04, passed=True), OVER)})
    assert asked == [AFTERWARDS]
    assert (found.chosen, found.points[0].folder) == ("scale-0.75", "runs/t/cures/scale-0.75")
    assert found.points[0].command == "afterwards --scale 0.75"


def test_what_loses_the_gain_is_no_cure() -> None:
    found, _ = find(0.0, {AFTERWARDS: (POOR,)})
    assert found.chosen == ""
    assert (found.points[0].verdict, found.points[0].is_cure) == ("passes, but loses the gain", False)


def test_without_budget_only_what_trains_nothing_is_tried_and_the_rest_is_said_with_its_commands() -> None:
    found, asked = find(0.0)
    assert asked == [AFTERWARDS]
    assert [(cure.name, cure.command) for cure in found.untried] == [(c.name, c.name) for c in CURES[1:]]
    assert found.untried[1].expected_seconds == pytest.approx(GATE_COST * SECONDS)
    assert not any(cure.is_needless for cure in found.untried)
    assert all(cure.label in found.sentences[-1] for cure in found.untried)


def test_a_cure_that_passes_stays_the_result_when_dearer_ones_cannot_be_paid_for() -> None:
    found, asked = find(150.0, {AFTERWARDS: (GOOD,)})
    assert asked == [AFTERWARDS, "early-stop"], "50 for the first, 78 for the second, 112 for the third"
    assert found.chosen == "scale-0.5", "it gains more than early stopping does"


def test_a_cure_that_fails_is_a_point_of_the_report_and_the_next_one_is_tried() -> None:
    refused = {"early-stop": Failed(reason="no general text"), AFTERWARDS: (), "replay-1": TABLE[AFTERWARDS]}
    found, asked = find(1e9, refused)
    assert asked == [cure.name for cure in CURES]
    assert [point.verdict for point in found.points[:2]] == ["gave nothing to judge", "no general text"]
    assert found.chosen == "kl"


def test_faults_of_the_data_are_not_cured() -> None:
    found, asked = find(1e9, unmendable=("leaks",))
    assert (asked, found.points, found.chosen) == ([], (), "")
    assert "leaks" in found.sentences[-1]


def test_a_model_that_gained_nothing_is_cured_by_whatever_passes() -> None:
    found, asked = find(1e9, uncured=uncured(gain=-0.2), table={AFTERWARDS: (GOOD,)})
    assert (found.chosen, asked) == ("scale-0.5", [AFTERWARDS])
    assert found.points[0].kept is None
