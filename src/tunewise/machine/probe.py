"""What the present machine can do: matmul rate by dtype and shape, memory bandwidth, launch overhead, memory.

Every number is a median over samples with its quartiles, because another process may be running. A sample
is a batch of calls long enough for the clock, ended by waiting for the device.
"""

from __future__ import annotations

import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import psutil
import torch

from tunewise.errors import InputError
from tunewise.machine import catalogue
from tunewise.machine.machine import Dtype, Interconnect, Machine, Reading
from tunewise.units import MIB

Work = Callable[[], object]
Kind = Literal["cuda", "cpu", "mps"]

SAMPLE_SECONDS = 0.005
"""Calls are repeated within one sample until it takes about this long."""
MIN_SAMPLES = 5
MAX_SAMPLES = 200

CPU_SHAPES = ((512, 512, 512), (1024, 1024, 1024), (2048, 1024, 1024), (1024, 4096, 1024))
DEVICE_SHAPES = (
    (1024, 1024, 1024),
    (2048, 2048, 2048),
    (4096, 4096, 4096),
    (8192, 8192, 8192),
    (8192, 11264, 4096),
    (2048, 2048, 13312),
)
"""(M, N, K): a small table from one block's layers to the largest that matters."""


def measure_machine(
    price_per_hour: float | None = None,
    seconds: float = 10.0,
    device: Literal["auto", "cuda", "cpu", "mps"] = "auto",
) -> Machine:
    """Measure the machine that this process runs on.

    `flops_per_second` is the best median over the shapes of each dtype, so `achievable` is 1 throughout;
    bandwidth is the better of copy and triad (bytes read and written, as STREAM counts them). Usable memory
    is what is free now.

    Args:
        price_per_hour: put into the machine as it is.
        seconds: about how long to measure; slow machines take longer, for at least five samples of
            everything.
        device: "auto" takes cuda, then mps, then cpu.

    Raises:
        InputError: `seconds` is not positive, or the device does not exist.
    """
    if not seconds > 0 or math.isinf(seconds):
        raise InputError(f"seconds must be a positive number, not {seconds}.")
    kind = _choose(device)
    where = torch.device(kind)
    dtypes = _dtypes(kind)
    shapes = CPU_SHAPES if kind == "cpu" else DEVICE_SHAPES
    share = 0.7 * seconds / (len(dtypes) * len(shapes))
    matmuls = [_matmul(dtype, shape, where, share) for dtype in dtypes for shape in shapes]
    streams = _streams(where, 0.25 * seconds)
    launch = _launch(where, 0.05 * seconds)
    best = {dtype: max(each.median for each in matmuls if each.dtype == dtype) for dtype in dtypes}
    readings = (*matmuls, *streams, launch)
    total, usable, rule = _memory(kind)
    return Machine(
        name=device_name(kind),
        kind=kind,
        memory_bytes=total,
        usable_memory_bytes=usable,
        usable_memory_rule=rule,
        bandwidth_bytes_per_second=max(each.median for each in streams),
        flops_per_second=best,
        achievable=dict.fromkeys(dtypes, 1.0),
        interconnect=_catalogued_links(kind),
        alignment_bytes=128 if kind == "cuda" and torch.cuda.get_device_capability() >= (8, 0) else 16,
        num_multiprocessors=_num_multiprocessors(kind),
        power_watts=_power_limit(kind),
        launch_overhead_seconds=launch.median,
        price_per_hour=price_per_hour,
        source=f"measured here with torch {torch.__version__}, medians; {_worst_spread(readings)}",
        readings=readings,
    )


def _choose(device: str) -> Kind:
    found: dict[Kind, bool] = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    for kind, present in found.items():
        if device == kind and not present:
            here = ", ".join(each for each in found if found[each])
            raise InputError(f"There is no {device} device here; torch finds {here}.")
        if present and device in ("auto", kind):
            return kind
    raise InputError(f"device must be auto, cuda, mps or cpu, not '{device}'.")


def _dtypes(kind: Kind) -> tuple[Dtype, ...]:
    if kind == "mps":
        return ("fp32", "bf16", "fp16")
    if kind == "cpu":
        return ("fp32", "bf16", "int8") if torch.cpu._is_vnni_supported() else ("fp32", "bf16")
    if torch.version.hip is not None:
        return ("fp32", "bf16", "fp16")
    capability = torch.cuda.get_device_capability()
    if capability >= (8, 9):
        return ("fp32", "tf32", "bf16", "fp16", "fp8", "int8")
    if capability >= (8, 0):
        return ("fp32", "tf32", "bf16", "fp16", "int8")
    return ("fp32", "fp16", "int8") if capability >= (7, 5) else ("fp32", "fp16")


def _matmul(dtype: Dtype, shape: tuple[int, int, int], device: torch.device, seconds: float) -> Reading:
    M, N, K = shape
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        samples = _samples(_product(dtype, M, N, K, device), device, seconds)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    rates = [2.0 * M * N * K / each for each in samples]
    return _reading("matmul", "FLOP/s", rates, dtype, shape)


def _product(dtype: Dtype, M: int, N: int, K: int, device: torch.device) -> Work:
    """Return a call that multiplies (M, K) by (N, K) transposed, as a linear layer does."""
    left_MK = torch.randn(M, K, device=device)
    right_NK = torch.randn(N, K, device=device)
    if dtype == "fp8":
        one = torch.ones((), device=device)
        left_8, right_8 = left_MK.to(torch.float8_e4m3fn), right_NK.to(torch.float8_e4m3fn)
        return lambda: torch._scaled_mm(left_8, right_8.t(), one, one, out_dtype=torch.bfloat16)
    if dtype == "int8":
        left_i, right_i = (left_MK * 10).to(torch.int8), (right_NK * 10).to(torch.int8)
        return lambda: torch._int_mm(left_i, right_i.t())
    in_memory = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
    left, right = left_MK.to(in_memory), right_NK.to(in_memory)
    return lambda: torch.nn.functional.linear(left, right)


def _streams(device: torch.device, seconds: float) -> list[Reading]:
    # Arrays far beyond any cache; on a device small enough to leave room for others.
    num_bytes = 128 * MIB if device.type == "cpu" else 512 * MIB
    a, b, c = (torch.ones(num_bytes // 4, device=device) for _ in range(3))
    copies = _samples(lambda: a.copy_(b), device, seconds / 2)
    triads = _samples(lambda: torch.add(b, c, alpha=3.0, out=a), device, seconds / 2)
    return [
        _reading("copy", "B/s", [2 * num_bytes / each for each in copies], None, (num_bytes,)),
        _reading("triad", "B/s", [3 * num_bytes / each for each in triads], None, (num_bytes,)),
    ]


def _launch(device: torch.device, seconds: float) -> Reading:
    one = torch.zeros(1, device=device)
    return _reading("launch", "s", _samples(lambda: one.add_(1.0), device, seconds), None, ())


def _samples(work: Work, device: torch.device, seconds: float) -> list[float]:
    """Return seconds per call of at least `MIN_SAMPLES` samples, taken for about `seconds`."""
    for _ in range(2):
        work()
    once = _timed(work, 1, device)
    num_calls = max(1, min(10_000, math.ceil(SAMPLE_SECONDS / max(once, 1e-9))))
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < MIN_SAMPLES or (time.perf_counter() < end and len(samples) < MAX_SAMPLES):
        samples.append(_timed(work, num_calls, device) / num_calls)
    return samples


def _timed(work: Work, num_calls: int, device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    for _ in range(num_calls):
        work()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _reading(
    what: Literal["matmul", "copy", "triad", "launch"],
    unit: Literal["FLOP/s", "B/s", "s"],
    values: list[float],
    dtype: Dtype | None,
    shape: tuple[int, ...],
) -> Reading:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Reading(
        what=what,
        unit=unit,
        median=median,
        low=low,
        high=high,
        num_samples=len(values),
        dtype=dtype,
        shape=shape,
    )


def _worst_spread(readings: tuple[Reading, ...]) -> str:
    worst = max(readings, key=lambda reading: reading.spread)
    of = f"{worst.dtype} {worst.what}" if worst.dtype else worst.what
    return f"largest spread (quartiles over median) {worst.spread:.0%}, of {of}"


def _memory(kind: Kind) -> tuple[int, int, str]:
    """Return total bytes, usable bytes and the rule."""
    if kind == "cuda":
        free, total = torch.cuda.mem_get_info()
        usable = free + torch.cuda.memory_reserved()
        return total, usable, "free on the device now, with this process's context made"
    total = psutil.virtual_memory().total
    if kind == "mps":
        return total, torch.mps.recommended_max_memory(), "Metal's recommended working set"
    available = psutil.virtual_memory().available
    limit, used = _control_group()
    if limit is None or limit >= total:
        return total, available, "available to new processes now, as the system says"
    return limit, min(available, limit - used), "the control group's limit less what it uses now"


def _control_group() -> tuple[int | None, int]:
    """Return the memory limit of this container (None for none) and what it uses, in bytes."""
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        if Path(limit_file).is_file() and Path(used_file).is_file():
            limit = Path(limit_file).read_text().strip()
            return (int(limit) if limit.isdigit() else None), int(Path(used_file).read_text())
    return None, 0


def device_name(kind: Kind) -> str:
    """Return what this machine's device of a kind calls itself, "AMD EPYC 9R14"."""
    if kind == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if kind == "cpu" and cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _num_multiprocessors(kind: Kind) -> int | None:
    if kind == "cuda":
        return torch.cuda.get_device_properties().multi_processor_count
    return torch.get_num_threads() if kind == "cpu" else None


def _catalogued_links(kind: Kind) -> Interconnect:
    """Return what the catalogue says about the links: they cannot be measured on a single device."""
    if kind != "cuda":
        return Interconnect()
    try:
        return catalogue.find(torch.cuda.get_device_name()).interconnect
    except InputError:
        return Interconnect()


def _power_limit(kind: Kind) -> float | None:
    """Return the device's present power limit as `nvidia-smi` reads it, or None where it cannot be read."""
    if kind != "cuda" or torch.version.hip is not None:
        return None
    identity = f"GPU-{torch.cuda.get_device_properties().uuid}"
    command = ["nvidia-smi", "-i", identity, "--query-gpu=power.limit", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        return float(answer.strip())
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
