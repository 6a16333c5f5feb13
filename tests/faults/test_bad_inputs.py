"""Every bad input of the table gets a clear error and loses nothing; see benchmarks/faults/bad_inputs.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.faults import bad_inputs
from benchmarks.faults.cases.case import Case, train

FEWEST_CASES = 200


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workshop")
    bad_inputs.make_workshop(folder)
    return folder


@pytest.mark.parametrize("case", bad_inputs.CASES, ids=lambda case: case.name)
def test_bad_input_is_survived(case: Case, workshop: Path) -> None:
    reason = bad_inputs.cannot_try(case)
    if reason is not None:
        pytest.skip(reason)
    verdict = bad_inputs.try_case(case, workshop)
    assert verdict.problems == (), f"$ {verdict.command}\n{verdict.seen}"


def test_no_case_was_lost() -> None:
    assert len({case.name for case in bad_inputs.CASES}) == len(bad_inputs.CASES) >= FEWEST_CASES


def test_the_judge_notices_what_is_wrong(workshop: Path) -> None:
    """A case that expects other words, another exit code and no new run fails on all three."""
    good = Case("judge: nothing is wrong", train(), ("these words",))
    problems = bad_inputs.try_case(good, workshop).problems
    assert any("exit code 0, not 2" in problem for problem in problems)
    assert any("does not say: these words" in problem for problem in problems)
    assert any("a run was begun" in problem for problem in problems)


def test_the_judge_notices_a_lost_file(workshop: Path) -> None:
    allowed = next(case for case in bad_inputs.CASES if case.name == "run: a half-written checkpoint lies about")
    strict = Case(allowed.name, allowed.arguments, allowed.says, allowed.spoil, exit_code=0)
    problems = bad_inputs.try_case(strict, workshop).problems
    assert "run/checkpoints/.partial-step-00000006/tensors.safetensors is gone" in problems


def test_a_real_process_says_the_same_as_the_forked_one(workshop: Path, tmp_path: Path) -> None:
    case = next(case for case in bad_inputs.CASES if case.name == "recipe: an unknown method")
    case.spoil(tmp_path)
    real = subprocess.run(
        [sys.executable, "-m", "tunewise.cli", *case.arguments],
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (real.returncode, real.stderr.strip()) == (2, bad_inputs.try_case(case, workshop).seen)
