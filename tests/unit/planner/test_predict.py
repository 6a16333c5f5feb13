"""Composed predictions against dry runs of the very recipes."""

from __future__ import annotations

import random

import pytest

from tunewise.errors import InputError
from tunewise.planner.case import Question, settle
from tunewise.planner.predict import Predictor, kind_of, profile_of
from tunewise.planner.space import Choice, axes, enumerate_space
from tunewise.machine.catalogue import find


def some(predictor: Predictor, count: int, seed: int) -> list[tuple[Choice, int]]:
    case_options = axes(predictor.config, predictor.machine, predictor.base, _no_wishes())
    kept, _ = enumerate_space(case_options, predictor.base, _no_wishes(), predictor.load.documents_per_step)
    draw = random.Random(seed)
    chosen = draw.sample(kept, count)
    return [(choice, draw.choice(predictor.micro_batch_sizes(choice)[:3])) for choice in chosen]


def _no_wishes():  # type: ignore[no-untyped-def]
    from tunewise.planner.space import Wishes

    return Wishes()


@pytest.mark.parametrize(("machine", "length"), [("H100", 96), ("T4", 160)])
def test_composed_bytes_are_those_of_a_dry_run(tiny: str, machine: str, length: int) -> None:
    predictor = settle(Question(tiny, length=length, machine=machine)).predictor()
    errors = []
    for choice, size in some(predictor, 12, seed=length):
        predicted = predictor.predict(choice, size)
        confirmed, _ = predictor.confirm(predicted)
        errors.append(predicted.peak_bytes / confirmed.peak_bytes - 1)
    assert len(errors) == 12
    assert max(map(abs, errors)) < 0.02
