"""The probe on this processor: what it measures has the right size and keeps its spread."""

from __future__ import annotations

import pytest
import torch

from tunewise.errors import InputError
from tunewise.machine import probe
from tunewise.machine.machine import Machine, machine_from_yaml


@pytest.fixture(scope="module")
def here() -> Machine:
    return probe.measure_machine(price_per_hour=0.5, seconds=0.5, device="cpu")


def test_everything_is_measured(here: Machine) -> None:
    assert here.kind == "cpu"
    assert here.price_per_hour == 0.5
    assert here.num_multiprocessors == torch.get_num_threads()
    dtypes = {"fp32", "bf16"} | ({"int8"} if torch.cpu._is_vnni_supported() else set())
    assert set(here.flops_per_second) == dtypes
    matmuls = [each for each in here.readings if each.what == "matmul"]
    assert {(each.dtype, each.shape) for each in matmuls} == {
        (dtype, shape) for dtype in dtypes for shape in probe.CPU_SHAPES
    }
    assert {each.what for each in here.readings} == {"matmul", "copy", "triad", "launch"}
    assert all(each.low <= each.median <= each.high and each.num_samples >= 5 for each in here.readings)


def test_the_best_median_is_the_ceiling(here: Machine) -> None:
    for dtype, rate in here.flops_per_second.items():
        assert rate == max(each.median for each in here.readings if each.dtype == dtype)
    assert here.bandwidth_bytes_per_second == max(each.median for each in here.readings if each.unit == "B/s")


def test_numbers_are_of_a_processor(here: Machine) -> None:
    assert 1e9 < here.flops("fp32") < 1e14
    assert 1e8 < here.bandwidth_bytes_per_second < 2e12
    assert here.launch_overhead_seconds is not None
    assert 1e-8 < here.launch_overhead_seconds < 1e-2
    assert 0 < here.usable_memory_bytes <= here.memory_bytes


def test_measured_machine_round_trips(here: Machine) -> None:
    assert machine_from_yaml(here.to_yaml()) == here


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "fp8", "int8"])
def test_products_compute_a_product(dtype: str) -> None:
    """The timed call is a real (M, K) x (N, K)^T product of the dtype it names."""
    torch.manual_seed(0)
    result = probe._product(dtype, 64, 32, 48, torch.device("cpu"))()  # type: ignore[arg-type]
    torch.manual_seed(0)
    left_MK, right_NK = torch.randn(64, 48), torch.randn(32, 48)
    assert isinstance(result, torch.Tensor)
    scale, tolerance = (100.0, 0.2) if dtype == "int8" else (1.0, {"fp32": 1e-5, "fp8": 0.1}.get(dtype, 0.01))
    reference_MN = left_MK.double() @ right_NK.double().T
    error = (result.double() / scale - reference_MN).norm() / reference_MN.norm()
    assert error < tolerance


def test_median_and_quartiles() -> None:
    reading = probe._reading("launch", "s", [5.0, 1.0, 2.0, 4.0, 3.0], None, ())
    assert (reading.low, reading.median, reading.high, reading.num_samples) == (2.0, 3.0, 4.0, 5)


def test_bad_wishes() -> None:
    with pytest.raises(InputError, match="positive"):
        probe.measure_machine(seconds=0)
    with pytest.raises(InputError, match="must be auto"):
        probe.measure_machine(device="tpu")  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no cuda device here; torch finds cpu"):
            probe.measure_machine(device="cuda")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_device() -> None:
    machine = probe.measure_machine(seconds=5, device="cuda")
    assert machine.kind == "cuda"
    assert machine.flops("fp16") > machine.flops("fp32")
    assert machine.usable_memory_bytes < machine.memory_bytes
