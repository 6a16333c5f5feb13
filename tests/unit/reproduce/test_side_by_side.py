"""Several experiments at once: each in its own process, results found by who waits, a stop stops them all."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from tunewise.reproduce import side_by_side as module
from tunewise.reproduce.side_by_side import side_by_side

CHILD = """
import json, os, signal, sys, time
folder, name = sys.argv[sys.argv.index("--out") + 1], sys.argv[-1]
mark = os.path.join(folder, name)
open(mark + ".begun", "w").write(json.dumps([os.getpid(), os.environ["OMP_NUM_THREADS"], sys.argv[1:]]))
print("[1/1] shown to nobody", file=sys.stderr)
print("    half way", file=sys.stderr, flush=True)
if name == "bad":
    sys.exit(1)
while name != "alone" and len([file for file in os.listdir(folder) if file.endswith(".begun")]) < 2:
    time.sleep(0.01)
if name == "deaf":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    open(mark + ".ready", "w").close()
if name in ("endless", "deaf"):
    time.sleep(600)
"""
PROGRAM = (sys.executable, "-c", CHILD)


def begun(folder: Path, name: str) -> tuple[int, str, list[str]]:
    process, threads, arguments = json.loads((folder / f"{name}.begun").read_text())
    return int(process), str(threads), list(arguments)


def test_two_run_at_once_and_a_failure_is_its_own(tmp_path: Path) -> None:
    """`first` and `second` each wait until both have begun: one after another they would never end."""
    lines: list[str] = []
    options = ["--short", "--out", str(tmp_path)]
    with side_by_side(["first", "second", "bad", "alone"], 2, options, lines.append, PROGRAM) as ended_well:
        assert [ended_well(name) for name in ("first", "second", "bad", "alone")] == [True, True, False, True]
        assert ended_well("kept from before")
    assert sorted(lines) == [f"{name}: half way" for name in ("alone", "bad", "first", "second")]
    process, threads, arguments = begun(tmp_path, "second")
    assert process != begun(tmp_path, "first")[0]
    assert threads == str(max(1, torch.get_num_threads() // 2))
    assert arguments == ["reproduce", "--jobs", "1", *options, "second"]


def test_a_stop_leaves_no_process(tmp_path: Path) -> None:
    def stopped() -> None:
        options = ["--out", str(tmp_path)]
        with side_by_side(["endless", "first", "later"], 2, options, lambda line: None, PROGRAM) as ended_well:
            assert ended_well("first")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    with pytest.raises(ProcessLookupError):
        os.kill(begun(tmp_path, "endless")[0], 0)


def test_what_ignores_interrupts_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a shell's background jobs do, and what they start."""
    monkeypatch.setattr(module, "STOP_SECONDS", 0.2)

    def stopped() -> None:
        options = ["--out", str(tmp_path)]
        with side_by_side(["deaf", "first"], 2, options, lambda line: None, PROGRAM) as ended_well:
            assert ended_well("first")
            while not (tmp_path / "deaf.ready").exists():
                time.sleep(0.01)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    with pytest.raises(ProcessLookupError):
        os.kill(begun(tmp_path, "deaf")[0], 0)
