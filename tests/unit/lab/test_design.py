"""Designs let main effects be told from everything of second order, and obey what is not allowed."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from tunewise.errors import InputError
from tunewise.lab.design import Design, On, pair_terms, signs, two_level


def names(count: int) -> list[str]:
    return ["lora", "int8", "bf16", "packing", *(f"m{number}" for number in range(4, count))][:count]


def needs_lora(on: On) -> bool:
    return "int8" not in on or "lora" in on


def deviations(design: Design) -> list[float]:
    """Of each main effect, in units of what as many orthogonal runs would give."""
    main = np.column_stack([np.ones(len(design.runs)), signs(design.names, design.runs)])
    return [float(each) for each in np.sqrt(np.diag(np.linalg.inv(main.T @ main)) * len(design.runs))[1:]]


@pytest.mark.parametrize("count", range(1, 17))
def test_main_effects_are_free_of_each_other_and_of_pairs(count: int) -> None:
    design = two_level(names(count))
    levels = signs(design.names, design.runs)
    size = len(design.runs)
    assert size == (2**count if count <= 4 else 16 if count <= 8 else 32)
    assert np.array_equal(levels.T @ levels, size * np.eye(count))
    for one, other in itertools.combinations(range(count), 2):
        assert not (levels.T @ (levels[:, one] * levels[:, other])).any()
    assert design.runs[0] == frozenset()
    assert len(set(design.runs)) == size
    assert (design.not_told, design.dropped) == ((), 0)
    assert len(design.generators) == max(0, count - (4 if count <= 8 else 5)) * (count > 4)


def test_the_fraction_and_its_aliases_are_named() -> None:
    design = two_level(list("abcdefg"))
    assert design.resolution == 4
    assert design.generators == ("e = a x b x c", "f = b x c x d", "g = a x c x d")
    assert "a x b + c x e + f x g" in design.aliases
    assert sum(term.count(" x ") for term in design.aliases) == 21  # each pair is in one of them
    five = two_level(list("abcde"))
    assert (five.resolution, five.generators, five.aliases) == (5, ("e = - a x b x c x d",), ())
    assert (two_level(list("abc")).resolution, two_level(list("abc")).generators) == (None, ())


@pytest.mark.parametrize("count", range(3, 13))
def test_what_is_not_allowed_is_avoided_and_main_effects_stay(count: int) -> None:
    design = two_level(names(count), needs_lora)
    assert all(needs_lora(on) for on in design.runs)
    assert len(design.runs) == (2**count * 3 // 4 if count <= 4 else 16 if count <= 8 else 32)
    assert design.not_told == ()
    assert max(deviations(design)) < 1.45
    assert frozenset() in design.runs
    assert len(set(design.runs)) == len(design.runs)
    assert design.dropped > 0
    terms = [term for term, _ in pair_terms(design.names, design.runs)]
    assert not [term for term in terms if "lora x int8" in term]  # int8 never goes without lora: nothing to interact


def test_exchanged_runs_tell_more_than_a_fraction_with_holes() -> None:
    regular = two_level(names(7))
    kept = [on for on in regular.runs if needs_lora(on)]
    holes = Design(regular.names, tuple(kept), (), None, (), (), 0)
    per_run = [d / len(kept) ** 0.5 for d in deviations(holes)]
    chosen = two_level(names(7), needs_lora)
    assert all(d / 4 < bad for d, bad in zip(deviations(chosen), per_run, strict=True))


@pytest.mark.parametrize(
    ("is_allowed", "not_told"),
    [
        (lambda on: "int8" not in on, ("int8",)),
        (lambda on: ("int8" in on) == ("lora" in on), ("lora", "int8")),
        (lambda on: len(on) > 99, ("lora", "int8", "bf16", "packing", "m4")),
    ],
    ids=["never on", "always together", "nothing"],
)
def test_what_cannot_be_told_is_named(is_allowed: Callable[[On], bool], not_told: tuple[str, ...]) -> None:
    assert two_level(names(5), is_allowed).not_told == not_told


def test_a_budget_of_few_combinations_takes_them_all() -> None:
    design = two_level(names(6), lambda on: len(on) <= 1)
    assert len(design.runs) == 7
    assert design.not_told == ()


def test_nothing_is_random() -> None:
    assert two_level(names(8), needs_lora) == two_level(names(8), needs_lora)


def test_too_many_factors_are_an_error() -> None:
    with pytest.raises(InputError, match="up to 16 factors, not 17"):
        two_level(names(17))


def test_no_factor_is_one_run() -> None:
    assert two_level([]).runs == (frozenset(),)
