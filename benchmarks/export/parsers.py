"""Runs in a tool's environment, without tunewise: let the tool's own parser read the files that were written for it.

python parsers.py PEER FILE...    prints one JSON object a file: {file, accepted, gpu_answered, error, unknown, altered}

A parser that refuses for want of a GPU is asked again with its questions about the machine answered as an A100 would
(`gpu_answered`); nothing else is changed. `unknown` are keys that the tool's schema has not got (some pass over them in
silence), `altered` those that read back with another value than was written.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
"""Set before a tool is imported: nothing here may call home."""

Parsed = tuple[set[str], dict[str, Any]]
"""Keys that the tool has not got, and what it read."""

ABOUT_THE_GPU = re.compile(r"bf16|tf32|gpu|cuda|flash", re.IGNORECASE)


def plain(value: Any) -> Any:
    """Return a value as JSON knows it: enumerations by value, tuples and tools' own lists as lists."""
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | type(None)) else str(value)


def reset_accelerate() -> None:
    """Accelerate's state is the process's, and another file may want another precision."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)


def parse_trl(file: str) -> Parsed:
    from trl.scripts.sft import make_parser

    reset_accelerate()
    parsed = make_parser().parse_args_and_config(["--config", file], fail_with_unknown_args=True)
    found: dict[str, Any] = {}
    for part in parsed:
        found |= vars(part)
    found["datasets"] = [{key: value for key, value in vars(each).items() if value} for each in found["datasets"]]
    return set(), found


def parse_llamafactory(file: str) -> Parsed:
    import llamafactory
    from llamafactory.hparams import get_train_args

    # The package llamafactory.data imports torchaudio, whose wheel wants CUDA's libraries; the module alone does not.
    place = Path(str(llamafactory.__file__)).parent / "data" / "parser.py"
    spec = importlib.util.spec_from_file_location("llamafactory.data.parser", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)

    reset_accelerate()
    with mock.patch.object(sys, "argv", ["llamafactory-cli", file]):
        parsed = get_train_args()
    found: dict[str, Any] = {}
    for part in parsed:
        found |= vars(part)
    names = [*found["dataset"], *(found["eval_dataset"] or [])]
    for attributes in module.get_dataset_list(names, found["dataset_dir"]):
        if attributes.load_from == "file" and not Path(attributes.dataset_name).is_file():
            raise ValueError(f"dataset_info.json names no file: {attributes.dataset_name}")
    return set(), found


def parse_axolotl(file: str) -> Parsed:
    from axolotl.cli.config import load_cfg
    from axolotl.integrations.config import merge_input_args
    from axolotl.utils.schemas.datasets import SFTDataset

    found = dict(load_cfg(file))
    written = yaml.safe_load(Path(file).read_text())
    schema, _ = merge_input_args()
    unknown = set(written) - set(schema.model_fields)
    for entry in [*written["datasets"], *written.get("test_datasets", [])]:
        unknown |= {f"datasets: {key}" for key in set(entry) - set(SFTDataset.model_fields)}
    return unknown, found


def parse_torchtune(file: str) -> Parsed:
    """`tune validate`, and then every component is looked up whose arguments it does not bind by itself."""
    from omegaconf import OmegaConf
    from torchtune.config import validate
    from torchtune.config._utils import _get_component_from_path

    config = OmegaConf.load(file)
    validate(config)
    found = OmegaConf.to_container(config, resolve=False)
    assert isinstance(found, dict)
    for section in found.values():
        if isinstance(section, dict) and "_component_" in section:
            _get_component_from_path(section["_component_"])
    recipe = next(line for line in Path(file).read_text().splitlines() if line.startswith("# For the recipe "))
    _check_keys_of_recipe(recipe.split()[-1].rstrip("."), found)
    return set(), {str(key): value for key, value in found.items()}


def _check_keys_of_recipe(name: str, found: dict[Any, Any]) -> None:
    """Compare with what the recipe's own code reads, since `tune validate` looks at components only."""
    package = importlib.util.find_spec("recipes")  # it refuses to be imported
    assert package is not None
    assert package.origin is not None
    source = re.sub(r"#.*", "", (Path(package.origin).parent / f"{name}.py").read_text())
    needed = set(re.findall(r"\bcfg\.(?!get\b|metric_logger\b)(\w+)", source))
    known = needed | set(re.findall(r"cfg\.get\(\s*\"(\w+)\"", source)) | {"metric_logger", "profiler", "loss"}
    absent, foreign = sorted(needed - set(found)), sorted(set(found) - known)
    if absent or foreign:
        raise ValueError(f"{name} reads {absent}, which is not there; it never reads {foreign}")


def parse_unsloth(file: str) -> Parsed:
    from unsloth_cli.config import load_config

    return set(), load_config(Path(file)).model_dump()


PARSERS: dict[str, Callable[[str], Parsed]] = {
    "trl": parse_trl,
    "axolotl": parse_axolotl,
    "llamafactory": parse_llamafactory,
    "torchtune": parse_torchtune,
    "unsloth": parse_unsloth,
}

A100 = {"bf16": True, "fp8": False, "tf32": True, "n_gpu": 1, "compute_capability": "sm_80"}
ANSWERS: dict[str, dict[str, Any]] = {
    "trl": {
        "transformers.training_args.is_torch_bf16_gpu_available": lambda: True,
        "transformers.training_args.is_torch_tf32_available": lambda: True,
    },
    "llamafactory": {
        "transformers.training_args.is_torch_bf16_gpu_available": lambda: True,
        "transformers.training_args.is_torch_tf32_available": lambda: True,
        "llamafactory.hparams.parser.is_torch_bf16_gpu_available": lambda: True,
    },
    "axolotl": {
        "axolotl.cli.config.gpu_capabilities": lambda: (A100, {"torch_version": "2.13.0"}),
        "axolotl.utils.config.is_torch_bf16_gpu_available": lambda: True,
        "transformers.utils.is_flash_attn_2_available": lambda: True,
    },
}
"""What the parsers ask about the machine, and what an A100 with flash-attn answers."""


@contextlib.contextmanager
def answered(peer: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, answer in ANSWERS.get(peer, {}).items():
            stack.enter_context(mock.patch(name, answer))
        yield


def altered(written: dict[str, Any], found: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the keys that were read back with another value."""
    changed = {}
    for key, value in written.items():
        read = plain(found.get(key))
        same = read in (value, str(value)) or (isinstance(value, list) and len(value) == 1 and read == value[0])
        if isinstance(value, str) and isinstance(read, list):
            same = value.split(",") == read or (value == "none" and not read)
        if isinstance(value, float | int) and isinstance(read, float | int):
            same = float(value) == float(read)
        if isinstance(value, dict) and isinstance(read, dict):
            same = not altered(value, read)
        if isinstance(value, list) and isinstance(read, list) and all(isinstance(each, dict) for each in value):
            same = all(not altered(mine, theirs) for mine, theirs in zip(value, read, strict=True))
        if not same:
            changed[key] = [value, read]
    return changed


def judge(peer: str, file: str) -> dict[str, Any]:
    """Let the parser read one file, as it is, and where it asks for a GPU with its questions answered."""
    verdict: dict[str, Any] = {"file": Path(file).name, "accepted": False, "gpu_answered": False, "error": None}
    for gpu_answered in (False, True):
        quiet = io.StringIO()
        machine = answered(peer) if gpu_answered else contextlib.nullcontext()
        try:
            with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet), machine:
                unknown, found = PARSERS[peer](file)
        except (Exception, SystemExit) as error:
            said = f"{type(error).__name__}: {error}" if str(error) else quiet.getvalue()
            verdict["error"] = said.strip()[-700:]
            if not ABOUT_THE_GPU.search(said):
                break
            continue
        written = yaml.safe_load(Path(file).read_text())
        return verdict | {
            "accepted": not unknown,
            "gpu_answered": gpu_answered,
            "error": f"unknown keys: {sorted(unknown)}" if unknown else None,
            "altered": altered(written, found),
        }
    return verdict


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=sorted(PARSERS))
    parser.add_argument("files", nargs="+")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    out = os.fdopen(os.dup(1), "w")  # the tools write to standard output as they please
    print(json.dumps({"version": importlib.metadata.version(arguments.peer)}), file=out)
    for file in arguments.files:
        print(json.dumps(judge(arguments.peer, file)), file=out, flush=True)


if __name__ == "__main__":
    main()
