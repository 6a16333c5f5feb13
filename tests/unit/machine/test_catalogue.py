"""The catalogue: its size, its consistency, its names, and its peaks against published runs."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tunewise.errors import InputError
from tunewise.machine.catalogue import CATALOGUE, find
from tunewise.units import GIB

THROUGHPUT = Path(__file__).parents[4] / "shared/data/published/training_throughput.csv"
MEMORY = Path(__file__).parents[4] / "shared/data/published/finetune_memory.csv"


def test_there_are_enough_and_each_is_named_once() -> None:
    names = [machine.name for machine in CATALOGUE]
    assert len(names) >= 36
    assert len(set(names)) == len(names)
    assert all(machine.source for machine in CATALOGUE)


@pytest.mark.parametrize("machine", CATALOGUE, ids=lambda machine: machine.name)
def test_entry_is_consistent(machine: object) -> None:
    entry = next(each for each in CATALOGUE if each is machine)
    assert 0.7 * entry.memory_bytes < entry.usable_memory_bytes < entry.memory_bytes
    rates = entry.flops_per_second
    if "bf16" in rates:
        assert rates["bf16"] == rates["fp16"]
        assert rates["bf16"] >= rates["fp32"]
    if "fp8" in rates:
        # Dense fp8 is twice dense bf16 on every machine so far; four times would be a sparse rate.
        assert rates["fp8"] / rates["bf16"] == pytest.approx(2.0, rel=0.02)
    if "tf32" in rates and entry.name not in ("RTX 3060 12GB", "RTX 3080 10GB"):
        assert rates["bf16"] / rates["tf32"] == pytest.approx(2.0, rel=0.02)
    assert all(0.3 < fraction < 1.0 for fraction in entry.achievable.values())


@pytest.mark.parametrize(
    ("name", "num_multiprocessors", "fused_per_clock", "megahertz"),
    [
        ("V100 SXM 32GB", 80, 512, 1530),
        ("T4", 40, 512, 1590),
        ("RTX 2080 Ti", 68, 256, 1545),
        ("RTX 3060 12GB", 28, 256, 1777),
        ("RTX 3080 10GB", 68, 256, 1710),
        ("RTX 3090", 82, 256, 1695),
        ("A10G", 80, 256, 1710),
        ("A40", 84, 512, 1740),
        ("A100 SXM 80GB", 108, 1024, 1410),
        ("RTX 4060 Ti", 34, 256, 2535),
        ("RTX 4090", 128, 256, 2520),
        ("RTX 6000 Ada", 142, 512, 2505),
        ("L40S", 142, 512, 2490),
        ("H100 SXM", 132, 2048, 1830),
        ("RTX 5080", 84, 256, 2617),
        ("RTX 5090", 170, 256, 2407),
        ("MI300X", 304, 1024, 2100),
    ],
)
def test_half_precision_rate_is_units_times_clock(
    name: str, num_multiprocessors: int, fused_per_clock: int, megahertz: float
) -> None:
    """Dense fused multiply-adds with fp32 accumulation, per multiprocessor and clock, by the whitepapers."""
    machine = find(name)
    assert machine.num_multiprocessors == num_multiprocessors
    computed = 2 * num_multiprocessors * fused_per_clock * megahertz * 1e6
    assert machine.flops("fp16") == pytest.approx(computed, rel=0.01)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("rtx4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("4090 24 GB", "RTX 4090"),
        ("H100", "H100 SXM 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM 80GB"),
        ("NVIDIA H100 PCIe", "H100 PCIe 80GB"),
        ("h100_80gb", "H100 SXM 80GB"),
        ("H100SXM80GB", "H100 SXM 80GB"),
        ("h100 nvl", "H100 NVL 94GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 PCIe 40GB"),
        ("a100_40gb", "A100 SXM 40GB"),
        ("Tesla V100-SXM2-16GB", "V100 SXM 16GB"),
        ("Tesla T4", "T4"),
        ("A10G 24GB", "A10G"),
        ("NVIDIA A10", "A10"),
        ("RTX A6000 48GB", "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("4080 super", "RTX 4080 SUPER"),
        ("RTX 4070 Ti SUPER 16GB", "RTX 4070 Ti SUPER"),
        ("GB200", "GB200 186GB"),
        ("AMD Instinct MI300X", "MI300X"),
        ("Apple M3 Max", "M3 Max 128GB"),
    ],
)
def test_names_as_people_and_drivers_write_them(written: str, name: str) -> None:
    assert find(written).name == name


def test_every_name_finds_itself() -> None:
    names = [machine.name for machine in CATALOGUE]
    assert [find(name.upper()).name for name in names] == names


def test_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(InputError, match=r"no machine 'rtx 4091'. The nearest is 'RTX 4090'"):
        find("rtx 4091")


def test_two_memories_are_an_error_and_not_a_guess() -> None:
    with pytest.raises(InputError, match="'A100 SXM 40GB', 'A100 SXM 80GB'"):
        find("A100")
    with pytest.raises(InputError, match="Say which one you mean: 'RTX 4090'"):
        find("RTX 4090 48GB")


@pytest.mark.skipif(not THROUGHPUT.is_file(), reason=f"{THROUGHPUT} is not there")
def test_peaks_agree_with_published_utilization() -> None:
    """Published MFU x our peak is the FLOPs done: 6 a parameter and token, and attention's on top."""
    ratios = []
    with THROUGHPUT.open() as file:
        for row in csv.DictReader(file):
            if row["mfu_pct"] and row["throughput_tokens_s_gpu"] and "bf16" in row["precision"]:
                done = 6 * float(row["num_params"]) * float(row["throughput_tokens_s_gpu"])
                ratios.append(float(row["mfu_pct"]) / 100 * find(row["gpu"]).flops("bf16") / done)
    assert len(ratios) >= 100
    # Long sequences add attention's FLOPs to the 6 a parameter; nothing may be below them.
    assert min(ratios) > 0.98
    assert sorted(ratios)[len(ratios) // 2] < 1.25


@pytest.mark.skipif(not MEMORY.is_file(), reason=f"{MEMORY} is not there")
def test_nothing_published_used_more_than_there_is() -> None:
    """Peaks that torch reserved fit into the usable memory; drivers may leave up to 1 % more."""
    known = {"NVIDIA L40S", "A10G 24GB", "RTX 4090 24GB", "RTX 3090 24GB", "T4 16GB", "A100 80GB"}
    used = 0
    with MEMORY.open() as file:
        for row in csv.DictReader(file):
            if row["gpu"] in known and "reserved" in row["mem_metric"] and row["peak_mem_gb"]:
                used += 1
                usable_bytes = find(row["gpu"]).usable_memory_bytes
                assert float(row["peak_mem_gb"]) * 1e9 <= 1.01 * usable_bytes, row["id"]
    assert used >= 50


def test_usable_memory_follows_its_rule() -> None:
    assert find("H200").usable_memory_bytes == round(139.72 * GIB) - 132 * 5 * 2**20
    assert "139.72 GiB" in find("H200").usable_memory_rule
    assert find("A30").usable_memory_bytes == round(24 * 0.957 * GIB) - 56 * 5 * 2**20
