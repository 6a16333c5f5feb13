from __future__ import annotations

import math

import pytest

from tunewise.engine.schedule import learning_rate_factor, warmup_steps
from tunewise.recipe import TrainingSpec


def factors(spec: TrainingSpec, total: int) -> list[float]:
    return [learning_rate_factor(spec, step, total) for step in range(total)]


def test_warmup_as_share_and_as_count() -> None:
    assert warmup_steps(TrainingSpec(warmup=0.1), 95) == 10
    assert warmup_steps(TrainingSpec(warmup=7), 95) == 7


def test_warmup_rises_linearly_and_the_first_step_learns() -> None:
    assert factors(TrainingSpec(warmup=4, schedule="constant"), 6) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])


def test_linear_falls_to_the_floor() -> None:
    spec = TrainingSpec(warmup=0, schedule="linear", final_learning_rate=0.2)
    assert factors(spec, 4) == pytest.approx([1.0, 0.8, 0.6, 0.4])
    assert learning_rate_factor(spec, 4, 4) == pytest.approx(0.2)


def test_cosine_is_half_way_in_the_middle() -> None:
    spec = TrainingSpec(warmup=0, schedule="cosine")
    assert learning_rate_factor(spec, 5, 10) == pytest.approx(0.5)
    assert learning_rate_factor(spec, 1, 4) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_wsd_is_flat_and_then_falls_in_the_last_fifth() -> None:
    values = factors(TrainingSpec(warmup=0, schedule="wsd"), 10)
    assert values[:9] == pytest.approx([1.0] * 9)
    assert values[9] == pytest.approx(0.5)


def test_inverse_square_root() -> None:
    spec = TrainingSpec(warmup=4, schedule="inverse_sqrt")
    assert learning_rate_factor(spec, 16, 100) == pytest.approx(0.5)
