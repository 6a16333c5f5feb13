"""benchmarks/estimate/throughput.py: rows that can be reproduced, rows that cannot, rows that make no sense."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.loading import load_benchmark

KEYS = {"rows_used", "rows_left_out", "median_error", "p90_error", "worst_error", "bias", "under_predictions"}


benchmark = load_benchmark("estimate/throughput.py", "estimate_throughput")

SOUND = {
    "id": "1", "source": "here", "model": "owner/our-llama-chat", "kind": "LoRA fine-tuning (r=8)", "seq_len": "2048",
    "micro_batch": "4", "grad_accum": "2", "global_batch": "64", "gpu": "a100_80gb", "n_gpus": "8",
    "precision": "amp_bf16", "sharding": "FULL_SHARD", "activation_ckpt": "False", "activation_cpu_offload": "False",
    "throughput_tokens_s": "160000", "throughput_tokens_s_gpu": "20000", "throughput_samples_s": "0",
    "status": "measured",
}  # fmt: skip

SHAPE = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
}  # fmt: skip
"""Wide enough that a GPU is kept busy."""


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: list[dict[str, str | None]]) -> dict[str, Any]:
    """Predict the sound row with each of the changes; None takes the cell's column out."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "Our-Llama.json").write_text(json.dumps(SHAPE))
    table, out = tmp_path / "table.csv", tmp_path / "out.json"
    with table.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(SOUND))
        writer.writeheader()
        writer.writerows({**SOUND, **change} for change in changes)
    arguments = ["throughput.py", "--csv", str(table), "--json", str(out), "--configs", str(tmp_path / "configs")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert benchmark.main() == 0
    result: dict[str, Any] = json.loads(out.read_text())
    assert set(result["summary"]) == KEYS
    assert len(result["rows"]) == len(changes)
    return result


def test_what_is_stated_decides_the_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: list[dict[str, str | None]] = [
        {}, {"gpu": "h100_80gb"}, {"activation_ckpt": "True"}, {"kind": "full fine-tuning"},
        {"kind": "full fine-tuning", "sharding": "DDP"}, {"kind": "QLoRA (r=8)"}, {"precision": "fp32"},
        {"gpu": "NVIDIA H100 80GB HBM3"},
    ]  # fmt: skip
    result = run(tmp_path, monkeypatch, changes)
    plain, faster, checkpointed, full, replicated, packed, fp32, written_out = (
        row["predicted"] for row in result["rows"]
    )
    assert faster > plain
    assert written_out == faster
    assert checkpointed < plain
    assert replicated < full < plain  # every GPU updates all, not its eighth
    assert packed < plain
    assert fp32 < plain
    assert result["rows"][0]["error"] == pytest.approx((plain - 20000) / 20000)
    assert result["rows"][0]["methods"]["lora"] == {"rank": 8}
    assert result["summary"]["rows_used"] == len(changes)


def test_cells_that_follow_from_others_may_be_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: list[dict[str, str | None]] = [
        {}, {"throughput_tokens_s_gpu": ""}, {"grad_accum": ""}, {"micro_batch": ""}, {"sharding": "", "n_gpus": "1"},
        {"activation_cpu_offload": ""}, {"kind": "lora"}, {"grad_accum": "", "global_batch": ""},
        {"precision": "NF4"}, {"precision": "bf16-mixed", "n_gpus": "8.0"},
        {"throughput_tokens_s_gpu": "", "throughput_tokens_s": "", "throughput_samples_s": "78.125"},
    ]  # fmt: skip
    rows = run(tmp_path, monkeypatch, changes)["rows"]
    plain = rows[0]
    for place in (1, 2, 3, 5, 9, 10):
        assert rows[place]["predicted"] == plain["predicted"], changes[place]
        assert rows[place]["measured"] == plain["measured"], changes[place]
        assert rows[place]["assumed"] == []
    assert rows[6]["assumed"] == ["LoRA's rank"]
    assert rows[7]["assumed"] == ["one micro-batch a step"]
    assert rows[8]["assumed"] == ["products in bf16 over 4-bit weights"]
    assert rows[8]["methods"]["quantize"] == {"kind": "nf4"}


def test_a_row_that_cannot_be_reproduced_is_left_out_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected: list[tuple[dict[str, str | None], str]] = [
        ({"status": "oom"}, "'oom', not measured"), ({"status": ""}, "not measured"), ({"n_gpus": "16"}, "one node"),
        ({"n_gpus": ""}, "n_gpus is not stated"), ({"n_gpus": "½"}, "'½'"), ({"seq_len": "2k"}, "'2k'"),
        ({"seq_len": "0"}, "whole number"), ({"seq_len": "8192"}, "beyond the model's 4096"),
        ({"micro_batch": "", "global_batch": ""}, "micro_batch is not stated"),
        ({"micro_batch": "", "global_batch": "7"}, "no multiple"),
        ({"throughput_tokens_s_gpu": "", "throughput_tokens_s": "", "throughput_samples_s": ""}, "no tokens a second"),
        ({"throughput_tokens_s_gpu": "", "throughput_tokens_s": ""}, "throughput_samples_s '0'"),
        ({"throughput_tokens_s_gpu": "fast"}, "'fast'"), ({"throughput_tokens_s_gpu": "-3"}, "'-3'"),
        ({"throughput_tokens_s_gpu": "nan"}, "'nan'"), ({"model": ""}, "no configuration"),
        ({"model": "../../etc/passwd"}, "passwd"), ({"model": "no-such-7b"}, "no-such-7b"),
        ({"kind": "DPO"}, "'DPO'"), ({"kind": ""}, "kind is not stated"), ({"kind": "DoRA + LoRA"}, "'DoRA + LoRA'"),
        ({"kind": "inference"}, "'inference'"), ({"precision": "amp_fp8"}, "amp_fp8"),
        ({"precision": ""}, "precision is not stated"), ({"precision": "nf4", "kind": "full"}, "nf4"),
        ({"activation_ckpt": ""}, "not stated"), ({"activation_ckpt": "sometimes"}, "'sometimes'"),
        ({"activation_cpu_offload": "True"}, "offloaded"), ({"sharding": "TP=8"}, "'TP=8'"),
        ({"gpu": ""}, "gpu is not stated"), ({"gpu": "TPU v4"}, "no machine 'TPU v4'"), ({"gpu": "A100"}, "80GB"),
        ({"gpu": "Äther\x00"}, "no machine"),
    ]  # fmt: skip
    result = run(tmp_path, monkeypatch, [change for change, _ in expected])
    for found, (change, words) in zip(result["rows"], expected, strict=True):
        assert words in found.get("reason", "used"), (change, found)
        assert "broken" not in found["reason"], change
    assert result["summary"]["rows_used"] == 0
    assert result["summary"]["median_error"] is None
    assert sum(result["left_out_because"].values()) == len(expected)


def test_a_table_of_other_columns_and_ragged_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    table, out = tmp_path / "table.csv", tmp_path / "out.json"
    table.write_bytes(b"\xef\xbb\xbfname,throughput_tokens_s\nx\n\ny,1,2,3\n\xff\xfe,2\n")
    arguments = ["throughput.py", "--csv", str(table), "--json", str(out), "--configs", str(tmp_path / "configs")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert benchmark.main() == 0
    assert json.loads(out.read_text())["summary"]["rows_left_out"] == 3
