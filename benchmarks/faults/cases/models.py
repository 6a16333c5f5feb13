"""Bad model folders: incomplete, damaged, of another kind, or with a tokenizer that does not fit."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from benchmarks.faults.cases.case import (
    Case,
    Spoil,
    bound,
    change_json,
    offline,
    remove,
    setting,
    train,
    truncate,
    write,
)
from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS, TOKENIZER = "model/config.json", "model/model.safetensors", "model/tokenizer.json"
NORM = "model.norm.weight"
INDEX = "model/model.safetensors.index.json"


def _model(what: str, spoil: Spoil, *says: str) -> Case:
    return Case(f"model: {what}", train(), says, spoil)


def _change_norm(norm: torch.Tensor | None) -> Spoil:
    """Return what replaces the final norm, or with None removes it."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        del tensors[NORM]
        if norm is not None:
            tensors[NORM] = norm
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return spoil


def _in_shards(folder: Path) -> None:
    """Put the weights into two shards, of which the second is absent."""
    names = sorted(load_file(folder / WEIGHTS))
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    (folder / WEIGHTS).rename(folder / "model" / first)
    weight_map = {name: first if number % 2 else second for number, name in enumerate(names)}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "model" / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def _more_tokens(folder: Path) -> None:
    """Give the tokenizer a token for which the model has no row."""
    tokenizer = json.loads((folder / TOKENIZER).read_text(encoding="utf-8"))
    token = {"id": 4096, "content": "Question", "single_word": False, "lstrip": False, "rstrip": False}
    tokenizer["added_tokens"].append({**token, "normalized": False, "special": False})
    (folder / TOKENIZER).write_text(json.dumps(tokenizer), encoding="utf-8")


CASES = (
    Case("model: the folder is not there", train(model="./modle"), ("there is no folder './modle'",)),
    Case(
        "model: a hub id without network",
        train(model="somebody/some-model"),
        ("somebody/some-model", "cannot read the configuration"),
        around=offline,
    ),
    Case("model: a file", train(model="data.jsonl"), ("'data.jsonl' is a file", "folder that holds config.json")),
    _model("a folder without config.json", remove(CONFIG), "'model' has no config.json"),
    _model("config.json is not JSON", write(CONFIG, '{"model_type": '), "model/config.json is not readable JSON"),
    _model("config.json is a list", write(CONFIG, "[]"), "model/config.json has no 'model_type'"),
    _model("config.json without model_type", change_json(CONFIG, model_type=...), "has no 'model_type'"),
    _model("an unknown model_type", change_json(CONFIG, model_type="lama"), "cannot read the configuration", "lama"),
    _model("no language model", write(CONFIG, '{"model_type": "vit"}'), "type 'vit'", "no causal language model"),
    _model("an encoder", write(CONFIG, '{"model_type": "bert"}'), "type 'bert'", "an encoder", "Choose a causal"),
    _model("an encoder with a decoder", write(CONFIG, '{"model_type": "bart"}'), "type 'bart'", "an encoder"),
    Case(
        "model: a folder that may not be read",
        train(),
        ("model", "Check its permissions"),
        lambda folder: os.chmod(folder / "model", 0),
        around=bound,
    ),
    _model("an impossible configuration", change_json(CONFIG, hidden_size=15), "model", "hidden size (15)"),
    _model("a configuration of the wrong type", change_json(CONFIG, hidden_size="sixteen"), "model", "hidden_size"),
    _model(
        "code of its own",
        change_json(
            CONFIG, model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
        ),
        "cannot read the configuration",
        "trust_remote_code",
    ),
    _model("no weights", remove(WEIGHTS), "'model' holds no weights (model.safetensors)", "model.weights"),
    _model("weights that are cut off", truncate(WEIGHTS), WEIGHTS, "is damaged, incomplete", "Get it again"),
    _model("weights that are something else", write(WEIGHTS, b"<html>404</html>"), WEIGHTS, "no safetensors file"),
    _model("a shard is missing", _in_shards, "1 of 2 weight shards are missing", "model-00002-of-00002.safetensors"),
    _model("a broken index of shards", write(INDEX, "{"), INDEX, "not a readable index of shards"),
    _model("a weight of another shape", _change_norm(torch.ones(17)), "another shape", NORM),
    _model("a weight is missing", _change_norm(None), "1 weights of 'model' are missing", NORM),
    _model("pickled weights only", _pickled, "pickled weights only (pytorch_model.bin)", "allow_pickle"),
    Case(
        "model: a configuration without weights",
        train(model=CONFIG),
        ("model.tokenizer", "configuration without tokenizer", "name a tokenizer's folder"),
    ),
    _model("no tokenizer", remove("model/tokenizer*"), "model.tokenizer: the folder 'model' holds no tokenizer"),
    _model("a broken tokenizer.json", truncate(TOKENIZER), "cannot read the tokenizer of 'model'"),
    _model(
        "a tokenizer without EOS",
        change_json("model/tokenizer_config.json", eos_token=...),
        "has no EOS token",
        "tokenizer_config.json",
    ),
    _model(
        "a tokenizer with more tokens than the model",
        _more_tokens,
        "outside the model's vocabulary of 4096",
        "must be resized",
    ),
    Case(
        "model: new tokens that nobody trains",
        setting("model.resize_vocabulary=true"),
        ("model.resize_vocabulary", "methods.lora.modules_to_save"),
        _more_tokens,
    ),
    _model(
        "a chat template that is not Jinja",
        write("model/chat_template.jinja", "{% for message in messages %}{{ x }"),
        "chat template",
        "not valid Jinja",
    ),
    Case(
        "model: the chat template's file is not there",
        setting("model.chat_template=chat.jinja"),
        ("model.chat_template: cannot read the template file 'chat.jinja'",),
    ),
)
