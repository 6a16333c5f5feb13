"""The step timed here on shallow models: which models, which micro-batches, and what the plan makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, PretrainedConfig
from typer.testing import CliRunner

from tunewise.cli import app
from tunewise.engine.skeleton import block_sizes
from tunewise.errors import InputError
from tunewise.methods import complete
from tunewise.methods.reading import recipe_from_mapping
from tunewise.planner import calibration, rehearsal
from tunewise.planner.load import Load
from tunewise.planner.plan import plan
from tunewise.planner.rehearsal import rehearse
from tunewise.recipe import Recipe
from tunewise.workload.batches import Layout
from tunewise.workload.corpus import Corpus


def config_of(depth: int) -> PretrainedConfig:
    return AutoConfig.for_model(
        "llama", num_hidden_layers=depth, hidden_size=32, intermediate_size=64, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=128, max_position_embeddings=256,
    )  # fmt: skip


def recipe_of(config: PretrainedConfig, **changes: Any) -> Recipe:
    mapping = {"model": {"name": "x", "weights": "random"}, "data": "none", "device": "cpu", "methods": {"lora": {}}}
    return complete(recipe_from_mapping({**mapping, **changes}, "test"), config, torch.device("cpu"))


def load_of(lengths: list[int], recipe: Recipe) -> Load:
    documents = [(np.zeros(length, np.int32), np.ones(length, np.bool_)) for length in lengths]
    return Load.of_corpus(Corpus.from_documents(documents, ["test"] * len(lengths)), recipe, None, "test")


class Clock:
    """Steps that take a second for each block and one for the rest."""

    def __init__(self, recipe: Recipe, config: PretrainedConfig, load: Load) -> None:
        del recipe, load
        self.seconds = float(1 + config.num_hidden_layers)

    def step(self, number: int) -> float:
        assert number >= 0
        return self.seconds


@pytest.mark.parametrize(("depth", "blocks"), [(32, (2, 6)), (7, (2, 6)), (4, (2, 3)), (2, (2,)), (1, (1,))])
def test_a_linear_step_is_extended_exactly(
    depth: int, blocks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "_Timed", Clock)
    monkeypatch.setattr(rehearsal, "ENOUGH_SECONDS", 0.0)
    monkeypatch.setattr(rehearsal, "CACHE_BYTES", 0)
    config = config_of(depth)
    recipe = recipe_of(config)
    found = rehearse(recipe, config, load_of([20] * 16, recipe))
    assert found.step_seconds.middle == 1.0 + depth
    assert found.blocks == blocks
    assert found.rounds == rehearsal.FEWEST_ROUNDS
    assert found.step_seconds.low < found.step_seconds.middle < found.step_seconds.high


def test_the_real_step_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "ENOUGH_SECONDS", 0.0)
    config = config_of(3)
    recipe = recipe_of(config, batch={"documents": 4, "micro_batch_size": 2})
    found = rehearse(recipe, config, load_of([30, 12, 25, 18] * 3, recipe))
    assert 0 < found.step_seconds.low < found.step_seconds.high < 60


def test_a_model_that_a_cache_could_hold_is_timed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "_Timed", Clock)
    monkeypatch.setattr(rehearsal, "ENOUGH_SECONDS", 0.0)
    config = config_of(32)
    recipe = recipe_of(config, methods={"lora": {}, "precision": {"compute": "fp32"}})
    block = block_sizes(config)[0] * 4
    for cache, blocks in ((block * 40, (32,)), (block * 10, (10, 14)), (block * 31, (32,)), (block * 30, (30, 31))):
        monkeypatch.setattr(rehearsal, "CACHE_BYTES", cache)
        assert rehearse(recipe, config, load_of([20] * 16, recipe)).blocks == blocks


def test_a_long_step_is_timed_in_parts_and_every_time_another_one() -> None:
    config = config_of(2)
    recipe = recipe_of(config, batch={"documents": 12})
    lengths = [10 * (number % 12 + 1) for number in range(48)]
    load = load_of(lengths, recipe)
    steps = rehearsal._Steps(load, Layout(1), vocab_size=128)
    assert len(load.steps) == 3  # the last one of the epoch is ragged
    seen = []
    for number in range(4):
        batches, scale = steps.micro_batches(number)
        assert len(batches) == rehearsal.MOST_MICRO_BATCHES
        timed = sum(batch.input_ids_RL.numel() for batch in batches)
        assert scale * timed == pytest.approx(load.tokens_per_step, rel=0.01)
        seen.append(tuple(int(batch.input_ids_RL.sum()) for batch in batches))
    assert len(set(batches[0].input_ids_RL.flatten().tolist())) > 3  # experts would see one token only
    assert len(set(seen)) == 3
    assert seen[3] == seen[0]  # the sample is used up
    whole, alone = rehearsal._Steps(load, Layout(12), vocab_size=128).micro_batches(0)
    assert len(whole) == 1
    assert alone == pytest.approx(load.tokens_per_step / whole[0].num_tokens)


def test_a_plan_for_another_machine_cannot_be_measured_here(tiny: str) -> None:
    with pytest.raises(InputError, match="--machine here"):
        plan(tiny, length=256, machine="T4", wanted=["lora"], measure=True)


def test_what_was_measured_is_in_the_plan_and_in_the_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "_Timed", Clock)
    monkeypatch.setattr(rehearsal, "ENOUGH_SECONDS", 0.0)
    monkeypatch.setattr(rehearsal, "CACHE_BYTES", 0)
    monkeypatch.setenv("TUNEWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tunewise.planner.case.MEASURE_SECONDS", 0.1)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config_of(8).to_dict() | {"architectures": ["LlamaForCausalLM"]}))
    options = ["plan", str(file), "--length", "64", "--with", "lora", "--measure", "--json"]
    answered = CliRunner().invoke(app, options)
    assert answered.exit_code == 0, answered.output
    content = json.loads(answered.stdout)
    assert content["best"]["step_seconds"]["middle"] == 9.0
    assert "timed 4 times here on copies of 2 and 6 blocks" in content["interval"]
    known = json.loads(calibration.calibration_file().read_text())
    assert content["machine"]["name"] in known
