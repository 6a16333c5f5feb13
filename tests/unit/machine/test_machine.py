"""The Machine value: derived numbers, round trips and complaints."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tunewise.errors import InputError
from tunewise.machine.catalogue import CATALOGUE, find
from tunewise.machine.machine import Machine, Reading, machine_from_yaml, read_machine


@pytest.mark.parametrize("machine", CATALOGUE, ids=lambda machine: machine.name)
def test_round_trips_are_the_identity(machine: Machine) -> None:
    assert machine_from_yaml(machine.to_yaml()) == machine
    assert Machine.model_validate_json(machine.model_dump_json()) == machine
    assert machine_from_yaml(machine.model_dump_json()) == machine


def test_round_trip_of_a_measured_machine(tmp_path: Path) -> None:
    reading = Reading(
        what="matmul",
        unit="FLOP/s",
        median=1.5e11,
        low=1.4e11,
        high=1.6e11,
        num_samples=9,
        dtype="bf16",
        shape=(8, 8, 8),
    )
    machine = find("T4").replace(readings=(reading,), launch_overhead_seconds=5e-6, price_per_hour=0.35)
    path = tmp_path / "here.yaml"
    path.write_text(machine.to_yaml())
    assert read_machine(path) == machine
    assert reading.spread == pytest.approx(0.2 / 1.5)


@pytest.mark.parametrize(
    ("name", "dtype", "ridge"),
    [
        ("V100 SXM 16GB", "fp16", 138.9),
        ("A100 SXM 40GB", "bf16", 200.6),
        ("A100 SXM 80GB", "bf16", 153.0),
        ("H100", "bf16", 295.3),
        ("H200", "bf16", 206.1),
    ],
)
def test_ridge_points_are_those_of_the_reference(name: str, dtype: str, ridge: float) -> None:
    assert find(name).ridge_point(dtype) == pytest.approx(ridge, abs=0.1)  # type: ignore[arg-type]


def test_alignment_is_128_bytes_from_ampere_on_and_16_before() -> None:
    assert [find("A100 80GB").alignment(dtype) for dtype in ("fp32", "bf16", "fp8")] == [32, 64, 128]
    assert [find("T4").alignment(dtype) for dtype in ("fp32", "fp16", "int8")] == [4, 8, 16]


def test_achievable_rate_is_measured_or_typical() -> None:
    assert find("H200").achievable_flops("bf16") == pytest.approx(794.5e12)
    assert find("H200").achievable_flops("fp8") == pytest.approx(1453e12)
    assert find("A100 80GB").achievable_flops("bf16") == pytest.approx(271.2e12)
    assert find("RTX 4090").achievable_flops("bf16") == pytest.approx(0.8 * 165.2e12)


def test_amds_accelerators_are_known_as_such() -> None:
    assert find("MI300X").is_amd
    assert not any(find(name).is_amd for name in ("H100", "T4", "M4 Max"))


def test_cost() -> None:
    assert find("H100").replace(price_per_hour=3.0).cost(1800) == pytest.approx(1.5)
    assert math.isnan(find("H100").cost(1800))


def test_unknown_dtype_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="V100 SXM 16GB has no known rate for bf16; known: fp32, fp16"):
        find("V100 SXM 16GB").flops("bf16")


def test_bad_files_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.yaml cannot be read"):
        read_machine(tmp_path / "nowhere.yaml")
    with pytest.raises(InputError, match="mine must hold the fields"):
        machine_from_yaml("- 1", "mine")
    with pytest.raises(InputError, match="mine is not YAML"):
        machine_from_yaml("{", "mine")
    content = json.loads(find("T4").model_dump_json())
    with pytest.raises(InputError, match="memory_bytes"):
        machine_from_yaml(json.dumps({**content, "memory_bytes": -1}), "mine")
    with pytest.raises(InputError, match="memry"):
        machine_from_yaml(json.dumps({**content, "memry": 1}), "mine")
    with pytest.raises(InputError, match="whose name is not a text"):
        machine_from_yaml("{1: 2}", "mine")
