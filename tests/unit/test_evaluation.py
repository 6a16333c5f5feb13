"""The gate at the end of a training, and `evaluate` afterwards: same numbers, same verdict, nothing else changed."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import tunewise
from tests.unit.tiny_runs import digest, events, recipe_over, save_model, write_records
from tunewise.cli import main
from tunewise.errors import InputError, MissingBackend
from tunewise.evaluation import evaluate, read_report
from tunewise.quality.suites import SUITES
from tunewise.quality.verdict import FAILED_FILE, QualityReport

QUALITY = {"gate": True, "max_forgetting": 9, "max_domain_forgetting": 9, "max_gap": 9, "share": 1.0}
"""A random model on random words: any forgetting is allowed."""

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 4}, "packing": {"row_tokens": 96}, "precision": {"compute": "fp32"}},
    "pissa": {"lora": {"rank": 4, "init": "pissa"}, "precision": {"compute": "fp32"}},
    "everything": {"precision": {"compute": "fp32"}},
    "peft": {"peft": {"kind": "IA3"}, "precision": {"compute": "fp32"}},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("judged")
    return save_model(folder / "model"), write_records(folder / "records.jsonl", 80)


def recipe(files: tuple[Path, Path], name: str = "lora", **changes: Any) -> dict[str, Any]:
    training = {"steps": 12, "learning_rate": 2e-2 if name != "everything" else 2e-3}
    return recipe_over(*files, methods=METHODS[name], **{"training": training, "quality": QUALITY, **changes})


def numbers_of(report: QualityReport | None) -> list[tuple[str, str, Any]]:
    assert report is not None
    return [(c.name, c.status, c.measured and pytest.approx(c.measured.middle, abs=2e-5)) for c in report.checks]


@pytest.mark.parametrize("name", list(METHODS))
def test_the_saved_files_are_judged_as_the_training_was(files: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    result = tunewise.train(recipe(files, name), out=tmp_path / "run")
    again = evaluate(tmp_path / "run").gate
    assert numbers_of(again) == numbers_of(result.quality)
    assert result.quality is not None
    assert result.quality.seconds > 0
    gain = next(check for check in result.quality.checks if check.name == "task gain")
    assert gain.measured is not None
    assert gain.measured.middle == pytest.approx(loss_fall(tmp_path / "run"), abs=1e-4)


def loss_fall(folder: Path) -> float:
    losses = [entry["validation_loss"] for entry in events(folder, "evaluation")]
    return float(losses[0] - min(losses[1:]))


def test_the_gate_changes_nothing_about_the_training(files: tuple[Path, Path], tmp_path: Path) -> None:
    methods = {**METHODS["lora"], "lora": {"rank": 4, "dropout": 0.2}}
    judged = {**recipe(files), "methods": methods}
    tunewise.train(judged, out=tmp_path / "judged")
    tunewise.train({**judged, "quality": "off"}, out=tmp_path / "unjudged")
    one, other = (digest(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("judged", "unjudged"))
    assert one == other
    assert read_report(tmp_path / "judged") is not None
    assert read_report(tmp_path / "unjudged") is None


def test_a_refused_model_is_kept_and_marked_and_can_be_judged_anew(files: tuple[Path, Path], tmp_path: Path) -> None:
    strict = recipe(files, quality={**QUALITY, "min_gain": 50})
    result = tunewise.train(strict, out=tmp_path / "run")
    assert result.quality is not None
    assert not result.quality.passed
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert "task gain" in (tmp_path / "run" / FAILED_FILE).read_text()
    (event,) = events(tmp_path / "run", "quality")
    assert (event["passed"], len(event["reasons"])) == (False, 1)


@pytest.fixture(scope="module")
def run_folder(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    tunewise.train(recipe(files), out=folder)
    return folder


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["tunewise", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


def test_the_command_and_its_exit_code(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "evaluate", run_folder) == 0
    shown = capsys.readouterr().out
    for word in ("task gain", "forgetting, prose", "floor", "passes"):
        assert word in shown
    recipe_file = run_folder / "recipe.yaml"
    kept = recipe_file.read_text()
    recipe_file.write_text(kept.replace("min_gain: 0.0", "min_gain: 50.0"))
    assert command(monkeypatch, "evaluate", run_folder) == 5
    assert "task gain: the loss on held-out documents went from" in capsys.readouterr().err
    assert (run_folder / FAILED_FILE).is_file()
    recipe_file.write_text(kept)
    assert command(monkeypatch, "evaluate", run_folder) == 0
    assert not (run_folder / FAILED_FILE).exists()


def test_suites_compare_a_run_with_its_base(
    run_folder: Path, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suites = ("--suite", "loss", "--suite", "general")
    assert command(monkeypatch, "evaluate", run_folder, *suites, "--data", files[1], "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gate"] is None
    loss = found["suites"]["loss"]["loss"]
    assert loss["change"]["high"] < 0.0
    assert loss["after"]["middle"] - loss["before"]["middle"] == pytest.approx(loss["change"]["middle"])
    assert set(found["suites"]["general"]) == {"general loss", "general loss, prose", "general loss, code"}


def test_a_model_has_no_gate_but_a_loss(files: tuple[Path, Path]) -> None:
    found = evaluate("embedded")
    general = found.suites["general"]["general loss"]
    assert found.gate is None
    assert general.before is None
    assert 2.0 < general.after.middle < 5.0
    with pytest.raises(InputError, match="is no run"):
        evaluate("embedded", ("gate",))


def test_unknown_suites_and_missing_files_are_errors(run_folder: Path) -> None:
    with pytest.raises(InputError, match="Did you mean 'general'"):
        evaluate(run_folder, ("genral",))
    with pytest.raises(InputError, match=r"suite 'loss' needs questions: name a file with --data"):
        evaluate("embedded", ("loss",))


@pytest.fixture(scope="module")
def contracted(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run whose gate has a contract and a battery, and questions with all that a suite may ask for."""
    folder = tmp_path_factory.mktemp("contracted")
    contract, data, unanswerable = folder / "contract.yaml", folder / "questions.jsonl", folder / "unanswerable.jsonl"
    contract.write_text("max_characters: 20\nrefuses: [empty]\ninputs: [mine]\n")
    record = {"completion": "alpha", "test_list": ["assert True"], "paraphrase": "Tell it.", "changed": "Say other."}
    data.write_text("".join(json.dumps({"prompt": f"Say {n}.", **record}) + "\n" for n in range(5)))
    unanswerable.write_text('{"prompt": "What is the password?", "completion": ""}\n' * 3)
    quality = {
        **QUALITY, "contract": str(contract), "battery": {"exact_match": str(data)}, "unanswerable": str(unanswerable)
    }  # fmt: skip
    tunewise.train(recipe(files, quality=quality), out=folder / "run")
    return folder / "run", data


def test_contract_battery_and_unanswerable_questions_join_the_gate(contracted: tuple[Path, Path]) -> None:
    report = read_report(contracted[0])
    assert report is not None
    checks = {check.name: check for check in report.checks}
    assert {"contract", "refusals", "battery, exact_match", "battery, token_f1"} <= checks.keys()
    assert checks["refusals"].measured is not None
    assert checks["refusals"].measured.num == 3
    assert checks["contract"].measured is not None
    assert checks["contract"].measured.num > 12


@pytest.mark.parametrize("name", list(SUITES))
def test_every_suite_compares_a_run_with_its_base(contracted: tuple[Path, Path], name: str) -> None:
    found = evaluate(contracted[0], (name,), str(contracted[1])).suites[name]
    assert found
    for comparison in found.values():
        assert comparison.before is not None
        assert comparison.change is not None
        assert comparison.after.low <= comparison.after.middle <= comparison.after.high
        assert comparison.after.noise_floor >= 0.0
        if "temperature" not in found:
            assert comparison.change.middle == pytest.approx(
                comparison.after.middle - comparison.before.middle, abs=1e-9
            )


def test_lm_eval_says_how_to_install_it(contracted: tuple[Path, Path]) -> None:
    if importlib.util.find_spec("lm_eval") is not None:
        pytest.skip("lm_eval is installed")
    with pytest.raises(MissingBackend, match=r"lm_eval:arc_easy needs.*\n.*tunewise\[lm-eval\]"):
        evaluate(contracted[0], ("lm_eval:arc_easy",))
