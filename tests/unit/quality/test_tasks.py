"""Scores of single answers, against values that were computed by hand or are published."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tunewise.engine.knowledge import Category, category_of
from tunewise.errors import InputError
from tunewise.quality.answers import abstention_f1, accuracy_at_coverage, answer_items, kind_of
from tunewise.quality.battery import Items, compare
from tunewise.quality.code import pass_at_k, passes, program_of
from tunewise.quality.facts import facts_of
from tunewise.quality.refusals import Refusals
from tunewise.quality.tasks import (
    code_of,
    json_match,
    json_valid,
    last_number,
    numeric_match,
    rouge_1,
    rouge_2,
    rouge_l,
    token_f1,
    user_score,
)
from tunewise.workload.matching import exact_match


def test_exact_match_and_f1_are_squads() -> None:
    assert exact_match(" The Eiffel Tower. ", ["eiffel tower"]) == 1.0
    assert exact_match("Eiffel", ["eiffel tower"]) == 0.0
    assert token_f1("the tower of Eiffel", ["Eiffel tower"]) == pytest.approx(2 * 2 / (3 + 2))
    assert token_f1("x", ["y", "x"]) == 1.0
    assert token_f1("", ["x"]) == 0.0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("First 3, then 4.\n#### 1,234", 1234.0),
        ("so it is 12.5 dollars", 12.5),
        ("minus -7", -7.0),
        ("about $1,000,000.", 1_000_000.0),
        ("1e3", 1000.0),
        ("no number at all", None),
        ("#### nothing", None),
        (".5", 0.5),
    ],
)
def test_numbers_are_found(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_numeric_match_is_gsm8ks() -> None:
    assert numeric_match("He has 5 + 3 = 8 apples", ["5+3=8\n#### 8"]) == 1.0
    assert numeric_match("The answer is 18.0", ["#### 18"]) == 1.0
    assert numeric_match("none", ["#### 18"]) == 0.0


def test_rouge_by_hand() -> None:
    """Lin 2004, section 3: "police kill the gunman" has ROUGE-L 0.5 against "police killed the gunman"'s order."""
    reference = ["police killed the gunman"]
    assert rouge_l("police kill the gunman", reference) == pytest.approx(0.75)
    assert rouge_l("the gunman kill police", reference) == pytest.approx(0.5)
    assert rouge_1("the gunman kill police", reference) == pytest.approx(0.75)
    assert rouge_2("the gunman kill police", reference) == pytest.approx(1 / 3)
    assert rouge_l("", reference) == 0.0


def test_json_validity_and_equality() -> None:
    assert json_valid('{"a": [1, 2]}') == 1.0
    assert json_valid('Here:\n```json\n{"a": 1}\n```\nDone.') == 1.0
    assert json_valid("{'a': 1}") == json_valid('{"a": NaN}') == json_valid("") == json_valid("[" * 100_000) == 0.0
    assert json_match('{"b": 2, "a": 1}', ['{"a": 1, "b": 2}']) == 1.0
    assert json_match('{"a": 2}', ['{"a": 1}']) == json_match("no", ["no"]) == 0.0
    assert json_match("null", ["null"]) == 1.0


def test_code_is_taken_out_of_fences_and_run_with_its_tests() -> None:
    assert code_of("Sure:\n```python\nx = 1\n```") == "x = 1\n"
    human = {"entry_point": "add", "test": "def check(f):\n    assert f(1, 2) == 3\n"}
    prompt = "def add(a, b):\n"
    assert passes(program_of(human, prompt, "    return a + b\n", "here"))
    assert not passes(program_of(human, prompt, "    return a - b\n", "here"))
    assert passes(program_of(human, prompt, "```\ndef add(a, b):\n    return a + b\n```", "here"))
    mbpp = {"test_list": ["assert double(2) == 4"], "test_setup_code": "import math"}
    assert passes(program_of(mbpp, "Write double.", "def double(x):\n    return math.floor(2 * x)", "here"))
    with pytest.raises(InputError, match=r"here: pass@1 needs tests"):
        program_of({}, prompt, "x", "here")


def test_pass_at_k_is_the_unbiased_estimate() -> None:
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert pass_at_k(5, 2, 2) == pytest.approx(1 - (3 / 5) * (2 / 4))
    assert pass_at_k(4, 4, 2) == 1.0
    with pytest.raises(ValueError, match="needs 3 samples"):
        pass_at_k(2, 1, 3)


def test_right_wrong_abstained() -> None:
    refusals = Refusals()
    assert kind_of("It is Paris.", ["Paris"], refusals) == "right"
    assert kind_of("Rome", ["Paris"], refusals) == "wrong"
    assert kind_of("I don't know.", ["Paris"], refusals) == "abstained"
    assert kind_of("  ", ["Paris"], refusals) == "abstained"
    assert kind_of("Rome", [], refusals) == "wrong"
    assert kind_of("unknown", ["unknown"], refusals) == "right"
    kinds, has_answer = ["right", "wrong", "abstained", "abstained", "wrong"], [True, True, True, False, False]
    items = answer_items(kinds, has_answer)  # type: ignore[arg-type]
    rates = {name: each.measured().middle for name, each in items.items()}
    assert rates == {
        "right": pytest.approx(1 / 3), "wrong": pytest.approx(1 / 3), "false refusals": pytest.approx(1 / 3),
        "refused, without answer": 0.5,
    }  # fmt: skip
    assert abstention_f1(kinds, has_answer) == pytest.approx(0.5)  # type: ignore[arg-type]


def test_accuracy_rises_with_less_coverage_when_confidence_is_worth_something() -> None:
    is_right, confidence = np.array([True, True, False, False]), np.array([0.9, 0.8, 0.3, 0.2])
    assert [accuracy_at_coverage(is_right, confidence, share) for share in (0.5, 1.0)] == [1.0, 0.5]


def test_slick_categories_and_their_warning() -> None:
    assert category_of([True, True], [False]) == "highly known"
    assert category_of([True, False], [False]) == "maybe known"
    assert category_of([False, False], [True, False]) == "weakly known"
    assert category_of([False, False], [False]) == "unknown"
    unknown: list[Category] = ["unknown"]
    known: list[Category] = ["highly known"]
    many = facts_of(unknown * 60 + known * 40)
    assert many.shares["unknown"].middle == 0.6
    assert "60% of the facts are unknown" in many.warning
    assert facts_of(known * 95 + unknown * 5).warning == ""


def test_a_users_own_function(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def starts(answer, references):\n    return answer.startswith(references[0])\nword = 'x'\n")
    assert user_score(f"{file}:starts")("yes, it is", ("yes",)) == 1.0
    for place, message in (
        (f"{file}:none", "no function 'none'"),
        (f"{file}:word", "no function 'word'"),
        (f"{tmp_path / 'other.py'}:f", "no file"),
        ("mine", "file.py:function"),
    ):
        with pytest.raises(InputError, match=message):
            user_score(place)
    file.write_text("raise RuntimeError('broken')")
    with pytest.raises(InputError, match="RuntimeError: broken"):
        user_score(f"{file}:starts")


def test_comparisons_are_paired_and_know_what_is_worse() -> None:
    before, after = Items.of([True] * 30 + [False] * 10), Items.of([False] * 12 + [True] * 18 + [False] * 10)
    found = compare({"score": before}, {"score": after})["score"]
    assert found.change is not None
    assert found.change.middle == pytest.approx(-0.3)
    assert found.is_worse
    assert not compare({"score": after}, {"score": before})["score"].is_worse
    lower_is_better = compare({"loss": Items.of([1.0] * 9, -1)}, {"loss": Items.of([2.0] * 9, -1)})["loss"]
    assert lower_is_better.is_worse
    alone = compare(None, {"score": after})["score"]
    assert (alone.before, alone.change, alone.is_worse) == (None, None, False)
    assert compare({"score": Items.of([1.0])}, {"score": after})["score"].change is None
