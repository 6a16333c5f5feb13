"""ruff and mypy (strict) have nothing to say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=" ".join
)
def test_the_code_is_clean(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_who_catches_everything_says_why() -> None:
    for folder in ("src", "benchmarks", "docs", "tests"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
                words = line.strip()
                assert not words.startswith("except:"), f"{file}:{number} catches even the interrupt"
                if words.startswith(("except Exception", "except BaseException")):
                    assert "  # " in words, f"{file}:{number} catches everything and does not say why"


def test_no_file_has_more_than_four_hundred_lines() -> None:
    for file in sorted((ROOT / "src").rglob("*.py")):
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 400, f"{file}: split it by subject"
