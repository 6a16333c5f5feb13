"""What people see: plain lines in a pipe, one line that is rewritten on a terminal, JSON for machines."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.unit.tiny_runs import recipe_over, save_model, write_records
from tunewise import api
from tunewise.report import terminal
from tunewise.report.terminal import JsonLines, Terminal, how_to_load


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("workload")
    model, records = save_model(folder / "model"), write_records(folder / "records.jsonl", num_records=40)
    return recipe_over(model, records, training={"steps": 4}, evaluation={"every": 2})


def shown(recipe: dict[str, Any], out: Path, *, is_terminal: bool) -> str:
    stream = io.StringIO()
    screen = Terminal(Console(file=stream, force_terminal=is_terminal, width=100, highlight=False, color_system=None))
    screen.finish(api.train(recipe, out=out, observe=screen.observe, announce=screen.announce))
    return stream.getvalue()


def test_a_pipe_gets_plain_lines(recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "PLAIN_SECONDS", 0.0)
    text = shown(recipe, tmp_path / "run", is_terminal=False)
    assert "\r" not in text
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[0] == f"tunewise trains {recipe['model']['name']} on {recipe['data']['source']}"
    steps = [line for line in lines if re.match(r"  step +\d+/4  loss \d+\.\d{4}", line)]
    assert len(steps) == 4
    assert all(re.search(r"\d+ tokens/s  \d+(\.\d+)? [KMG]iB  .+ left$", line) for line in steps)
    assert len([line for line in lines if "validation loss" in line and "->" not in line]) == 3
    assert any(line.startswith("  methods   packing, lora, precision, attention") for line in lines)
    assert any(line.startswith("  training  4 steps of 6 documents, learning rate 0.005") for line in lines)
    assert any(line.startswith("done: all steps done, 4 steps in ") for line in lines)
    assert any(line.startswith("  validation loss ") and line.endswith(", restored)") for line in lines)
    assert f"  saved and read again: {tmp_path}/run/adapter" in lines
    assert lines[-1].startswith("    model = PeftModel.from_pretrained("), "code is not wrapped"
    assert lines[-1].endswith("/run/adapter')")


def test_a_pipe_is_not_flooded(recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "PLAIN_SECONDS", 1e9)
    text = shown(recipe, tmp_path / "run", is_terminal=False)
    assert re.findall(r"  step +(\d+)/4  loss", text) == ["4"]


def test_a_terminal_rewrites_its_line(recipe: dict[str, Any], tmp_path: Path) -> None:
    text = shown(recipe, tmp_path / "run", is_terminal=True)
    assert len(re.findall(r"\r  step +\d+/4  loss", text)) == 4
    assert all(len(line) <= 100 for line in re.findall(r"\r([^\r\n]*)", text))
    for line in text.replace("\r", "\n").splitlines():
        assert line.count("  step ") <= 1, "an evaluation begins a line of its own"


@pytest.mark.parametrize("methods", [{"lora": {"rank": 4}}, {}])
def test_the_lines_that_it_prints_load_the_result(
    methods: dict[str, Any], recipe: dict[str, Any], tmp_path: Path
) -> None:
    result = api.train({**recipe, "methods": methods}, out=tmp_path / "run")
    names: dict[str, Any] = {}
    exec("\n".join(how_to_load(result)), names)
    assert type(names["model"]).__name__ == ("LlamaForCausalLM" if not methods else "PeftModelForCausalLM")


def test_json_lines(recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    screen = JsonLines()
    screen.finish(api.train(recipe, out=tmp_path / "run", observe=screen.observe, announce=screen.announce))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in lines[:2]] == ["start", "recipe"]
    assert lines[0]["num_steps"] == 4
    assert lines[1]["recipe"]["methods"]["lora"]["rank"] == 4
    assert lines[-1] == {
        "event": "result",
        "passed": None,
        "folder": str(tmp_path / "run" / "adapter"),
        "kind": "adapter",
        "best_loss": lines[-2]["best_loss"],
    }
    assert lines[-2]["event"] == "finished"


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (
            {"event": "out_of_memory", "moment": "training", "micro_batch_size": 2, "row_tokens": None},
            "out of memory in training: going on with 2 rows of one document at once",
        ),
        (
            {"event": "out_of_memory", "moment": "evaluation", "micro_batch_size": 1, "row_tokens": 512},
            "out of memory in evaluation: going on with 1 rows of at most 512 tokens at once",
        ),
        ({"event": "damaged_checkpoint", "message": "a[b] is damaged"}, "damaged checkpoint: a[b] is damaged"),
        ({"event": "resumed", "step": 12, "from": "step-00000012"}, "resumed after step 12 from step-00000012"),
        ({"event": "note", "message": "LoRA on [28] layers"}, "note      LoRA on [28] layers"),
    ],
)
def test_events_in_words(entry: dict[str, Any], words: str) -> None:
    stream = io.StringIO()
    Terminal(Console(file=stream, width=200)).observe(entry)
    assert words in stream.getvalue()


def test_a_training_that_made_it_worse_says_so(recipe: dict[str, Any], tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"prompt": str(i), "completion": "import os, sys"}) + "\n" for i in range(3)))
    data = {**recipe["data"], "validation": str(other)}
    training = {"steps": 6, "learning_rate": 1.0, "schedule": "constant", "spike": None, "warmup": 0}
    worse = {**recipe, "methods": {"precision": {"compute": "fp32"}}, "training": training, "data": data}
    text = shown(worse, tmp_path / "run", is_terminal=False)
    assert "never fell below what it was before training" in text
