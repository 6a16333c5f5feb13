"""Traces in other processes are those of this one."""

from __future__ import annotations

import numpy as np
import pytest

from tunewise.engine.dry_run import BatchShape, TraceJob, one_by_one
from tunewise.planner import processes
from tunewise.planner.case import Question, settle
from tunewise.planner.processes import Processes
from tunewise.planner.space import Choice, axes


def jobs(model: str, *, optimizer: str = "adamw") -> list[TraceJob]:
    case = settle(Question(model, length=64, machine="H100"))
    options = axes(case.config, case.machine, case.base, case.wishes)
    choice = Choice(tuple((axis, each[0]) for axis, each in options.items()))
    chosen = next(each for each in options["optimizer"] if each.label == optimizer)
    recipe = choice.replaced("optimizer", chosen).recipe(case.base, 1)
    profile = case.predictor().profile
    return [TraceJob(recipe, case.config, profile, (BatchShape.uniform(rows, 64),)) for rows in (1, 2)]


def test_they_answer_the_same_in_the_same_order(tiny: str) -> None:
    with Processes() as there:
        found = there.trace_all(jobs(tiny))
    expected = one_by_one(jobs(tiny))
    for one, other in zip(found, expected, strict=True):
        assert one.work == other.work
        assert one.curves.keys() == other.curves.keys()
        assert all(np.array_equal(one.curves[place], other.curves[place]) for place in one.curves)
    assert found[0].peaks() != found[1].peaks()


def test_where_no_fork_is_safe_they_run_here(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_can_fork", lambda: False)
    with Processes() as there:
        assert there._pool is None
        assert len(there.trace_all(jobs(tiny))) == 2
