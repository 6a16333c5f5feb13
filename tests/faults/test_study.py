"""Kills of a whole tuning: each life goes on with every finished trial; the end decides as an undisturbed pass does.

This is the bounded version of `benchmarks/faults/study.py --kills 30`, whose result is recorded there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "faults" / "study.py"
KILLS = 3


def test_kills_lose_no_trial_and_change_no_decision(tmp_path: Path) -> None:
    file = tmp_path / "study.json"
    command = [sys.executable, str(SCRIPT), "--kills", str(KILLS), "--budget", "12s", "--json", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    summary = json.loads(file.read_text())["summary"]
    assert summary["kills"] == summary["resumed"] == KILLS
    assert summary["trials_lost"] == summary["orphans"] == 0
    assert summary["same_decision"]
    assert not summary["problems"]
    assert summary["trials"] > 0
