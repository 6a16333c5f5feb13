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


def test_ten_kills_lose_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--kills", str(KILLS), "--json", str(tmp_path / "kill.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.splitlines()[-1] == f"{KILLS} tried, {KILLS} survived"
    result = json.loads((tmp_path / "kill.json").read_text())
    assert [part["equal"] for part in result["rounds"]] == [True]
    assert len(result["rounds"][0]["kills"]) == KILLS
