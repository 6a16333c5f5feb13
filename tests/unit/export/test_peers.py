"""Exports to other trainers: nothing of a recipe is forgotten, and what is written reads back."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from tests.unit.random_recipes import recipes
from tunewise.errors import InputError
from tunewise.export.peers import PEERS, Facts, PeerConfig, peer_config
from tunewise.export.peers.ledger import Ledger, settings_of
from tunewise.methods import ALL, BY_NAME, complete
from tunewise.methods.compatibility import conflicts
from tunewise.methods.reading import recipe_from_mapping
from tunewise.recipe import DataSpec, Fidelity, Method, Recipe, Slot

SHAPE = LlamaConfig(
    hidden_size=4096, num_hidden_layers=32, intermediate_size=14336, vocab_size=128256, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=131072,
)  # fmt: skip
"""Llama 3.1 8B's, which torchtune has a builder for."""

NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)
"""A recipe has so many parts that making a failing one smaller takes minutes."""

NAMES = sorted(PEERS)
LORA: dict[str, Any] = {"lora": {}, "precision": {"compute": "bf16"}}
ALONE: dict[str, dict[str, Any]] = {
    "freeze": {"freeze": {"train": ["*norm*"]}},
    "peft": {"peft": {"kind": "IA3"}},
    "stream": {**LORA, "checkpointing": {}, "stream": {"source": "host"}},
    "offload_activations": {**LORA, "offload_activations": {"to": "host"}},
    "fp8_lm": {"precision": {"compute": "bf16", "trainable": "same"}, "fp8_lm": {}},
    "qalora": {"qalora": {}, "quantize": {"kind": "int4"}},
}
"""Methods that need options, or that stand for the adapter themselves."""


def completed(methods: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    """A complete recipe for a model of `SHAPE` on a GPU."""
    base: dict[str, Any] = {"model": "owner/llama", "data": {"source": "owner/chats"}, "device": "cuda"}
    merged = {**base, **changes, "methods": LORA if methods is None else methods}
    device = torch.device(str(merged["device"]))
    return complete(recipe_from_mapping(merged), SHAPE, device)


def exported(recipe: Recipe, peer: str, **facts: Any) -> PeerConfig:
    return peer_config(recipe, peer, config=SHAPE, facts=Facts(**facts))


def content(recipe: Recipe, peer: str, **facts: Any) -> dict[str, Any]:
    read = yaml.safe_load(exported(recipe, peer, **facts).text)
    assert isinstance(read, dict)
    return read


def named(recipe: Recipe, peer: str, **facts: Any) -> dict[str, str]:
    """The settings that the tool cannot honour, and why."""
    return {missing.setting: missing.reason for missing in exported(recipe, peer, **facts).not_expressible}


@pytest.mark.parametrize("peer", NAMES)
@pytest.mark.parametrize("method", [method.name for method in ALL])
def test_every_method_is_written_or_named(method: str, peer: str) -> None:
    """`peer_config` itself fails when a setting is neither; adapters without counterpart are refused by name."""
    model = {"name": "owner/llama", "weights": "random" if method == "initialize" else "pretrained"}
    is_adapter = BY_NAME[method].slot == Slot.ADAPTER
    is_alone = is_adapter or method == "initialize"  # whose base no adapter could be saved beside
    recipe = completed(ALONE.get(method, {**({} if is_alone else LORA), method: {}}), model=model)
    if method == "initialize" and peer == "torchtune":
        with pytest.raises(InputError, match="they draw none"):
            exported(recipe, peer)
        return
    if is_adapter and method != "lora" and not (method == "freeze" and peer == "axolotl"):
        with pytest.raises(InputError, match=f"no counterpart for '{method}'"):
            exported(recipe, peer)
        return
    config = exported(recipe, peer)
    missing = {each.setting for each in config.not_expressible}
    assert method in config.mapped or any(each.split(".")[0] == method for each in missing)


class Novel(Method):
    """A method of which the exports know nothing."""

    name: ClassVar[str] = "novel"
    slot: ClassVar[Slot] = Slot.DATA
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    strength: int = 1


@pytest.mark.parametrize("peer", NAMES)
def test_a_setting_that_nobody_decided_about_fails_the_export(peer: str) -> None:
    recipe = completed()
    recipe = recipe.replace(methods=(*(recipe.methods or ()), Novel()))
    with pytest.raises(AssertionError, match=r"forgets novel, novel\.strength"):
        exported(recipe, peer)


def test_all_settings_are_counted() -> None:
    settings_found = settings_of(completed({**LORA, "packing": {}}))
    for name in Recipe.model_fields:
        assert name == "methods" or any(key.split(".")[0] == name for key in settings_found)
    assert settings_found["lora"] is True
    assert settings_found["lora.rank"] == 16
    assert settings_found["batch.documents"] == 16


def test_a_ledger_ends_only_when_everything_is_accounted_for() -> None:
    ledger = Ledger(completed({}), "Tool")
    opened = list(settings_of(completed({})))
    for setting in opened[:-1]:
        ledger.take(setting, "name")
    with pytest.raises(AssertionError, match=f"the export to Tool forgets {opened[-1]}"):
        ledger.close()
    assert not ledger.need(opened[-1], "other", otherwise="why")
    assert str(ledger.missing[0]).startswith(opened[-1])
    ledger.close()


@settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=NO_SHRINKING
)
@given(recipe=recipes(), facts=st.booleans(), tokens=st.floats(1, 1e7), steps=st.integers(1, 10**6))
def test_any_recipe_is_written_or_refused(recipe: Recipe, facts: bool, tokens: float, steps: int) -> None:
    """Whatever it holds: every setting is accounted for, the YAML reads back, comments stay comments."""
    data = recipe.data.model_dump() | {"source": "owner/records", "fields": {}, "max_length": 4096}
    try:
        recipe = complete(recipe.replace(data=DataSpec(**data)), SHAPE, torch.device("cpu"))
    except InputError:
        assume(False)
    assume(not conflicts(recipe))
    known = Facts(tokens, steps) if facts else Facts()
    for peer in NAMES:
        try:
            config = peer_config(recipe, peer, config=SHAPE, facts=known, name="name")
        except InputError:
            continue
        head, _, body = config.text.partition("\n\n")
        assert all(line.startswith("#") for line in head.split("\n"))
        assert isinstance(yaml.safe_load(body), dict)
        assert yaml.safe_load(config.text) == yaml.safe_load(body)


def test_what_cannot_be_honoured_stands_in_the_file_too() -> None:
    config = exported(completed(), "trl")
    for missing in config.not_expressible:
        assert f"#   {missing}" in config.text
    for note in config.notes:
        assert f"#   {note}" in config.text
    assert "# Run it with: trl sft --config llama.trl.yaml" in config.text


def test_writing_overwrites_nothing(tmp_path: Path) -> None:
    config = exported(completed(), "llamafactory")
    file = config.write(tmp_path)
    companion = tmp_path / config.companions[0][0]
    assert file.read_text() == config.text
    assert json.loads(companion.read_text())["tunewise"]["hf_hub_url"] == "owner/chats"
    file.unlink()
    with pytest.raises(InputError, match=r"dataset_info\.json' exists already"):
        config.write(tmp_path)
    assert not file.exists()


def test_an_unknown_tool_and_an_unfinished_recipe() -> None:
    with pytest.raises(InputError, match=r"there is no tool 'tlr'\. Did you mean 'trl'"):
        exported(completed(), "tlr")
    with pytest.raises(ValueError, match="not complete"):
        exported(recipe_from_mapping({"model": "owner/m", "data": "d.jsonl"}), "trl")


@pytest.mark.parametrize("peer", ["llamafactory", "torchtune"])
def test_texts_that_a_tool_would_take_for_references(peer: str) -> None:
    with pytest.raises(InputError, match="in out for a reference"):
        exported(completed(out="runs/${HOME}"), peer)


@pytest.mark.parametrize("peer", NAMES)
def test_data_that_only_tunewise_can_read(peer: str) -> None:
    with pytest.raises(InputError, match="data 'stdlib' are made by tunewise"):
        exported(completed(data="stdlib"), peer)


@pytest.mark.parametrize("peer", NAMES)
def test_the_records_are_looked_at(peer: str, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"question": "Is it?", "answer": "It is."}\n' * 3)
    recipe = completed(data={"source": str(file)})
    config = exported(recipe, peer)
    assert "data.format" not in {each.setting for each in config.not_expressible} or peer == "unsloth"
    renamed = {"trl": "rename 'answer' -> 'completion', 'question' -> 'prompt'"}
    if peer in renamed:
        assert renamed[peer] in named(recipe, peer)["data.fields"]
    if peer == "axolotl":
        kind = content(recipe, peer)["datasets"][0]["type"]
        assert (kind["field_instruction"], kind["field_output"]) == ("question", "answer")
    if peer == "torchtune":
        assert content(recipe, peer)["dataset"]["column_map"] == {"input": "question", "output": "answer"}
    if peer == "llamafactory":
        entry = json.loads(config.companions[0][1])["tunewise"]
        assert entry == {"file_name": str(file), "columns": {"prompt": "question", "response": "answer"}}


def test_a_configuration_without_weights_is_named(tmp_path: Path) -> None:
    SHAPE.save_pretrained(tmp_path / "my-model")
    recipe = completed(model=str(tmp_path / "my-model" / "config.json"))
    assert content(recipe, "trl")["model_name_or_path"] == str(tmp_path / "my-model")
    assert "without weights" in named(recipe, "trl")["model.name"]
    assert exported(recipe, "trl").file_name == "my-model.trl.yaml"


def test_the_table_in_the_documents_is_current() -> None:
    folder = Path(__file__).parents[3] / "docs"
    written = runpy.run_path(str(folder / "make_export_table.py"))["page"]()
    assert (folder / "export.md").read_text(encoding="utf-8") == written, "run: python docs/make_export_table.py"
