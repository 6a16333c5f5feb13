"""Generated code does no harm: fork bombs, endless loops, memory hogs, files, sockets, signals, whoever runs it.

Every test here starts the real thing; what bounds it besides the sandbox is only its own few seconds.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from tunewise.errors import InputError
from tunewise.quality import sandbox
from tunewise.quality.sandbox import Limits, run_python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's seccomp")

SHORT = Limits(seconds=2.0, memory_bytes=256 << 20)


@pytest.mark.parametrize(
    "code",
    [
        "assert 1 + 1 == 2",
        "import math, re, json, itertools, collections, random, datetime, hashlib, decimal\nassert math.pi",
        "from typing import List\ndef f(x: List[int]) -> int:\n    return sum(x)\nassert f([1, 2]) == 3",
        "import time\ntime.sleep(0.05)\nassert time.time() > 0",
        "import threading\ns = []\nt = threading.Thread(target=lambda: s.append(1))\nt.start(); t.join()\nassert s",
        "print('x' * 10_000_000)",
        "assert open('/proc/self/status').read()",
        "class A:\n    def f(self):\n        return [B() for _ in range(2)]\nclass B: pass\nassert len(A().f()) == 2",
    ],
)
def test_honest_code_passes(code: str) -> None:
    assert run_python(code).outcome == "passed"


@pytest.mark.parametrize(
    ("code", "detail"),
    [
        ("assert 1 + 1 == 3", "AssertionError"),
        ("def f(:", "left with code 1"),
        ("1 / 0", "ZeroDivisionError"),
        ("import sys\nsys.exit(0)\nassert False", "SystemExit"),
        ("import os\nos._exit(0)\nassert False", "left with code 0"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("def f(x):\n    return f(x + 1)\nf(0)", "RecursionError"),
        ("import ctypes\nctypes.string_at(0)", "killed by SIGSEGV"),
    ],
)
def test_wrong_code_fails_and_says_why(code: str, detail: str) -> None:
    found = run_python(code)
    assert found.outcome == "failed"
    assert found.detail.startswith(detail)


FORKS = {
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "fork": "import os\nos.fork()",
    "vfork through subprocess": "import subprocess\nsubprocess.run(['/bin/true'])",
    "shell": "import os\nassert os.system('true') == 0",
    "spawn": "import os\nos.posix_spawn('/bin/true', ['true'], {})",
    "exec": "import os\nos.execv('/bin/true', ['true'])",
    "multiprocessing": "import multiprocessing\nmultiprocessing.Process(target=print).start()",
    "raw clone": "import ctypes\nassert ctypes.CDLL(None).syscall(56, 17, 0, 0, 0, 0) >= 0",
    "raw clone3": "import ctypes\nassert ctypes.CDLL(None).syscall(435, 0, 0) >= 0",
}


@pytest.mark.parametrize("name", list(FORKS))
def test_no_process_is_started(name: str) -> None:
    before = children_of_all()
    found = run_python(FORKS[name], SHORT)
    assert found.outcome == "failed"
    assert children_of_all() <= before


def children_of_all() -> int:
    """Count the processes that stem from a sandbox."""
    count = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                count += b"sandbox_child" in (entry / "cmdline").read_bytes()
            except OSError:
                continue
    return count


LOOPS = {
    "loop": "while True: pass",
    "sleep": "import time\ntime.sleep(1000)",
    "ignored signals": "import signal\nfor s in (1, 2, 15, 24): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
    "caught exceptions": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "endless thread": "import threading\nthreading.Thread(target=lambda: list(iter(int, 1))).start()\nwhile 1: pass",
    "big number": "10 ** 10 ** 9",
    "regular expression": "import re\nre.match('(a+)+$', 'a' * 40 + 'b')",
}


@pytest.mark.parametrize("name", list(LOOPS))
def test_what_does_not_end_is_ended(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_START_SECONDS", 1.0)
    started = time.monotonic()
    found = run_python(LOOPS[name], Limits(seconds=0.5))
    assert found.outcome in ("timed out", "failed")
    assert found.outcome == "timed out" or found.detail.startswith(("killed by", "MemoryError"))
    assert time.monotonic() - started < 30.0
    assert children_of_all() == 0


HOGS = {
    "bytes": "x = bytearray(4 << 30)",
    "list": "x = []\nwhile True: x.append('y' * 1000_000)",
    "anonymous map": "import mmap\nm = mmap.mmap(-1, 4 << 30)",
    "locked memory": "import ctypes\nassert ctypes.CDLL(None).mlockall(3) == 0",
    "memory file": "import os\nos.memfd_create('x')",
    "raised limit": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "big pipe": "import os\nos.pipe()",
    "threads": "import threading, time\nfor _ in range(100000): threading.Thread(target=time.sleep, args=(9,)).start()",
}


@pytest.mark.parametrize("name", list(HOGS))
def test_memory_is_bounded(name: str) -> None:
    found = run_python(HOGS[name], SHORT)
    assert found.outcome == "failed", found


def test_files_stay_as_they_are(tmp_path: Path) -> None:
    kept = tmp_path / "kept.txt"
    kept.write_text("as it was")
    attempts = [
        f"open({str(kept)!r}, 'w').write('x')",
        f"open({str(kept)!r}, 'a').write('x')",
        f"open({str(kept)!r}, 'r+').write('x')",
        f"open({str(tmp_path / 'new')!r}, 'x')",
        "open('here.txt', 'w')",
        "open('/tmp/tunewise-sandbox-escaped', 'w')",
        f"import os\nos.remove({str(kept)!r})",
        f"import os\nos.rename({str(kept)!r}, {str(tmp_path / 'moved')!r})",
        f"import os\nos.truncate({str(kept)!r}, 0)",
        f"import os\nos.chmod({str(kept)!r}, 0)",
        f"import os\nos.chown({str(kept)!r}, 1, 1)",
        f"import os\nos.utime({str(kept)!r}, (0, 0))",
        f"import os\nos.link({str(kept)!r}, {str(tmp_path / 'linked')!r})",
        f"import os\nos.symlink({str(kept)!r}, {str(tmp_path / 'linked')!r})",
        f"import os\nos.mkdir({str(tmp_path / 'folder')!r})",
        f"import os\nos.mkfifo({str(tmp_path / 'fifo')!r})",
        f"import shutil\nshutil.rmtree({str(tmp_path)!r})",
        f"import tempfile\ntempfile.NamedTemporaryFile(dir={str(tmp_path)!r})",
        f"import ctypes\nassert ctypes.CDLL(None).creat({os.fsencode(kept)!r}, 511) >= 0",
        f"import sqlite3\nsqlite3.connect({str(tmp_path / 'd.db')!r}).execute('create table t (x)')",
    ]
    before = kept.stat()
    for attempt in attempts:
        assert run_python(attempt, SHORT).outcome == "failed", attempt
        assert kept.read_text() == "as it was", attempt
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
    assert kept.stat().st_mtime_ns == before.st_mtime_ns
    assert not Path("/tmp/tunewise-sandbox-escaped").exists()


def test_the_network_is_out_of_reach() -> None:
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        thread = threading.Thread(target=listen, args=(server, heard))
        attempts = [
            f"import socket\nsocket.create_connection(('127.0.0.1', {port})).sendall(b'out')",
            "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'out', ('8.8.8.8', 53))",
            "import socket\nsocket.socket(socket.AF_UNIX)",
            "import socket\nsocket.socketpair()",
            f"import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}')",
            "import ctypes\nassert ctypes.CDLL(None).syscall(425, 4, 0) >= 0  # io_uring goes around filters",
        ]
        thread.start()
        outcomes = [run_python(attempt, SHORT).outcome for attempt in attempts]
        thread.join()
    assert outcomes == ["failed"] * len(attempts)
    assert heard == []


def listen(server: socket.socket, heard: list[bytes]) -> None:
    for _ in range(15):
        try:
            connection, _ = server.accept()
        except TimeoutError:
            continue
        heard.append(connection.recv(10))


SIGNALS = {
    "the parent": "import os\nos.kill(os.getppid(), 9)",
    "everybody": "import os\nos.kill(-1, 9)",
    "a group": "import os\nos.killpg(os.getpgid(os.getppid()), 9)",
    "tracing": "import ctypes\nassert ctypes.CDLL(None).ptrace(16, 1, 0, 0) >= 0",
    "a lighter filter": "import ctypes\nassert ctypes.CDLL(None).prctl(22, 0, 0, 0, 0) >= 0",
    "a name space": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "root": "import os\nos.setuid(1)",
    "mount": "import ctypes\nassert ctypes.CDLL(None).mount(b'x', b'/mnt', b'tmpfs', 0, 0) == 0",
}


@pytest.mark.parametrize("name", list(SIGNALS))
def test_nothing_else_is_touched(name: str) -> None:
    assert run_python(SIGNALS[name], SHORT).outcome == "failed"


def test_the_environment_is_empty() -> None:
    os.environ["TUNEWISE_SECRET"] = "hidden"
    try:
        assert run_python("import os\nassert 'TUNEWISE_SECRET' not in os.environ").outcome == "passed"
    finally:
        del os.environ["TUNEWISE_SECRET"]


def test_another_machine_is_an_error_and_no_unsafe_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(InputError, match=r"only run behind Linux's seccomp.*riscv64"):
        run_python("open('/tmp/tunewise-sandbox-escaped', 'w')")


def test_a_flood_of_results_is_no_pass() -> None:
    flood = """
import os
while True:
    for descriptor in range(3, 30):
        try:
            os.write(descriptor, b"x" * 4096)
        except OSError:
            pass
"""
    found = run_python(flood, Limits(0.5))
    assert found.outcome in ("timed out", "failed")
