"""Winner against runner-up: speed, loss, and what each forgets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from tests.unit.lab.test_method_study import base_recipe
from tunewise.lab.confirm import Candidate, confirm
from tunewise.lab.findings import Confirmation
from tunewise.lab.laboratory import Laboratory
from tunewise.lab.outcome import Interval, Measurement
from tunewise.lab.trial import Trial
from tunewise.methods import Packing
from tunewise.quality.measured import Measured


@dataclass
class Table:
    """A laboratory whose trials forget what a table says; packed ones are the winner's."""

    forgotten: dict[str, float]
    speed: dict[str, float] = field(default_factory=lambda: {"winner": 1000.0, "runner-up": 900.0})
    asked: list[Trial] = field(default_factory=list)

    def run(self, study: str, trial: Trial, **_: Any) -> Measurement:
        self.asked.append(trial)
        name = "winner" if trial.read_recipe().get(Packing) is not None else "runner-up"
        lost, rate = self.forgotten[name] + 0.001 * len(self.asked), self.speed[name]
        exactly = Interval(middle=rate, low=rate, high=rate)
        forgetting = Measured(middle=lost, low=lost - 0.01, high=lost + 0.01, noise_floor=0.01, num=16)
        return Measurement(
            loss=2.0, tokens_per_second=exactly, step_seconds=exactly,
            forgetting=forgetting if trial.measures_forgetting else None,
        )  # fmt: skip


def confirmed(
    winner: float, runner_up: float, max_forgetting: float | None = 0.05
) -> tuple[Confirmation, bool, list[Trial]]:
    lab = Table({"winner": winner, "runner-up": runner_up})
    recipe = base_recipe()
    slower = recipe.replace(methods=tuple(m for m in recipe.methods or () if not isinstance(m, Packing)))
    both = Candidate("winner", recipe, None), Candidate("runner-up", slower, None)
    found, swap = confirm(
        cast(Laboratory, lab), *both, budget_tokens=2048, num_seeds=2, expected_seconds=1.0, tie_band=0.01,
        max_forgetting=max_forgetting,
    )  # fmt: skip
    return found, swap, lab.asked


@pytest.mark.parametrize(
    ("winner", "runner_up", "expected"),
    [(0.01, 0.01, False), (0.08, 0.01, True), (0.01, 0.08, False), (0.08, 0.09, False)],
)
def test_a_winner_that_forgets_too_much_loses_to_one_that_does_not(
    winner: float, runner_up: float, expected: bool
) -> None:
    found, swap, _ = confirmed(winner, runner_up)
    assert swap is expected
    assert found.winner.label == ("runner-up" if expected else "winner")
    assert ("forgets more than the 0.05 nats" in found.sentence) is (min(winner, runner_up) > 0.05)


def test_forgetting_is_the_mean_over_seeds_within_the_bounds_of_all() -> None:
    found, _, asked = confirmed(0.02, 0.03)
    assert found.winner.forgetting is not None
    assert vars(found.winner.forgetting) == pytest.approx({"middle": 0.022, "low": 0.011, "high": 0.033})
    assert all(trial.measures_forgetting for trial in asked)


def test_without_a_budget_nothing_is_measured() -> None:
    found, swap, asked = confirmed(0.9, 0.01, max_forgetting=None)
    assert not swap
    assert found.winner.forgetting is None
    assert not any(trial.measures_forgetting for trial in asked)
