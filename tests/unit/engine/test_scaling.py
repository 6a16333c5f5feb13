"""After training: the line from the base through the trained weights, and averages of states."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from tests.unit.tiny_runs import logits, recipe_over, save_model, write_records
from tunewise import api
from tunewise.cli import app
from tunewise.engine.averaging import average, mean_product
from tunewise.engine.checkpoint import list_checkpoints, load_checkpoint
from tunewise.engine.finished import open_finished
from tunewise.engine.scaling import ScalePoint, best_within
from tunewise.errors import CheckpointError, Conflict, InputError
from tunewise.layers.lora import lora_layers
from tunewise.recipe import ModelSpec
from tunewise.workload.model import load_config, load_model

KINDS = {
    "lora": {"lora": {"rank": 4}, "precision": {"compute": "fp32"}},
    "lora and norms": {"lora": {"rank": 4}, "freeze": {"train": ["*norm*"]}, "precision": {"compute": "fp32"}},
    "full": {"precision": {"compute": "fp32"}},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each kind, and a second one of LoRA with another seed."""
    folder = tmp_path_factory.mktemp("runs")
    files = save_model(folder / "model"), write_records(folder / "records.jsonl", num_records=44)
    keep = {"checkpoints": {"every": 2, "keep": 3}, "evaluation": {"every": 6, "general_text": "default"}}
    for kind, methods in KINDS.items():
        api.train(recipe_over(*files, methods=methods, **keep), out=folder / kind)
    api.train(recipe_over(*files, methods=KINDS["lora"], seed=4, **keep), out=folder / "other seed")
    pissa = {"lora": {"rank": 4, "init": "pissa"}}
    api.train(recipe_over(*files, methods=pissa, **keep), out=folder / "pissa")
    return folder


def base_logits(runs: Path) -> Tensor:
    spec = ModelSpec(name=str(runs / "model"))
    return logits(load_model(spec, load_config(spec), torch.float32, seed=0))


@pytest.mark.parametrize("kind", KINDS)
def test_zero_is_the_base_and_one_is_what_was_trained(kind: str, runs: Path) -> None:
    finished = open_finished(runs / kind, "scaled", with_line=True)
    assert finished.line is not None
    trained = logits(finished.run.model)
    finished.line.move_to(0.0)
    torch.testing.assert_close(logits(finished.run.model), base_logits(runs), rtol=1e-5, atol=1e-6)
    finished.line.move_to(1.0)
    assert torch.equal(logits(finished.run.model), trained)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [0.3, 1.25])
def test_in_between_every_weight_lies_on_the_line(kind: str, factor: float, runs: Path) -> None:
    """The plain formula: merged weights W_0 + a (W_1 - W_0)."""
    finished = open_finished(runs / kind, "scaled", with_line=True)
    assert finished.line is not None
    weights = []
    for present in (0.0, 1.0, factor):
        finished.line.move_to(present)
        layers = lora_layers(finished.run.model)
        merged = {name: layer.merged_weight() for name, layer in layers.items()}
        free = {name: p.detach().clone() for name, p in finished.run.trainable() if ".lora_" not in name}
        weights.append(merged | free)
    for name, weight in weights[2].items():
        expected = weights[0][name] + factor * (weights[1][name] - weights[0][name])
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_sweep_measures_what_evaluations_measured(runs: Path) -> None:
    found = api.sweep_scale(runs / "lora", factors=(0.5, 1.0))
    assert [point.factor for point in found.points] == [0.0, 0.5, 1.0]
    lines = [json.loads(line) for line in (runs / "lora" / "metrics.jsonl").read_text().splitlines()]
    evaluations = [entry for entry in lines if entry["event"] == "evaluation"]
    for point, entry in ((found.points[0], evaluations[0]), (found.points[-1], evaluations[-1])):
        assert point.task_loss == pytest.approx(entry["validation_loss"], rel=1e-5)
        assert point.general_loss == pytest.approx(entry["general_loss"], rel=1e-5)


def test_the_best_is_the_lowest_task_loss_within_the_budget() -> None:
    curve = ((0.0, 5.0, 2.0), (0.5, 3.0, 2.01), (0.75, 2.5, 2.06), (1.0, 2.4, 2.2), (1.25, 2.6, 2.5))
    points = [ScalePoint(*each) for each in curve]
    best = [best_within(points, budget) for budget in (None, 0.1, 0.05, 0.001)]
    assert [point and point.factor for point in best] == [1.0, 0.75, 0.5, None]


def test_the_command_prints_the_curve_and_the_next_command(runs: Path) -> None:
    done = CliRunner().invoke(app, ["scale", str(runs / "lora"), "--factors", "0.5,1,1.25", "--json"])
    assert done.exit_code == 0, done.output
    assert [point["factor"] for point in json.loads(done.stdout)["points"]] == [0.0, 0.5, 1.0, 1.25]
    printed = CliRunner().invoke(app, ["scale", str(runs / "lora"), "--factors", "0.5", "--budget", "50"])
    assert "<- lowest task loss within the budget" in printed.output
    assert "--scale 0.5" in printed.output


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_export_writes_what_the_factor_means(kind: str, runs: Path, tmp_path: Path) -> None:
    finished = open_finished(runs / kind, "scaled", with_line=True)
    assert finished.line is not None
    finished.line.move_to(0.4)
    expected = logits(finished.run.model)
    merged = api.export_merged(runs / kind, tmp_path / "merged", scale=0.4)
    spec = ModelSpec(name=str(merged.folder))
    torch.testing.assert_close(
        logits(load_model(spec, load_config(spec), torch.float32, seed=0)), expected, rtol=1e-4, atol=1e-5
    )


def test_a_scaled_adapter_loads_in_peft(runs: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    half = tmp_path / "half"
    done = CliRunner().invoke(app, ["export", str(runs / "lora"), "--adapter", str(half), "--scale", "0.5"])
    assert done.exit_code == 0, done.output
    finished = open_finished(runs / "lora", "scaled", with_line=True)
    assert finished.line is not None
    finished.line.move_to(0.5)
    spec = ModelSpec(name=str(runs / "model"))
    base = load_model(spec, load_config(spec), torch.float32, seed=0)
    theirs = logits(peft.PeftModel.from_pretrained(base, str(tmp_path / "half" / "adapter")))
    torch.testing.assert_close(theirs, logits(finished.run.model), rtol=1e-5, atol=1e-5)


def test_the_mean_of_products_against_the_plain_one() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = [(torch.randn(3, 11, generator=generator), torch.randn(7, 3, generator=generator)) for _ in range(2)]
    exact = sum((b @ a for a, b in factors), torch.zeros(7, 11)) / 2
    for rank in (6, 7, 9):  # 6 holds it all; the matrix itself has 7 rows
        a_RI, b_OR, lost = mean_product(factors, rank)
        assert (a_RI.shape, b_OR.shape) == ((rank, 11), (7, rank))
        torch.testing.assert_close(b_OR @ a_RI, exact, rtol=1e-5, atol=1e-5)
        assert lost < 1e-6
    a_RI, b_OR, lost = mean_product(factors, 3)
    singular = torch.linalg.svdvals(exact)
    assert lost == pytest.approx(float(singular[3:].norm() / singular.norm()), rel=1e-4)
    assert float((b_OR @ a_RI - exact).norm()) == pytest.approx(float(singular[3:].norm()), rel=1e-4), "Eckart-Young"


def test_an_average_of_equal_states_is_that_state(runs: Path) -> None:
    finished = open_finished(runs / "lora and norms", "averaged")
    expected = logits(finished.run.model)
    _, path = list_checkpoints(runs / "lora and norms" / "checkpoints")[-1]
    state = load_checkpoint(path)[0]
    assert average(finished.run, [state, state, state]) < 1e-5
    torch.testing.assert_close(logits(finished.run.model), expected, rtol=1e-4, atol=1e-5)


def test_averages_of_checkpoints_and_of_runs(runs: Path, tmp_path: Path) -> None:
    full = open_finished(runs / "full", "averaged", last=3)
    states = [load_checkpoint(path)[0] for _, path in list_checkpoints(runs / "full" / "checkpoints")]
    for name, parameter in full.run.trainable():
        expected = torch.stack([state[f"trainable/{name}"] for state in states]).mean(0)
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-7)
    adapter, lost = api.export_adapter(runs / "lora", tmp_path / "soup", others=(runs / "other seed",))
    assert adapter.kind == "adapter"
    assert 0.0 < lost < 1.0, "two adapters of rank 4 seldom fit into one"


def test_what_is_refused(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(Conflict, match="PiSSA"):
        api.sweep_scale(runs / "pissa")
    with pytest.raises(InputError, match="0 would be the base"):
        api.export_merged(runs / "lora", tmp_path / "merged", scale=0.0)
    with pytest.raises(InputError, match=r"checkpoints\.keep: 5"):
        api.export_merged(runs / "lora", tmp_path / "merged", last=5)
    with pytest.raises(CheckpointError, match="same parameters"):
        api.export_merged(runs / "lora", tmp_path / "merged", others=(runs / "full",))
    with pytest.raises(InputError, match="no run in"):
        api.export_merged(runs / "lora", tmp_path / "merged", others=(runs / "model",))
    for arguments in (["export", str(runs / "lora")], ["scale", str(runs / "lora"), "--factors", "a,b"]):
        assert isinstance(CliRunner().invoke(app, arguments).exception, InputError)
