from __future__ import annotations

import pytest

from tunewise.errors import InputError
from tunewise.units import format_bytes, format_count, format_seconds, parse_bytes, parse_seconds


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("24GB", 24_000_000_000), ("24GiB", 24 * 1024**3), ("1.5 MB", 1_500_000), ("512", 512), (".5KiB", 512)],
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


DURATIONS = [("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("90", 90), ("1.5 h", 5400)]


@pytest.mark.parametrize(("text", "seconds"), DURATIONS)
def test_durations(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "GB", "24 apples", "-3GB", "1e400GB"])
def test_a_wrong_size_is_named(text: str) -> None:
    with pytest.raises(InputError, match="is not a size"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["", "soon", "5 weeks", "h", "3m!"])
def test_a_wrong_duration_is_named(text: str) -> None:
    with pytest.raises(InputError, match="is not a duration"):
        parse_seconds(text)


def test_printing() -> None:
    assert format_bytes(1536) == "1.50 KiB"
    assert format_bytes(80 * 1024**3) == "80.0 GiB"
    assert format_bytes(3) == "3 B"
    assert format_seconds(200) == "3 min 20 s"
    assert format_seconds(7500) == "2 h 5 min"
    assert format_count(1_235_814_400) == "1.24B"
    assert format_count(999) == "999"
