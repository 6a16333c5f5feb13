"""Bytes, counts and seconds: how people write them, and how we print them.

Inside the program a quantity is always in its base unit and its name says so (`_bytes`, `_seconds`, `_flops`); GiB and
minutes exist only where people read or write.
"""

from __future__ import annotations

import re

from tunewise.errors import InputError

KIB = 1024
MIB = 1024**2
GIB = 1024**3

_BYTE_UNITS = {
    "": 1,
    "b": 1,
    "kb": 1000,
    "mb": 1000**2,
    "gb": 1000**3,
    "tb": 1000**4,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 1024**4,
}
_SECOND_UNITS = {"": 1.0, "s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def parse_bytes(text: str | int) -> int:
    """Read "24GB" (decimal), "24GiB" (binary) or a plain number of bytes.

    Raises:
        InputError: the text is not a size.
    """
    return round(_parse(str(text), _BYTE_UNITS, "a size such as 24GB or 24GiB"))


def parse_seconds(text: str | float) -> float:
    """Read "30m", "2h", "90s", "1h30m" or a plain number of seconds.

    Raises:
        InputError: the text is not a duration.
    """
    parts = re.findall(r"[\d.]+\s*[a-zA-Z]*", str(text))
    if not parts or "".join(parts).replace(" ", "") != str(text).replace(" ", ""):
        raise InputError(f"'{text}' is not a duration such as 30m, 2h or 1h30m.")
    return sum(_parse(part, _SECOND_UNITS, "a duration such as 30m or 2h") for part in parts)


def parse_budget(text: str, price_per_hour: float | None) -> float:
    """Read a budget as seconds: a duration ("30m"), or money ("$5", "5 EUR") at a price per hour.

    Raises:
        InputError: the text is neither, or money without a price.
    """
    money = re.fullmatch(r"\s*(?:[$€£]\s*([\d.]+)|([\d.]+)\s*(?:[$€£]|USD|EUR|GBP))\s*", text, re.IGNORECASE)
    if money is None:
        return parse_seconds(text)
    if price_per_hour is None or price_per_hour <= 0:
        raise InputError(f"A budget of {text.strip()} needs the machine's price per hour: --price 2.50")
    return float(money.group(1) or money.group(2)) / price_per_hour * 3600


def _parse(text: str, units: dict[str, int] | dict[str, float], wanted: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-zA-Z]*)\s*", text)
    if match is None or match.group(2).lower() not in units:
        raise InputError(f"'{text}' is not {wanted}.")
    return float(match.group(1)) * units[match.group(2).lower()]


def format_bytes(num_bytes: float) -> str:
    """Print bytes with a binary unit and three significant digits: 1536 -> "1.50 KiB"."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            return f"{value:.0f} B" if unit == "B" else f"{value:.{_decimals(value)}f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def format_seconds(seconds: float) -> str:
    """Print a duration as people say it: 45 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def format_count(count: float) -> str:
    """Print a count with a decimal suffix: 1_235_814_400 -> "1.24B"."""
    value = float(count)
    for suffix in ("", "K", "M", "B"):
        if abs(value) < 1000 or suffix == "B":
            return f"{value:.0f}" if suffix == "" else f"{value:.{_decimals(value)}f}{suffix}"
        value /= 1000
    raise AssertionError("unreachable")


def _decimals(value: float) -> int:
    return 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
