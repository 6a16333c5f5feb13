"""Numbers as the report prints them: with their unit, and with how well they are known.

A `Number` keeps the value and its interval apart, so that a page can set the interval in grey and a terminal can leave
it out; `str` gives both: "118 ms (115 to 122)".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tunewise.lab.outcome import Interval

NOTHING = "n/a"
"""Stands where something was not measured."""

_BYTE_UNITS = (("GiB", 1024.0**3), ("MiB", 1024.0**2), ("KiB", 1024.0), ("B", 1.0))
_SECOND_UNITS = (("h", 3600.0, 2.0), ("min", 60.0, 3.0), ("s", 1.0, 1.0), ("ms", 1e-3, 1.0), ("µs", 1e-6, 1.0))
"""Unit, its seconds, and from how many on it is used: 118 s and 4.4 min are easier to read than 1.97 min and 264 s."""


Form = Callable[[Interval], "Number"]
"""How an interval is printed."""


@dataclass(frozen=True)
class Number:
    """A value in words, and the interval beside it ("" where there is none)."""

    text: str
    interval: str = ""

    def __str__(self) -> str:
        return f"{self.text} ({self.interval})" if self.interval else self.text


def seconds(value: Interval | float | None) -> Number:
    """Print a duration: "118 ms (115 to 122)", "4.4 min"; without an interval, final zeros are left out."""
    number = _scaled(value, second_unit)
    if isinstance(value, Interval) or "." not in number.text:
        return number
    amount, _, unit = number.text.partition(" ")
    return Number(f"{amount.rstrip('0').rstrip('.')} {unit}")


def second_unit(size: float) -> tuple[str, float]:
    """Return the unit in which a duration is printed, and its seconds."""
    for name, factor, least in _SECOND_UNITS:
        if abs(size) >= least * factor:
            return name, factor
    return _SECOND_UNITS[-1][:2]


def num_bytes(value: Interval | float | None) -> Number:
    """Print a size in binary units."""
    return _scaled(value, byte_unit)


def byte_unit(size: float) -> tuple[str, float]:
    """Return the unit in which a size is printed, and its bytes."""
    return next((unit for unit in _BYTE_UNITS if abs(size) >= unit[1]), _BYTE_UNITS[-1])


def nats(value: Interval | float | None, decimals: int = 3) -> Number:
    """Print a loss in nats per supervised token, the unit left to the heading."""
    return _print(value, lambda number, _: f"{number:.{decimals}f}", "")


def rate(value: Interval | float | None, unit: str = "tokens/s") -> Number:
    """Print tokens a second: "13,700 tokens/s (13,400 to 14,000)"."""
    return _print(value, significant, f" {unit}" if unit else "")


def tokens(value: float | None) -> str:
    """Print a number of tokens: 4,096."""
    return NOTHING if value is None else grouped(value)


def ratio(value: Interval | float | None) -> Number:
    """Print what something multiplies by: ×0.82."""
    number = _print(value, lambda size, like: f"{size:.2f}" if like < 10 else significant(size, like), "")
    return number if number.text == NOTHING else Number("×" + number.text, number.interval)


def change(value: Interval | float | None) -> Number:
    """Print a ratio as what it changes: 0.82 is "−18 %"; the interval likewise."""
    if value is None:
        return Number(NOTHING)
    if not isinstance(value, Interval):
        return Number(f"{signed(100 * (value - 1), 0)} %")
    digits = 1 if abs(value.middle - 1) < 0.095 else 0
    low, high = (signed(100 * (bound - 1), digits) for bound in (value.low, value.high))
    middle = signed(100 * (value.middle - 1), digits)
    return Number(f"{middle} %", "" if low == high else f"{low} to {high}")


def signed(value: float, decimals: int) -> str:
    """Print with a sign; the minus is a true minus, and zero has none."""
    text = f"{abs(value):.{decimals}f}"
    if float(text) == 0.0:
        return text
    return f"−{text}" if value < 0 else f"+{text}"


def grouped(value: float) -> str:
    """Print a count with thousands separators, a small one with three significant digits."""
    return f"{value:,.0f}" if 100 <= abs(value) < math.inf else significant(value)


def significant(value: float, like: float | None = None) -> str:
    """Print three significant digits, without an exponent where the number is of ordinary size.

    `like` is the number whose places are taken instead: the ends of an interval are printed as its middle.
    """
    if not math.isfinite(value):
        return "no bound" if value > 0 else NOTHING
    measure = abs(value if like is None or not math.isfinite(like) or like == 0 else like)
    if measure == 0:
        return "0"
    places = 2 - math.floor(math.log10(measure))
    if not -5 < places < 7:
        return f"{value:.2e}"
    return f"{round(value, places):,.{max(0, places)}f}"


def roughly(value: float) -> str:
    """Print two significant digits: about 34 records, 2.2 times."""
    return f"{float(f'{value:.2g}'):,g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.1e}"


def learning_rate(value: float | None) -> str:
    """Print a learning rate: 2.8e-3."""
    return NOTHING if value is None else tiny(value)


def tiny(value: float) -> str:
    """Print a small number with two digits: 0.02, 2.8e-3, 1e-5."""
    if value == 0 or value >= 0.01:
        return f"{value:.2g}"
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def quotient(over: Interval, under: Interval) -> Interval:
    """Return over / under with the interval of two independent errors: half-widths add in squares on logarithms.

    A bound that is not positive leaves the quotient without a bound on that side.
    """
    middle = over.middle / under.middle
    down = math.hypot(_distance(over.low, over.middle), _distance(under.middle, under.high))
    up = math.hypot(_distance(over.middle, over.high), _distance(under.low, under.middle))
    return Interval(middle=middle, low=middle * math.exp(-down), high=middle * math.exp(up) if up < 700 else math.inf)


def _distance(low: float, high: float) -> float:
    return math.log(high / low) if low > 0 and math.isfinite(high) else math.inf


def holds_one(value: Interval) -> bool:
    """Tell whether a ratio cannot be told from no effect."""
    return value.low <= 1.0 <= value.high


def _scaled(value: Interval | float | None, choose: Callable[[float], tuple[str, float]]) -> Number:
    if value is None:
        return Number(NOTHING)
    name, factor = choose(value.middle if isinstance(value, Interval) else value)
    if isinstance(value, Interval):
        value = Interval(middle=value.middle / factor, low=value.low / factor, high=value.high / factor)
    else:
        value = value / factor
    return _print(value, significant, f" {name}")


def _print(value: Interval | float | None, form: Callable[[float, float], str], unit: str) -> Number:
    if value is None:
        return Number(NOTHING)
    if not isinstance(value, Interval):
        return Number(form(value, value) + unit)
    low, high = form(value.low, value.middle), form(value.high, value.middle)
    return Number(form(value.middle, value.middle) + unit, "" if low == high else f"{low} to {high}")
