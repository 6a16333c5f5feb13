"""What it runs on: the `Machine`, one accelerator (or one processor) with its ceilings.

A machine comes from the catalogue (`catalogue.find`: what vendors print, dense) or from a measurement of
the present one (`probe.measure_machine`); the planner does not care which. All numbers are of a single
device.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError

from tunewise.errors import InputError
from tunewise.recipe import Fraction, NonNegative, PositiveInt, Value

Dtype = Literal["fp32", "tf32", "bf16", "fp16", "fp8", "int8"]
"""How a matrix product computes. tf32 keeps fp32 in memory; all accumulate in 32 bits."""

DTYPE_BYTES: dict[Dtype, int] = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}
"""Bytes of one element in memory."""

TYPICAL_MATMUL_FRACTION = 0.80
"""Best matmul over printed peak where nobody measured it: bf16 reaches 0.80 on H100, 0.81 to 0.87 on A100."""

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class Interconnect(Value):
    """How bytes leave the device: both directions added up, as vendors print it; None for none."""

    nvlink_bytes_per_second: Positive | None = None
    pcie_bytes_per_second: Positive | None = None


class Reading(Value):
    """One thing measured several times: the median, and the quartiles as its spread.

    Attributes:
        what: "matmul", "copy", "triad" or "launch".
        unit: of the three numbers: "FLOP/s", "B/s" or "s".
        dtype: for a matmul.
        shape: (M, N, K) of a matmul; (num_bytes,) of one array of a copy or triad.
    """

    what: Literal["matmul", "copy", "triad", "launch"]
    unit: Literal["FLOP/s", "B/s", "s"]
    median: Positive
    low: Positive
    high: Positive
    num_samples: PositiveInt
    dtype: Dtype | None = None
    shape: tuple[int, ...] = ()

    @property
    def spread(self) -> float:
        """Interquartile range over the median; above 0.1 something else was running as well."""
        return (self.high - self.low) / self.median


class Machine(Value):
    """One device: its memory, its ceilings, its price, and where the numbers are from.

    Attributes:
        kind: torch's device type. AMD's accelerators are "cuda" to torch.
        memory_bytes: what the label says.
        usable_memory_bytes: what tensors can have: the label less what firmware, driver and context take.
        usable_memory_rule: how `usable_memory_bytes` was found.
        bandwidth_bytes_per_second: of the device memory, read and written bytes added up.
        flops_per_second: dense FLOP/s of matrix products by dtype (int8: operations); a missing dtype is
            unknown or not done in hardware.
        achievable: the best measured matmul over `flops_per_second`, where somebody measured it.
        alignment_bytes: matrix dimensions that are multiples of this run at full speed (NVIDIA's matmul
            guide).
        num_multiprocessors: NVIDIA's SMs, AMD's compute units, Apple's GPU cores, or a processor's threads.
        launch_overhead_seconds: host time of one tiny operation, where measured.
        price_per_hour: in whatever currency the user pays.
        readings: what was measured, for a measured machine.
    """

    name: str
    kind: Literal["cuda", "cpu", "mps"]
    memory_bytes: PositiveInt
    usable_memory_bytes: PositiveInt
    usable_memory_rule: str
    bandwidth_bytes_per_second: Positive
    flops_per_second: dict[Dtype, Positive]
    achievable: dict[Dtype, Fraction] = Field(default_factory=dict)
    interconnect: Interconnect = Interconnect()
    alignment_bytes: PositiveInt = 16
    num_multiprocessors: PositiveInt | None = None
    power_watts: Positive | None = None
    launch_overhead_seconds: Positive | None = None
    price_per_hour: NonNegative | None = None
    source: str
    readings: tuple[Reading, ...] = ()

    @property
    def is_amd(self) -> bool:
        """Whether it is one of AMD's accelerators, whose FP8 numbers have another bias than NVIDIA's."""
        return self.kind == "cuda" and self.name.startswith(("MI", "AMD"))

    def flops(self, dtype: Dtype) -> float:
        """Return the peak FLOP/s of matrix products in `dtype`.

        Raises:
            InputError: this machine does not multiply in `dtype`.
        """
        if dtype not in self.flops_per_second:
            raise InputError(f"{self.name} has no known rate for {dtype}; known: {', '.join(self.flops_per_second)}.")
        return self.flops_per_second[dtype]

    def achievable_flops(self, dtype: Dtype) -> float:
        """Return the FLOP/s of large, well-shaped matmuls; by `TYPICAL_MATMUL_FRACTION` where unmeasured."""
        return self.flops(dtype) * self.achievable.get(dtype, TYPICAL_MATMUL_FRACTION)

    def ridge_point(self, dtype: Dtype) -> float:
        """Return peak FLOP/s over bandwidth, in FLOP/B: below this intensity an operation waits for memory.

        Source: Williams et al. 2009, "Roofline"; NVIDIA, Matrix Multiplication Background User's Guide.
        """
        return self.flops(dtype) / self.bandwidth_bytes_per_second

    def alignment(self, dtype: Dtype) -> int:
        """Return the number of elements of which matrix dimensions should be multiples."""
        return max(1, self.alignment_bytes // DTYPE_BYTES[dtype])

    def cost(self, seconds: float) -> float:
        """Return the price of `seconds`, or nan when no price is known."""
        return math.nan if self.price_per_hour is None else self.price_per_hour * seconds / 3600

    def replace(self, **changes: Any) -> Machine:
        """Return this machine with some fields changed, validated again."""
        return Machine(**{**{name: getattr(self, name) for name in Machine.model_fields}, **changes})

    def to_yaml(self) -> str:
        """Write all fields as YAML; `machine_from_yaml` reads them back without loss."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def machine_from_yaml(text: str, where: str = "machine") -> Machine:
    """Read what `Machine.to_yaml` (or a person) wrote; JSON is YAML as well.

    Raises:
        InputError: not YAML, an unknown field or a wrong value; the message begins with `where`.
    """
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{where} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{where} must hold the fields of a machine, such as 'name' and 'memory_bytes'.")
    try:
        return Machine(**content)
    except (ValidationError, TypeError) as error:
        if not isinstance(error, ValidationError):
            raise InputError(f"{where} has a field whose name is not a text.") from None
        lines = [f"  {'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise InputError(f"{where} is not a machine:\n" + "\n".join(lines)) from None


def read_machine(path: Path) -> Machine:
    """Read a machine's YAML or JSON file.

    Raises:
        InputError: no such file, or not a machine.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The machine file {path} cannot be read: {error}") from None
    return machine_from_yaml(text, str(path))
