"""benchmarks/estimate/published.py: rows that can be reproduced, rows that cannot, rows that make no sense."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.loading import load_benchmark

ROOT = Path(__file__).parents[2]
TABLE = ROOT.parent / "shared" / "data" / "published" / "finetune_memory.csv"


benchmark = load_benchmark("estimate/published.py", "estimate_published")

KEYS = {"rows_used", "rows_left_out", "median_error", "p90_error", "worst_error", "bias", "under_predictions"}

SOUND = {
    "id": "1", "source": "here", "model": "owner/Tiny-Llama-Instruct", "method": "lora", "adapter_rank": "8",
    "adapter_targets": "q_proj+v_proj", "base_precision": "bf16", "optimizer": "AdamW", "micro_batch": "2",
    "seq_len": "256", "attention": "sdpa", "grad_ckpt": "no", "n_gpus": "1", "peak_mem_gb": "0.5",
    "mem_metric": "torch max_memory_allocated", "status": "measured",
}  # fmt: skip

SHAPE = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, str]]) -> dict[str, Any]:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "Our-Llama.json").write_text(json.dumps(SHAPE))
    table, out = tmp_path / "table.csv", tmp_path / "out.json"
    with table.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, sorted({name for row in rows for name in row}))
        writer.writeheader()
        writer.writerows(rows)
    arguments = ["published.py", "--csv", str(table), "--json", str(out), "--configs", str(tmp_path / "configs")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert benchmark.main() == 0
    result: dict[str, Any] = json.loads(out.read_text())
    assert set(result["summary"]) == KEYS
    return result


def test_what_is_stated_decides_the_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {**SOUND, "model": "owner/our llama-Instruct"}
    changes: list[dict[str, str]] = [
        {}, {"micro_batch": "4"}, {"grad_ckpt": "yes"}, {"method": "qlora"}, {"mem_metric": "max_memory_reserved"},
        {"method": "full"},
    ]  # fmt: skip
    result = run(tmp_path, monkeypatch, [{**row, **change} for change in changes])
    plain, larger, checkpointed, quantized, reserved, full = (each["predicted_gb"] for each in result["rows"])
    parameters = 2 * 32000 * 512 + 8 * (4 * 512 * 512 + 3 * 512 * 1376)
    assert plain > 2 * parameters / 1e9
    assert checkpointed < plain < larger < 2 * plain
    assert plain - quantized > 0.2 * 2 * 8 * (4 * 512 * 512 + 3 * 512 * 1376) / 1e9
    assert reserved == pytest.approx(plain * benchmark.FRAGMENTATION)
    assert full > 8 * parameters / 1e9
    assert result["summary"]["rows_used"] == len(changes)
    assert result["rows"][0]["error"] == pytest.approx((plain - 0.5) / 0.5)


def test_a_row_that_cannot_be_reproduced_is_left_out_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {**SOUND, "model": "our-llama"}
    expected = {
        "status": ("estimate", "not measured"), "n_gpus": ("2", "not one GPU"), "model": ("no-such-7b", "no-such-7b"),
        "method": ("galore", "galore"), "optimizer": ("", "optimizer is not stated"), "micro_batch": ("?", "'?'"),
        "seq_len": ("-5", "seq_len"), "attention": ("ring", "ring"), "grad_ckpt": ("", "not stated"),
        "peak_mem_gb": ("nan", "nan"), "mem_metric": ("vendor's claim", "vendor's claim"), "adapter_rank": ("x", "'x'"),
        "adapter_targets": ("W_pack", "w_pack"), "base_precision": ("16 bits", "16 bits"),
        "quantization": ("int4 (gptq)", "gptq"), "conditions": ("torch.compile on", "compile"),
    }  # fmt: skip
    result = run(tmp_path, monkeypatch, [{**row, column: value} for column, (value, _) in expected.items()])
    for found, (column, (_, words)) in zip(result["rows"], expected.items(), strict=True):
        assert words in found["reason"], column
        assert "broken" not in found["reason"], column
    assert result["summary"]["rows_used"] == 0
    assert result["summary"]["median_error"] is None


def test_odd_rows_get_a_reason_and_never_an_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {**SOUND, "model": "our-llama"}
    changes: list[tuple[dict[str, str], str | None]] = [
        (dict.fromkeys(row, ""), "no peak"),
        ({"peak_mem_gb": "", "peak_mem_value": "0.5", "peak_mem_unit": "furlongs"}, "furlongs"),
        ({"peak_mem_gb": "12,5"}, "'12,5'"), ({"peak_mem_gb": "1e400"}, "inf"), ({"peak_mem_gb": "-3"}, "-3"),
        ({"micro_batch": "4-8"}, "'4-8'"), ({"seq_len": "2k"}, "'2k'"), ({"seq_len": "999999999999"}, "whole number"),
        ({"n_gpus": "½"}, "'½'"), ({"gpu": "Äther\x00"}, None), ({"model": "../../etc/passwd"}, "passwd"),
        ({"method": "IA3", "adapter_targets": "q_proj+nowhere"}, None),
        ({"method": "IA3", "adapter_targets": "nowhere"}, "does not fit"),
        ({"method": "FROD", "adapter_rank": ""}, "no dry run"),
        ({"method": "adalora"}, None),
        ({"method": "vera", "trainable_params_m": "123.4"}, "an unstated option"),
        ({"method": "vera", "trainable_params_m": "some"}, None),
        ({"method": "prompt-tuning", "adapter_rank": "20", "adapter_targets": ""}, None),
        ({"method": "full", "quantization": "nf4"}, "nf4"), ({"adapter_rank": "100000"}, None),
        ({"mem_metric": "max_memory_reserved", "seq_note": "padded to the longest of the batch"}, "varying lengths"),
        ({"repo": "pytorch/torchtune", "mem_metric": "peak per GPU"}, None), ({"mem_metric": "peak per GPU"}, "metric"),
        ({"gpu": "TPU v3-8"}, "no GPU"), ({"gpu": "Apple M2 Max"}, "no GPU"), ({"gpu": "AMD Instinct MI300X"}, None),
        ({"model": ""}, "the model is not stated"), ({"method": "dora"}, None), ({"method": "LoRA +DoRA"}, None),
        ({"method": "dora", "quantization": "nf4"}, "nf4"), ({"optimizer": "lora-fa"}, None),
        ({"method": "dora", "adapter_targets": "all-linear"}, None), ({"grad_accum": "x"}, "'x'"),
        ({"model": "stabilityai/stablelm-base-alpha-3b", "adapter_targets": "q+v", "repo": "x/litgpt"}, None),
        ({"peak_mem_gb": "", "peak_mem_value": "512", "peak_mem_unit": "MiB"}, None), ({"n_gpus": "1.0"}, None),
    ]  # fmt: skip
    result = run(tmp_path, monkeypatch, [{**row, **change} for change, _ in changes])
    for found, (change, words) in zip(result["rows"], changes, strict=True):
        if words is None:
            assert found.get("predicted_gb", 0) > 0, (change, found)
        else:
            assert words in found["reason"], change
            assert "broken" not in found["reason"], change
    assert result["summary"]["rows_used"] == sum(words is None for _, words in changes)
    assert result["rows"][-2]["published_gb"] == pytest.approx(512 * 2**20 / 1e9)


def test_a_table_of_other_columns_and_ragged_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "Our-Llama.json").write_text(json.dumps(SHAPE))
    table, out = tmp_path / "table.csv", tmp_path / "out.json"
    table.write_bytes(b"\xef\xbb\xbfname,peak_mem_gb\nx\n\ny,1,2,3\n\xff\xfe,2\n")
    arguments = ["published.py", "--csv", str(table), "--json", str(out), "--configs", str(tmp_path / "configs")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert benchmark.main() == 0
    result = json.loads(out.read_text())
    assert result["summary"]["rows_left_out"] == 3
    assert [row["reason"].split()[0] for row in result["rows"]] == ["no", "metric", "metric"]


@pytest.mark.skipif(not TABLE.is_file(), reason="the published table ../shared/data is not here")
def test_a_published_lora_row_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {cells["id"]: benchmark.Row(cells) for cells in csv.DictReader(TABLE.open(encoding="utf-8"))}
    configs = benchmark.load_configs(benchmark.CONFIGS)
    for number in ("28", "265", "294"):  # litgpt's Llama-3.2-1B with LoRA, PEFT's Llama-3.2-3B with LoRA and with VeRA
        benchmark.predict(rows[number], configs, {})
        assert abs(rows[number].error) < 0.05
