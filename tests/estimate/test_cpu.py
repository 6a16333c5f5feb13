"""Predicted against recorded: a few rows of benchmarks/estimate/cpu.py."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from tests.loading import load_benchmark

benchmark = load_benchmark("estimate/cpu.py", "estimate_cpu")
COMBINATIONS = sys.modules["cpu_cases"].COMBINATIONS

ROWS = [
    ("llama", "full fp32"),
    ("llama", "full fp32 sdpa"),
    ("qwen3", "full mixed"),
    ("mistral", "full fp32 packed"),
    ("mixtral", "lora fp32"),
    ("gemma2", "full fp32 checkpointing"),
    ("phi3", "full fp32 adamw in backward"),
    ("gpt2", "nf4 lora fp32"),
    ("gpt2", "full fp32 whole"),
    ("gpt_neox", "full fp32 selective"),
    ("opt", "full fp32 adamw 8-bit"),
    ("falcon", "lora fp32 checkpointing"),
    ("olmo2", "full pure adafactor in backward"),
    ("llama", "full fp32 adamw 4-bit"),
    ("gpt2", "full fp32 adam-mini"),
    ("qwen3", "full fp32 apollo"),
    ("llama", "full pure fp8_lm"),
    ("llama", "full fp32 fp8_lm"),
]


@pytest.mark.parametrize(("architecture", "combination"), ROWS)
def test_the_real_step_allocates_what_the_dry_one_says(architecture: str, combination: str) -> None:
    case = next(case for case in benchmark.cases(0, [architecture]) if case.combination == combination)
    row = benchmark.run_case(case)
    assert row.left_out is None
    assert row.predicted["step"] == pytest.approx(row.measured["step"], rel=0.01)
    assert row.predicted["evaluation"] == pytest.approx(row.measured["evaluation"], rel=0.02)
    assert row.predicted["save"] == pytest.approx(row.measured["save"], rel=0.01)


PEFT: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "BOFT", {"boft_block_size": 4}),
    ("mistral", "PREFIX_TUNING", {"num_virtual_tokens": 8}),
    ("qwen3", "TRAINABLE_TOKENS", {"token_indices": list(range(40))}),
    ("llama", "VERA", {"r": 16}),
    ("phi3", "WAVEFT", {"target_modules": ["qkv_proj"], "n_frequency": 500}),
]


@pytest.mark.parametrize(("architecture", "kind", "options"), PEFT)
def test_a_step_with_an_adapter_of_peft(
    architecture: str, kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = {"peft": {"kind": kind, "options": options}, "precision": {"compute": "fp32"}, "whole_loss": {}}
    monkeypatch.setitem(COMBINATIONS, kind, (methods, {}))
    case = benchmark.Case(architecture, kind, depth=4, rows=2, length=64, supervised=0.6, micro_batches=1)
    row = benchmark.run_case(case)
    assert row.left_out is None
    assert row.predicted["step"] == pytest.approx(row.measured["step"], rel=0.001)
    assert row.predicted["evaluation"] == pytest.approx(row.measured["evaluation"], rel=0.001)
    assert row.predicted["save"] == pytest.approx(row.measured["save"], rel=0.01)
