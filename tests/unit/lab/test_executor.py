from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tunewise.errors import StorageError
from tunewise.lab.executor import Executor
from tunewise.lab.outcome import Failed, Measurement, OutOfMemory

JOBS = "tests.unit.lab.faulty"


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    with Executor(memory_bytes=512 * 2**20) as executor:
        yield executor


def run(executor: Executor, folder: Path, name: str, timeout: float = 60.0, **arguments: Any) -> Any:
    return executor.run(f"{JOBS}:{name}", arguments, folder / name, timeout)


def test_a_measurement_comes_back(executor: Executor, tmp_path: Path) -> None:
    outcome = run(executor, tmp_path, "succeed", loss=2.5)
    assert isinstance(outcome, Measurement)
    assert outcome.loss == 2.5
    assert outcome.trial_seconds > 0


def test_every_trial_has_a_process_of_its_own_that_starts_in_under_a_second(executor: Executor, tmp_path: Path) -> None:
    executor.start()
    outcomes, seconds = [], []
    for number in range(5):
        started = time.perf_counter()
        outcomes.append(run(executor, tmp_path / str(number), "process"))
        seconds.append(time.perf_counter() - started)
    assert statistics.median(seconds) < 1
    assert len({outcome.steps for outcome in outcomes}) == 5
    assert len({outcome.tokens for outcome in outcomes}) == 1  # one server


def test_trials_compute_on_all_cores(executor: Executor, tmp_path: Path) -> None:
    for number in range(2):
        assert run(executor, tmp_path / str(number), "threads").loss == 512.0**3


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("run_out_of_memory", {"num_bytes": 4 * 2**30}, "allocate memory"),
        ("not_fit", {}, "does not fit"),
        ("vanish", {}, "memory ran out"),
    ],
)
def test_running_out_of_memory_is_an_outcome(
    executor: Executor, tmp_path: Path, name: str, arguments: dict[str, Any], reason: str
) -> None:
    outcome = run(executor, tmp_path, name, **arguments)
    assert isinstance(outcome, OutOfMemory)
    assert reason in outcome.reason
    assert isinstance(run(executor, tmp_path, "succeed"), Measurement)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("crash", "SIGSEGV"),
        ("leave", "exit"),
        ("wrong_input", "no such thing"),
        ("break_down", "ValueError: a bug in a method"),
    ],
)
def test_whatever_else_goes_wrong_is_an_outcome(executor: Executor, tmp_path: Path, name: str, reason: str) -> None:
    outcome = run(executor, tmp_path, name)
    assert isinstance(outcome, Failed)
    assert reason in outcome.reason.replace("SystemExit", "exit")
    assert Path(outcome.log).is_file()
    assert isinstance(run(executor, tmp_path, "succeed"), Measurement)


def test_a_trial_that_hangs_is_stopped_with_all_its_children(executor: Executor, tmp_path: Path) -> None:
    left_behind = tmp_path / "left-behind"
    outcome = run(executor, tmp_path, "hang_with_child", timeout=1.0, file=str(left_behind))
    assert isinstance(outcome, Failed)
    assert "longer than 1 s" in outcome.reason
    assert isinstance(run(executor, tmp_path, "succeed"), Measurement)
    time.sleep(3.5)
    assert not left_behind.exists()


def test_nothing_that_a_trial_does_reaches_the_next_one(executor: Executor, tmp_path: Path) -> None:
    run(executor, tmp_path, "tamper")
    assert run(executor, tmp_path, "untouched").steps == 1


def test_the_server_is_started_again_when_it_died(tmp_path: Path) -> None:
    with Executor() as executor:
        executor.start()
        assert executor._server is not None
        executor._server.kill()
        executor._server.wait()
        assert isinstance(run(executor, tmp_path, "succeed"), Measurement)


def test_a_folder_that_cannot_be_made_is_an_error(executor: Executor, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be made"):
        executor.run(f"{JOBS}:succeed", {}, tmp_path / "file" / "trial", 10)


def test_trials_die_with_the_process_that_ordered_them(tmp_path: Path) -> None:
    marker = tmp_path / "alive"
    program = f"""
import pathlib, sys
from tunewise.lab.executor import Executor
executor = Executor()
executor.start()
print("ready", flush=True)
executor.run("{JOBS}:hang_with_child", {{"file": {str(marker)!r}}}, pathlib.Path({str(tmp_path / "trial")!r}), 60)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    log = tmp_path / "trial" / "log.txt"
    deadline = time.monotonic() + 20
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    time.sleep(1.0)
    remaining = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, check=False).stdout
    servers = [line for line in remaining.split() if line]
    assert all(_is_sleeper(int(pid)) for pid in servers)


def _is_sleeper(pid: int) -> bool:
    """The grandchild that a killed trial left is not the trial."""
    try:
        return "open(" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return True


def test_a_trial_whose_server_died_before_it_began_ends(tmp_path: Path) -> None:
    survived = tmp_path / "survived"
    code = f"""
import os, time
from tunewise.lab.server import die_with_parent
server = os.getpid()
if os.fork() == 0:
    while os.getppid() == server:
        time.sleep(0.01)
    die_with_parent(server)
    open({str(survived)!r}, "w").close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not done.stderr  # the child holds this pipe: it has ended
    assert not survived.exists()
