"""Numbers in words: units, digits, intervals."""

from __future__ import annotations

import math

import pytest

from tunewise.lab.outcome import Interval
from tunewise.report import numbers


def between(low: float, middle: float, high: float) -> Interval:
    return Interval(middle=middle, low=low, high=high)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (between(0.115, 0.118, 0.122), "118 ms (115 to 122)"),
        (between(0.96, 1.6, 2.24), "1.60 s (0.96 to 2.24)"),
        (between(98.6, 112.0, 125.0), "112 s (99 to 125)"),
        (between(5.0, 5.0, 5.0), "5.00 s"),
        (263.7, "4.39 min"),
        (300.0, "5 min"),
        (118.0, "118 s"),
        (30.0, "30 s"),
        (9000.0, "2.5 h"),
        (2.5e-5, "25 µs"),
        (0.0, "0 µs"),
        (None, "n/a"),
    ],
)
def test_durations(value: Interval | float | None, words: str) -> None:
    assert str(numbers.seconds(value)) == words


@pytest.mark.parametrize(
    ("value", "words"), [(372 * 2**20, "372 MiB"), (1.4 * 2**30, "1.40 GiB"), (512, "512 B"), (None, "n/a")]
)
def test_sizes(value: float | None, words: str) -> None:
    assert str(numbers.num_bytes(value)) == words


def test_rates_have_three_digits_and_their_unit() -> None:
    assert str(numbers.rate(between(13_441.0, 13_716.0, 13_990.0))) == "13,700 tokens/s (13,400 to 14,000)"
    assert str(numbers.rate(4886.2, "")) == "4,890"


def test_token_counts_are_exact() -> None:
    assert numbers.tokens(16_384) == "16,384"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (between(0.45, 0.46, 0.47), "−54 % (−55 to −53)"),
        (between(0.989, 1.02, 1.051), "+2.0 % (−1.1 to +5.1)"),
        (0.88, "−12 %"),
        (1.0, "0 %"),
        (None, "n/a"),
    ],
)
def test_changes(value: Interval | float | None, words: str) -> None:
    assert str(numbers.change(value)) == words


@pytest.mark.parametrize(("value", "words"), [(3e-3, "3e-3"), (1.06e-3, "1.1e-3"), (0.02, "0.02"), (1e-5, "1e-5")])
def test_small_numbers(value: float, words: str) -> None:
    assert numbers.tiny(value) == words


@pytest.mark.parametrize(
    ("value", "words"), [(34.1, "34"), (4.26, "4.3"), (136.4, "140"), (2.23, "2.2"), (0.00586, "0.0059")]
)
def test_rough_numbers(value: float, words: str) -> None:
    assert numbers.roughly(value) == words


def test_numbers_that_are_none() -> None:
    assert numbers.significant(math.inf) == "no bound"
    assert numbers.significant(math.nan) == "n/a"
    assert str(numbers.seconds(between(1.0, 2.0, math.inf))) == "2.00 s (1.00 to no bound)"


def test_a_quotient_adds_both_errors_in_squares() -> None:
    found = numbers.quotient(between(9.0, 10.0, 11.0), between(4.0, 5.0, 6.0))
    assert found.middle == pytest.approx(2.0)
    assert math.log(found.high / 2.0) == pytest.approx(math.hypot(math.log(1.1), math.log(5 / 4)))
    assert math.log(2.0 / found.low) == pytest.approx(math.hypot(math.log(10 / 9), math.log(6 / 5)))
    assert found.high > numbers.quotient(between(9.0, 10.0, 11.0), between(5.0, 5.0, 5.0)).high


def test_a_quotient_by_something_that_may_be_zero_has_no_upper_bound() -> None:
    found = numbers.quotient(between(1.0, 1.0, 1.0), between(0.0, 1.0, 2.0))
    assert found.high == math.inf
    assert found.low == pytest.approx(0.5)
