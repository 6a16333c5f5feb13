"""Which model: find its folder, configuration, tokenizer and weights, or say clearly what is wrong with them.

Weights are read from safetensors only, unless the user allows pickle; code from a model's folder never runs, unless the
user trusts it. A name that is a folder (or "embedded") is never looked up on the network.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from tunewise.errors import InputError
from tunewise.recipe import ModelSpec
from tunewise.workload.places import user_path

EMBEDDED_FOLDER = Path(__file__).resolve().parent.parent / "embedded"
"""The small base model that the package brings along; `model: embedded`."""

_LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError, StrictDataclassError)
"""What transformers raises for a folder that it cannot read, all of it the user's to mend."""

_UNUSED_IS_DECODER = {"gpt_neox", "gpt_neox_japanese"}
"""Causal models whose configuration says `is_decoder: false` and which never read it (transformers 5.23)."""


def locate(name: str) -> str:
    """Return the folder of a model name, or the name itself where it is a hub id.

    Raises:
        InputError: the name looks like a path and there is nothing.
    """
    if name == "embedded":
        return str(EMBEDDED_FOLDER)
    path = user_path(name)
    try:
        path.stat()
    except PermissionError:
        raise InputError(f"model: '{name}' may not be read; check its permissions.") from None
    except OSError:
        pass  # no path, perhaps a hub id
    if path.is_dir():
        return str(path)
    if path.is_file():
        if path.name.endswith(".json"):
            return str(path)
        raise InputError(f"model: '{name}' is a file; give the folder that holds config.json, or a config.json.")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        what = "file" if name.endswith(".json") else "folder"
        raise InputError(f"model: there is no {what} '{name}', and it has not the form owner/name of a hub id.")
    return name


def load_config(spec: ModelSpec) -> PretrainedConfig:
    """Read the model's configuration, without weights.

    Raises:
        InputError: no configuration there, not readable, or not a causal language model's.
    """
    place = locate(spec.name)
    folder = Path(place)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(f"model: the folder '{place}' has no config.json; is it a Hugging Face model folder?")
    file = folder if folder.is_file() else folder / "config.json"
    if file.is_file():
        _check_json_object(file)
    try:
        with quiet_transformers(place):
            config = AutoConfig.from_pretrained(place, **_source_options(spec, place))
    except _LOADING_ERRORS as error:
        code = "trust_remote_code" in str(error)
        advice = " If you trust its code, set model.trust_remote_code to true." if code else ""
        raise InputError(
            f"model: cannot read the configuration of '{spec.name}': {_first_line(error)}{advice}"
        ) from error
    if type(config) not in AutoModelForCausalLM._model_mapping and not spec.trust_remote_code:
        raise InputError(f"model: '{spec.name}' is of type '{config.model_type}', which is no causal language model.")
    is_encoder = getattr(config, "is_decoder", True) is False and config.model_type not in _UNUSED_IS_DECODER
    if is_encoder or config.is_encoder_decoder:
        raise InputError(
            f"model: '{spec.name}' is of type '{config.model_type}', an encoder whose tokens see the ones after them, "
            "so it cannot learn to continue a text. Choose a causal language model."
        )
    return cast(PretrainedConfig, config)


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """Read the tokenizer that belongs to the model, or the one that the recipe names.

    Raises:
        InputError: there is none, or it is not readable.
    """
    name = spec.tokenizer or spec.name
    place = locate(name)
    if Path(place).is_file():
        raise InputError(f"model.tokenizer: '{name}' is a configuration without tokenizer; name a tokenizer's folder.")
    if Path(place).is_dir() and not any(Path(place).glob("tokenizer*")) and not any(Path(place).glob("vocab*")):
        raise InputError(f"model.tokenizer: the folder '{place}' holds no tokenizer; name one as model.tokenizer.")
    try:
        with quiet_transformers(place):
            tokenizer = AutoTokenizer.from_pretrained(place, **_source_options(spec, place))
    except (
        Exception
    ) as error:  # of the files of others: transformers raises whatever it meets, tokenizers bare Exceptions
        raise InputError(f"model.tokenizer: cannot read the tokenizer of '{name}': {_first_line(error)}") from error
    if spec.chat_template is not None:
        tokenizer.chat_template = _read_template(spec.chat_template)
    return cast(PreTrainedTokenizerBase, tokenizer)


def load_model(spec: ModelSpec, config: PretrainedConfig, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """Load the weights in `dtype` on the CPU, or draw random ones from `seed`.

    Raises:
        InputError: weights are missing, damaged, of another shape than the configuration says, or pickled.
    """
    if spec.weights == "random":
        return random_model(config, dtype, seed)
    place = locate(spec.name)
    if Path(place).is_file():
        raise InputError(
            f"model: '{spec.name}' is a configuration without weights; set model.weights to 'random' to train from "
            "scratch, or name a folder with weights."
        )
    if Path(place).is_dir():
        _check_weight_files(Path(place), spec.allow_pickle)
    try:
        with quiet_transformers(place):
            model, report = AutoModelForCausalLM.from_pretrained(
                place,
                config=config,
                dtype=dtype,
                use_safetensors=None if spec.allow_pickle else True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **_source_options(spec, place),
            )
    except _LOADING_ERRORS as error:
        raise InputError(f"model: cannot load the weights of '{spec.name}': {_first_line(error)}") from error
    missing, mismatched = sorted(report["missing_keys"]), sorted(map(str, report["mismatched_keys"]))
    if missing or mismatched:
        kind, names = ("are missing", missing) if missing else ("have another shape than config.json says", mismatched)
        shown = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
        raise InputError(f"model: {len(names)} weights of '{spec.name}' {kind}: {shown}. The checkpoint is incomplete.")
    return cast(PreTrainedModel, model)


@contextmanager
def quiet_transformers(place: str) -> Iterator[None]:
    """Keep transformers' reports off the screen, and its progress bars unless something is downloaded to `place`.

    What matters of a report becomes an error here.
    """
    level, shows_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if Path(place).exists():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if shows_bars:
            transformers_logging.enable_progress_bar()


def random_model(config: PretrainedConfig, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """Make a model of this shape with its architecture's own initialization, drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, dtype=dtype))


def resize_vocabulary(model: PreTrainedModel, num_tokens: int) -> None:
    """Give embeddings and head `num_tokens` rows; transformers draws the new rows around the mean of the old ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.resize_token_embeddings(num_tokens)


def model_fingerprint(spec: ModelSpec) -> str:
    """Return a hash of the model's configuration and of its weight files' headers and sizes, without reading weights.

    A safetensors header holds every tensor's name, type, shape and place; with the file's size it tells two
    checkpoints apart in all but contrived cases, in milliseconds even for 70B. A hub model has its name and revision.
    """
    folder = Path(locate(spec.name))
    digest = hashlib.sha256(f"{spec.name} {spec.revision} {spec.weights}".encode())
    files = [folder] if folder.is_file() else sorted([*folder.glob("config.json"), *folder.glob("*.safetensors")])
    for file in files:
        with file.open("rb") as stream:
            digest.update(f"{file.name} {file.stat().st_size}".encode())
            digest.update(stream.read(1 << 20))
    return digest.hexdigest()[:16]


def context_length(config: PretrainedConfig, default: int = 2048) -> int:
    """Return how many positions the model was made for, or `default` where its configuration does not say."""
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return default


def _source_options(spec: ModelSpec, place: str) -> dict[str, Any]:
    """Say where transformers may look: only on this disk when `place` is a path; at the hub's revision else."""
    options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    if Path(place).exists():
        options["local_files_only"] = True
    elif spec.revision is not None:
        options["revision"] = spec.revision
    return options


def _check_json_object(file: Path) -> None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"model: {file} is not readable JSON: {error}") from None
    if not isinstance(content, dict) or "model_type" not in content:
        raise InputError(f"model: {file} has no 'model_type'; it is not a Hugging Face model configuration.")


def _check_weight_files(folder: Path, allow_pickle: bool) -> None:
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass  # opening reads the header and compares it with the file's size
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"model: {file} is damaged, incomplete or no safetensors file ({error}). Get it again."
            ) from None
    if files:
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            _check_shards(folder, index)
        return
    pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickled and not allow_pickle:
        raise InputError(
            f"model: '{folder}' holds pickled weights only ({pickled[0].name}); reading pickle can run code. Convert "
            "them to safetensors, or set model.allow_pickle to true if you trust where they come from."
        )
    if not pickled:
        raise InputError(f"model: '{folder}' holds no weights (model.safetensors); for random ones set model.weights.")


def _check_shards(folder: Path, index: Path) -> None:
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"model: {index} is not a readable index of shards: {error}") from None
    absent = sorted(shard for shard in shards if not (folder / shard).is_file())
    if absent:
        raise InputError(
            f"model: {len(absent)} of {len(shards)} weight shards are missing, first {folder / absent[0]}."
        )


def _read_template(template: str) -> str:
    if "{%" in template or "{{" in template:
        return template
    try:
        return user_path(template).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"model.chat_template: cannot read the template file '{template}': {error}") from None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:300]
