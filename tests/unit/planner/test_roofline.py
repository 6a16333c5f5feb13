"""Seconds of operators, by hand."""

from __future__ import annotations

import pytest
import torch

from tunewise.engine.tracking import Moment
from tunewise.engine.work import Work, WorkKey
from tunewise.machine.catalogue import find
from tunewise.planner.roofline import (
    ATTENTION_FRACTION,
    BANDWIDTH_FRACTION,
    CAUSAL_SHARE,
    CUDA_KERNEL_SECONDS,
    bandwidth,
    launch_seconds,
    limits_of,
    seconds_of,
)

A100 = find("A100 SXM 80GB")
MATMUL = WorkKey(Moment.FORWARD, "aten.mm", torch.bfloat16, (4096, 4096, 4096))


def test_a_large_product_takes_its_arithmetic() -> None:
    found = seconds_of({MATMUL: Work(1, 2 * 4096**3, 3 * 2 * 4096**2)}, A100)
    assert found.linear == pytest.approx(2 * 4096**3 / 271.2e12, rel=1e-6)
    assert found.attention == found.update == 0
    assert found.calls == 1


def test_an_elementwise_operator_takes_its_traffic() -> None:
    key = WorkKey(Moment.BACKWARD, "aten.mul", torch.bfloat16)
    found = seconds_of({key: Work(2, 0, 4e9)}, A100)
    assert found.linear == pytest.approx(4e9 / (2039e9 * BANDWIDTH_FRACTION))


def test_a_tiny_operator_takes_a_kernels_time() -> None:
    found = seconds_of({WorkKey(Moment.UPDATE, "aten.add", torch.float32): Work(100, 0, 1e3)}, A100)
    assert found.update == pytest.approx(100 * CUDA_KERNEL_SECONDS)
    assert found.update_calls == 100


def test_flash_attention_skips_what_is_masked() -> None:
    key = WorkKey(Moment.FORWARD, "aten._scaled_dot_product_flash_attention_for_cpu", torch.bfloat16)
    found = seconds_of({key: Work(1, 1e13, 1e6)}, A100)
    assert found.attention == pytest.approx(1e13 * CAUSAL_SHARE / (271.2e12 * ATTENTION_FRACTION))


def test_fp32_runs_at_its_own_rate_unless_tf32_is_asked_for() -> None:
    work = {WorkKey(Moment.FORWARD, "aten.mm", torch.float32): Work(1, 1e12, 1e6)}
    assert seconds_of(work, A100).linear == pytest.approx(1e12 / (19.5e12 * 0.8))
    assert seconds_of(work, A100, tf32=True).linear == pytest.approx(1e12 / (156e12 * 0.8))


def test_products_in_int8_run_at_the_rate_that_was_measured_or_else_at_bf16s() -> None:
    work = {WorkKey(Moment.FORWARD, "tunewise.int8_matmul", torch.int8): Work(1, 1e12, 1e6)}
    rates = {"fp32": 1e11, "bf16": 4e11}
    cpu = A100.replace(kind="cpu", name="a CPU", flops_per_second=rates, achievable=dict.fromkeys(rates, 1.0))
    assert seconds_of(work, cpu).linear == pytest.approx(1e12 / 4e11)
    faster = cpu.replace(flops_per_second={**rates, "int8": 8e11}, achievable={"int8": 1.0})
    assert seconds_of(work, faster).linear == pytest.approx(1e12 / 8e11)


def test_evaluation_and_saving_are_not_the_step() -> None:
    found = seconds_of({MATMUL._replace(moment=Moment.EVALUATION): Work(1, 1e12, 1e6)}, A100)
    assert found.linear == found.calls == 0


def test_what_a_step_waits_for() -> None:
    copied = 4e9
    work = {
        MATMUL: Work(1, 2 * 4096**3, 3 * 2 * 4096**2),
        WorkKey(Moment.BACKWARD, "aten.mul", torch.bfloat16): Work(2, 0, copied),
    }
    shares = limits_of(work, A100)
    arithmetic, traffic = 2 * 4096**3 / 271.2e12, copied / bandwidth(A100)
    assert shares["matrix products"] == pytest.approx(arithmetic / (arithmetic + traffic))
    assert shares["memory traffic"] == pytest.approx(traffic / (arithmetic + traffic))
    assert shares["launching"] == shares["attention"] == 0


def test_many_tiny_operators_wait_for_the_host() -> None:
    shares = limits_of({WorkKey(Moment.FORWARD, "aten.add", torch.float32): Work(1000, 0, 1e3)}, A100)
    assert shares["launching"] == pytest.approx(1 - CUDA_KERNEL_SECONDS / launch_seconds(A100))
