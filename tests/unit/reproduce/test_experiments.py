"""Every experiment at its smallest size: it runs, answers every claim, and its identities hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunewise.reproduce import BY_NAME
from tunewise.reproduce.bench import Bench, Size
from tunewise.reproduce.claim import Judged, Verdict, judge

IDENTITIES = {
    "gradient-accumulation": {"exact"},
    "nf4": {"levels", "bits", "saved"},
    "qa-lora": {"merge int4", "merge int3", "merge int2", "bits", "lora size", "qalora size"},
}
"""Claims that do not depend on the size: they have to come out "same" however little is computed."""


def run_tiny(name: str, folder: Path) -> dict[str, Judged]:
    evidence = BY_NAME[name].run(Bench(Size.TINY, folder))
    assert all(len(row) == len(table.columns) for table in evidence.tables for row in table.rows)
    return {claim.key: judge(claim, evidence.findings[claim.key]) for claim in BY_NAME[name].claims}


@pytest.mark.parametrize("name", IDENTITIES)
def test_the_smallest_size(name: str, tmp_path: Path) -> None:
    judged = run_tiny(name, tmp_path)
    assert {key for key in IDENTITIES[name] if judged[key].verdict != Verdict.SAME} == set()
