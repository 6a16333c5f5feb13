"""A kill of a whole tuning: the next life goes on with all finished trials, and decides as an undisturbed pass does.

The bounded version of `benchmarks/faults/study.py --kills 30`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "faults" / "study.py"
KILLS = 1


def test_a_kill_loses_no_trial_and_changes_no_decision(tmp_path: Path) -> None:
    file = tmp_path / "study.json"
    command = [sys.executable, str(SCRIPT), "--kills", str(KILLS), "--budget", "12s", "--json", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=1500, env=environment, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    summary = json.loads(file.read_text())["summary"]
    assert summary["kills"] == summary["resumed"] == KILLS
    assert summary["trials_lost"] == summary["orphans"] == 0
    assert summary["same_decision"]
    assert not summary["problems"]
    assert summary["trials"] > 0
