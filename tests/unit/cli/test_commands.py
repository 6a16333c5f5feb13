"""The command line: what it prints, what it returns, and how little it imports to say what it can."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.tiny_runs import recipe_over, save_model, write_records
from tunewise.cli import main

Run = Callable[..., tuple[int, str, str]]

HELP_SECONDS = 0.6
HEAVY = ("torch", "transformers", "peft", "numpy", "datasets", "bitsandbytes")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("workload")
    return save_model(folder / "model"), write_records(folder / "records.jsonl", num_records=40)


@pytest.fixture
def recipe_file(files: tuple[Path, Path], tmp_path: Path) -> str:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe_over(*files, training={"steps": 3})))
    return str(file)


@pytest.fixture
def tunewise(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Return what runs `tunewise ...` in an empty folder: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tunewise", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        written = capsys.readouterr()
        assert "Traceback" not in written.err
        return int(left.value.code or 0), written.out, written.err

    return run


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["doctor", "--help"], ["export", "--help"]])
def test_help_is_quick_and_light(arguments: list[str]) -> None:
    """CPU time of the whole process, the best of six, since the machine may be busy."""
    code = (
        "import sys\nsys.argv[0] = 'tunewise'\nfrom tunewise.cli import main\n"
        f"try:\n    main()\nfinally:\n    print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    seconds = []
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, env=os.environ
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert "Usage: tunewise" in done.stdout
        assert done.stderr == "[]\n"
    assert min(seconds) < HELP_SECONDS


def test_the_commands_of_the_promise(tunewise: Run) -> None:
    code, out, _ = tunewise("--help")
    assert code == 0
    for command in ("train", "doctor", "export"):
        assert command in out
    _, out, _ = tunewise("train", "--help")
    for option in ("--model", "--data", "--out", "--set", "--resume", "--json"):
        assert option in out


def test_train_prints_where_the_adapter_is_and_how_to_load_it(tunewise: Run, recipe_file: str, tmp_path: Path) -> None:
    code, out, err = tunewise("train", recipe_file, "--out", "run", "--set", "methods.lora.rank=2")
    assert (code, err) == (0, "")
    assert "saved and read again: run/adapter" in out
    assert "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(" in out
    written = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert written["methods"]["lora"]["rank"] == 2
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["r"] == 2


def test_json_is_one_object_a_line(tunewise: Run, recipe_file: str) -> None:
    code, out, err = tunewise("train", recipe_file, "--out", "run", "--json")
    assert (code, err) == (0, "")
    lines: list[dict[str, Any]] = [json.loads(line) for line in out.splitlines()]
    assert lines[0]["event"] == "start"
    assert lines[-1]["event"] == "result"
    assert sum(line["event"] == "step" for line in lines) == 3


def test_model_and_data_are_enough(tunewise: Run, files: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = files
    few = [
        "--set",
        "quality=off",
        "--set",
        "model.tokenizer=embedded",
        "--set",
        "training.steps=1",
        "--set",
        "batch.documents=2",
    ]
    code, out, _ = tunewise("train", "--model", model, "--data", data, *few)
    assert code == 0, out
    assert (tmp_path / "runs" / "records" / "adapter").is_dir()


def test_a_finished_run_can_be_resumed_and_exported(tunewise: Run, recipe_file: str, tmp_path: Path) -> None:
    tunewise("train", recipe_file, "--out", "run")
    code, out, _ = tunewise("train", "--resume", "run")
    assert code == 0
    assert "resumed after step 3" in out
    code, out, _ = tunewise("export", "run", "--merged", "merged")
    assert code == 0
    assert "Merged model: merged (read again" in out
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_doctor_shows_what_would_be_learnt(tunewise: Run, files: tuple[Path, Path], tmp_path: Path) -> None:
    code, out, _ = tunewise("doctor", files[1], "--model", files[0], "--set", "model.tokenizer=embedded")
    assert code == 0
    assert "records.jsonl" in out
    assert "supervised" in out
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": ""}\n' * 3)
    code, out, err = tunewise("doctor", bad, "--model", files[0], "--set", "model.tokenizer=embedded")
    assert code == 2
    assert "bad.jsonl" in out + err


def test_a_diverged_training_returns_3(tunewise: Run, recipe_file: str) -> None:
    settings = ["--set", "training.spike=0.000001", "--set", "training.learning_rate=30", "--set", "training.warmup=0"]
    code, _, err = tunewise("train", recipe_file, "--out", "run", "--set", "training.steps=30", *settings)
    assert code == 3
    assert err.startswith("error: Stopped at step ")
    assert "run/diverged-step-" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "Name a recipe file, or at least --model and --data"),
        (["train", "none.yaml"], "There is no recipe file 'none.yaml'"),
        (["train", "--model", "m"], "Name a recipe file, or at least --model and --data"),
        (["train", "--resume", "run", "--set", "seed=1"], "it takes no recipe and no other settings"),
        (["train", "--resume", "nowhere"], "There is no run to resume in 'nowhere'"),
        (["export", "nowhere", "--merged", "m"], "There is no run in 'nowhere'"),
        (["train", "--model", "./nowhere", "--data", "d.jsonl"], "there is no folder './nowhere'"),
    ],
)
def test_mistakes_return_2(arguments: list[str], message: str, tunewise: Run) -> None:
    code, out, err = tunewise(*arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert out == ""


def test_machines_can_be_listed(tunewise: Run) -> None:
    code, out, _ = tunewise("machine", "--list", "--json")
    assert code == 0
    assert len(json.loads(out)) >= 10
    code, out, _ = tunewise("machine", "--list")
    assert code == 0
    row = next(line.split() for line in out.splitlines() if "A100 SXM 80GB" in line)
    assert row[3:9] == ["80", "78.6", "2039", "312", "19.5", "600"]  # whole words: nothing is cut off
