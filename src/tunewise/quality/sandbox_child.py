"""What runs generated code: a process that can compute, read files, and nothing else. Started by `sandbox.py`.

Before any foreign line runs, the process takes everything from itself that could do harm, for good: a seccomp filter
lets through a short list of system calls (compute, memory, time, reading files) and answers all others with an error.
There is no way left to start a process, open a socket, write, rename or delete a file, send a signal, or raise a limit,
whoever the user is (root included). Memory, processor time, file sizes and open files have hard limits.

This file imports only what every Python has, and nothing of tunewise: it must start in milliseconds.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import struct
import sys

ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, EACCES, ENOSYS, ENOTTY = 1, 13, 38, 25
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _PR_SET_PDEATHSIG, _FILTER, _SIGKILL = 38, 22, 1, 2, 9

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""AUDIT_ARCH of the machines that the numbers below are known for."""

# fmt: off
CALLS = {  # name: (x86_64, aarch64); None where the machine has no such call
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "stat": (4, None), "fstat": (5, 80), "lstat": (6, None),
    "poll": (7, None), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "pread64": (17, 67),
    "readv": (19, 65), "writev": (20, 66), "access": (21, None), "select": (23, None), "sched_yield": (24, 124),
    "mremap": (25, 216), "madvise": (28, 233), "dup": (32, 23), "nanosleep": (35, 101), "alarm": (37, None),
    "setitimer": (38, 103), "getpid": (39, 172), "exit": (60, 93), "uname": (63, 160), "getcwd": (79, 17),
    "readlink": (89, None), "gettimeofday": (96, 169), "getrlimit": (97, 163), "getrusage": (98, 165),
    "sysinfo": (99, 179), "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175),
    "getegid": (108, 177), "getppid": (110, 173), "sigaltstack": (131, 132), "gettid": (186, 178), "futex": (202, 98),
    "sched_getaffinity": (204, 123), "getdents64": (217, 61), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "exit_group": (231, 94), "newfstatat": (262, 79), "readlinkat": (267, 78),
    "faccessat": (269, 48), "pselect6": (270, 72), "ppoll": (271, 73), "set_robust_list": (273, 99),
    "getcpu": (309, 168), "getrandom": (318, 278), "membarrier": (324, 283), "statx": (332, 291), "rseq": (334, 293),
    "faccessat2": (439, 439),
}
"""What needs no look at its arguments."""
# fmt: on

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CLONE_THREAD = 0x10000
_HARMLESS_IOCTLS = (0x5401, 0x5451, 0x5450)  # TCGETS (is it a terminal?), FIOCLEX, FIONCLEX
_HARMLESS_FCNTLS = (1, 2, 3, 1030)  # F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC


def main() -> None:
    """Read {"code", "token", "seconds", "memory_bytes", "result"} from standard input and run the code."""
    order = json.loads(sys.stdin.buffer.read())
    program = compile(order["code"], "<generated>", "exec", dont_inherit=True)
    lock(order["seconds"], order["memory_bytes"])
    try:
        exec(program, {"__name__": "__main__", "__builtins__": __builtins__})
        said = order["token"]  # only code that ran to its end gets here; os._exit(0) does not
    except BaseException as error:  # foreign code may raise anything, its own exits too: all of it is its answer
        said = f"{type(error).__name__}: {error}"[:300]
    os.write(order["result"], said.encode("utf-8", "replace"))
    os._exit(0)


def lock(seconds: float, memory_bytes: int) -> None:
    """Give up, for good, everything but computing and reading."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 32,
        resource.RLIMIT_CORE: 0,
    }
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))
    instructions = filter_program(platform.machine())
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in instructions))
    header = struct.pack("HxxxxxxP", len(instructions), ctypes.addressof(program))
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(_PR_SET_SECCOMP, _FILTER, header, 0, 0):
        os._exit(3)  # never run foreign code unlocked


def filter_program(machine: str) -> list[tuple[int, int, int, int]]:
    """Return the filter as BPF instructions (code, jump if true, jump if false, k)."""
    column = list(ARCHITECTURES).index(machine)
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, ARCHITECTURES[machine]), _answer(KILL), (_LOAD, 0, 0, 0)]
    for numbers in CALLS.values():
        number = numbers[column]
        if number is not None:
            program += [(_EQUAL, 0, 1, number), _answer(ALLOW)]
    opens, openat, clone, clone3 = ((2, 257, 56, 435), (None, 56, 220, 435))[column]
    ioctl, fcntl, prlimit = ((16, 72, 302), (29, 25, 261))[column]
    if opens is not None:
        program += _case(opens, [_argument(1), (_ANY_BIT, 0, 1, _WRITING), _answer(ERRNO | EACCES), _answer(ALLOW)])
    program += _case(openat, [_argument(2), (_ANY_BIT, 0, 1, _WRITING), _answer(ERRNO | EACCES), _answer(ALLOW)])
    program += _case(clone, [_argument(0), (_ANY_BIT, 0, 1, _CLONE_THREAD), _answer(ALLOW), _answer(ERRNO | EPERM)])
    program += _case(clone3, [_answer(ERRNO | ENOSYS)])  # its flags lie in memory; the C library then takes clone
    program += _case(ioctl, [_argument(1), *_one_of(_HARMLESS_IOCTLS), _answer(ERRNO | ENOTTY)])
    program += _case(fcntl, [_argument(1), *_one_of(_HARMLESS_FCNTLS), _answer(ERRNO | EPERM)])
    asks_only = [_argument(2), (_EQUAL, 0, 3, 0), _argument(2, high=True), (_EQUAL, 0, 1, 0), _answer(ALLOW)]
    program += _case(prlimit, [*asks_only, _answer(ERRNO | EPERM)])
    return [*program, _answer(ERRNO | EPERM)]


def _case(number: int, block: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    return [(_EQUAL, 0, len(block), number), *block]


def _one_of(values: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    return [each for value in values for each in ((_EQUAL, 0, 1, value), _answer(ALLOW))]


def _argument(index: int, *, high: bool = False) -> tuple[int, int, int, int]:
    """Load one half of a call's argument; little-endian machines only, as all in `ARCHITECTURES` are."""
    return (_LOAD, 0, 0, 16 + 8 * index + 4 * high)


def _answer(action: int) -> tuple[int, int, int, int]:
    return (_RETURN, 0, 0, action)


if __name__ == "__main__":
    main()
