"""What a trial says of forgetting is what the measure of the gate says, and measuring changes nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.tiny_runs import recipe_over, save_model, write_records
from tunewise.lab import corpora
from tunewise.lab.outcome import Measurement
from tunewise.lab.trial import Task, Trial
from tunewise.lab.worker import run_trial
from tunewise.lab.workplace import open_workplace
from tunewise.machine.machine import Machine
from tunewise.methods.reading import recipe_from_mapping

GATED = {"gate": True}
HERE = Machine(
    name="here", kind="cpu", memory_bytes=2**33, usable_memory_bytes=2**33, usable_memory_rule="all",
    bandwidth_bytes_per_second=1e10, flops_per_second={"fp32": 1e11}, source="made up",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trials")
    save_model(folder / "model")
    write_records(folder / "records.jsonl", 60)
    (folder / "machine.yaml").write_text(HERE.to_yaml())
    open_workplace(recipe_from_mapping(start(folder)), folder, str(folder / "machine.yaml"), None)
    return folder


def start(folder: Path, **changes: Any) -> dict[str, Any]:
    methods = {"lora": {"rank": 4, "dropout": 0.3}, "packing": {"row_tokens": 96}, "precision": {"compute": "fp32"}}
    recipe = recipe_over(folder / "model", folder / "records.jsonl", methods=methods)
    return recipe | {"quality": GATED, "batch": {"supervised_tokens": 48, "micro_batch_size": 1}} | changes


def outcome(folder: Path, task: Task, rate: float, **options: Any) -> Measurement:
    recipe = recipe_from_mapping(start(folder, training={"steps": 4, "learning_rate": rate}))
    place = open_workplace(recipe, folder, str(folder / "machine.yaml"), None)
    trial = Trial.of(task, place.recipe, **options)
    return run_trial(trial.model_dump(mode="json"), str(folder / "data"), str(folder / "trial"))


@pytest.mark.parametrize("task", ["learn", "measure"])
def test_measuring_forgetting_changes_nothing_else(folder: Path, task: Task) -> None:
    with_it = outcome(folder, task, 2e-2, measures_forgetting=True)
    without = outcome(folder, task, 2e-2)
    assert without.forgetting is None
    assert with_it.forgetting is not None
    assert abs(with_it.forgetting.middle) > 1e-3
    assert with_it.forgetting.low <= with_it.forgetting.middle <= with_it.forgetting.high
    assert (with_it.losses, with_it.loss) == (without.losses, without.loss)
    still = outcome(folder, task, 1e-9, measures_forgetting=True)
    assert still.forgetting is not None
    assert abs(still.forgetting.middle) < 1e-5, "nothing learnt, nothing forgotten"


def test_the_text_lies_ready_and_belongs_to_the_circumstances(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_from_mapping(start(folder))
    place = open_workplace(recipe, folder, str(folder / "machine.yaml"), None)
    text = corpora.load_general(folder / "data")
    assert place.measures_forgetting
    assert place.circumstances["general text"] == text.corpus.fingerprint
    assert set(text.domains) == {"prose", "code"}
    own = tmp_path / "own.txt"
    own.write_text("A text about nothing in particular, which is long enough to be cut in windows. " * 20)
    other = recipe.replace(quality=recipe.quality.model_copy(update={"general_text": str(own)}))
    elsewhere = open_workplace(other, tmp_path / "other", str(folder / "machine.yaml"), None)
    assert elsewhere.circumstances["general text"] != text.corpus.fingerprint
    off = recipe.replace(quality=recipe.quality.model_copy(update={"gate": False}))
    assert not open_workplace(off, tmp_path / "off", str(folder / "machine.yaml"), None).measures_forgetting
