"""Ten kills at random moments, some while a checkpoint is written: each run resumes to the same bits.

This is the bounded version of `benchmarks/faults/kill.py --kills 100`, whose result is recorded there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "faults" / "kill.py"
KILLS = 10


SEEDS = 3
"""Whether an aimed kill hits the few milliseconds of a write is chance: other seeds follow until one has."""


def test_ten_kills_lose_nothing(tmp_path: Path) -> None:
    hits = [ten_kills(tmp_path / "kill.json", 0)]
    while not hits[-1] and len(hits) < SEEDS:
        hits.append(ten_kills(tmp_path / "kill.json", len(hits)))
    assert hits[-1] >= 1, "no kill hit a checkpoint being written"


def ten_kills(file: Path, seed: int) -> int:
    """Check that every kill was survived, and return how many hit a checkpoint being written."""
    command = [sys.executable, str(SCRIPT), "--kills", str(KILLS), "--seed", str(seed), "--json", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.splitlines()[-1] == f"{KILLS} tried, {KILLS} survived"
    result = json.loads(file.read_text())
    rounds = result["rounds"]  # one, or more where a training ended before it had been killed ten times
    assert rounds
    assert all(part["equal"] for part in rounds)
    assert sum(len(part["kills"]) for part in rounds) == KILLS
    return int(result["summary"]["while_writing_a_checkpoint"])
