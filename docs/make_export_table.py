"""Write docs/export.md from what the exports do, so that the table cannot go stale.

python docs/make_export_table.py            # write
python docs/make_export_table.py --check    # fail when the file differs
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from tunewise.errors import InputError
from tunewise.export.peers import PEERS, PeerConfig, peer_config
from tunewise.export.peers.ledger import settings_of
from tunewise.methods import ALL, complete
from tunewise.methods.reading import recipe_from_mapping
from tunewise.recipe import Recipe, Slot

FILE = Path(__file__).parent / "export.md"
SHAPE = LlamaConfig(
    hidden_size=4096, num_hidden_layers=32, intermediate_size=14336, vocab_size=128256, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=131072,
)  # fmt: skip
"""Llama 3.1 8B's: every tool knows it."""

LORA: dict[str, Any] = {"lora": {}, "precision": {"compute": "bf16"}}
ODD: dict[str, dict[str, Any]] = {
    "lora": {
        "alpha": 20.5, "exclude_modules": ["o_proj"], "layers_to_transform": [0], "lora_plus_ratio": 16.0,
        "init": "gaussian", "modules_to_save": ["embed_tokens"], "use_rslora": True,
    },
    "quantize": {"kind": "fp4", "double_quant": False, "block_size": 128, "skip_modules": ["lm_head", "o_proj"]},
    "packing": {"row_tokens": 4096},
    "checkpointing": {"every": 2, "policy": "selective"},
    "freeze": {"train": ["*norm*"]},
    "peft": {"kind": "IA3"},
    "adafactor": {"clip": 2.0, "decay": -0.7},
    "sgd": {"momentum": 0.9},
    "adam": {"eps": 1e-7},
}  # fmt: skip
"""Options that not every tool has."""
CHANGES: tuple[dict[str, Any], ...] = (
    {"model": {"name": "owner/model", "weights": "random", "tokenizer": "owner/other", "revision": "v2",
               "chat_template": "template.txt", "resize_vocabulary": True, "trust_remote_code": True}},
    {"data": {"source": "owner/chats", "validation": "own.jsonl", "too_long": "error", "system_prompt": "Be brief.",
              "max_records": 10, "format": "alpaca"}},
    {"training": {"tokens": 1_000_000, "schedule": "wsd", "final_learning_rate": 0.1, "weight_decay": 0.1,
                  "max_grad_norm": 0.5}},
    {"training": {"epochs": 0.5, "schedule": "inverse_sqrt", "final_learning_rate": 0.1, "max_grad_norm": None}},
    {"evaluation": {"every": 40, "patience": 2}, "checkpoints": {"every": 100}},
    {"data": {"source": "owner/chats", "format": "messages", "replay": {"fraction": 0.05}},
     "evaluation": {"forgetting_budget": 0.05}},
    {"batch": {"supervised_tokens": 4096}, "seed": 2**40, "report_to": ["wandb", "trackio"], "device": "cpu"},
    {"batch": {"documents": 15, "micro_batch_size": 4}},
)  # fmt: skip

HEAD = """# Exporting a plan to another trainer

Written by `python docs/make_export_table.py` from what the exports do; do not edit.

```
tunewise plan MODEL --data FILE --machine H100 --export trl --out plan.yaml     # writes plan.yaml and plan.trl.yaml
```

`--export trl|axolotl|llamafactory|torchtune|unsloth` writes the recommended recipe as that tool's own configuration,
beside `--out` (or as `MODEL.TOOL.yaml` in the current folder), and prints how to run it. No file is overwritten. From
Python: `tunewise.export.peers.peer_config(recipe, "trl").write(folder)`.

Every setting of the recipe is either written under the tool's name for it or named, with the reason: on the terminal,
as comments on top of the file, and in `--json` under `export`. An adapter for which the tool has nothing (`freeze`,
`peft`) is refused, since without it the file would train all weights.

What the tools were read from: {versions}. Whether their parsers accept what is written is tried by
`benchmarks/export/accept.py`.

Of 158 recipes (22 architectures, every method and setting changed one at a time) the five tools' own parsers accept
every file that we write: 157 each of TRL, LLaMA-Factory and Unsloth, 158 of axolotl, 125 of torchtune (33 are refused
by us with the reason, mostly architectures that torchtune does not build). Every key is read back as it was written,
but for two: LLaMA-Factory takes one token off `cutoff_len` when it packs, axolotl spells `selective_checkpointing:
true` out. Where a parser asks for a GPU, its questions were answered as by an A100 (151 of TRL's, 152 of
LLaMA-Factory's). `python benchmarks/export/accept.py --json OUT`.

Three things that a table does not show:

- **Packed rows.** A step of tunewise is a number of documents; with packing they lie in as many rows as they need. The
  other tools' step is a fixed number of rows, so the number of documents in it varies. The rows are chosen so that a
  step has as many tokens on average; that is exact only with `--data`, or `--documents` with `--length`.
- **Warm-up.** transformers and torchtune begin it at a learning rate of 0, tunewise one step higher, so that the first
  step learns something. After it the schedules agree step by step (a test compares them).
- **Validation.** The other tools set records aside by chance; tunewise keeps equal prompts on one side.

## Settings and their names

A star marks a setting that is named as well, always or for some of its values; a dash one that has no counterpart. An
empty cell loses nothing: the tool needs no such setting, or it is named with the method that it belongs to.
"""


SCRATCH = {"name": "owner/model", "weights": "random"}
OURS: dict[str, dict[str, Any]] = {
    "stream": {**LORA, "checkpointing": {}, "stream": {"source": "host"}},
    "offload_activations": {**LORA, "offload_activations": {"to": "host"}},
    "initialize": {"precision": {"compute": "bf16"}, "initialize": {}},
    "fp8_lm": {"precision": {"compute": "bf16", "trainable": "same"}, "fp8_lm": {}},
}
"""Methods that need others beside them, or random weights."""


def recipes() -> Iterator[Recipe]:
    """Yield recipes that between them have every method, and values that not every tool can honour."""
    for kind in ALL:
        name, alone = kind.name, kind.slot == Slot.ADAPTER
        if name in OURS:
            yield completed(OURS[name], **({"model": SCRATCH} if name == "initialize" else {}))
            continue
        beside = {"quantize": {"kind": "int4"}} if name == "qalora" else {} if alone else LORA
        for options in ({}, ODD[name]) if name in ODD and not alone else (ODD.get(name, {}),):
            yield completed({**beside, name: options})
    yield completed(LORA)
    for method in ("sgd", "adamw", "adam", "lion", "adagrad", "rmsprop", "adamw_8bit", "paged_adamw_8bit", "adafactor"):
        changes = {"training": {"max_grad_norm": None}, "batch": {"documents": 4, "micro_batch_size": 4}}
        yield completed({**LORA, method: {"in_backward": True}}, **changes)
    for compute in ("fp16", "tf32", "fp32"):
        yield completed({**LORA, "precision": {"compute": compute}})
    yield completed({**LORA, "quantize": {"kind": "int8"}})
    yield completed({"precision": {"compute": "bf16"}})
    for change in CHANGES:
        yield completed({**LORA, "precision": {}} if change.get("device") == "cpu" else LORA, **change)


def completed(methods: dict[str, Any], **changes: Any) -> Recipe:
    base = {"model": "owner/model", "data": {"source": "owner/chats", "format": "messages"}, "device": "cuda"}
    merged = {**base, **changes, "methods": methods}
    return complete(recipe_from_mapping(merged), SHAPE, torch.device(str(merged["device"])))


def exports(peer: str) -> Iterator[PeerConfig]:
    for recipe in recipes():
        try:
            yield peer_config(recipe, peer, config=SHAPE)
        except InputError:
            continue


def page() -> str:
    """Return the text of docs/export.md."""
    names: dict[str, dict[str, str]] = {peer: {} for peer in PEERS}
    reasons: dict[str, dict[str, str]] = {peer: {} for peer in PEERS}
    for peer in PEERS:
        for config in exports(peer):
            names[peer] |= config.mapped
            for missing in config.not_expressible:
                reasons[peer].setdefault(missing.setting, missing.reason)
    order = list(dict.fromkeys(setting for recipe in recipes() for setting in settings_of(recipe)))
    order.sort(key=lambda setting: setting.split(".")[0] in {method.name for method in ALL})
    versions = ", ".join(f"{peer.name} {peer.version}" for peer in PEERS.values())
    lines = [HEAD.format(versions=versions)]
    lines += ["| setting | " + " | ".join(peer.name for peer in PEERS.values()) + " |", "|---" * (len(PEERS) + 1) + "|"]
    for setting in order:
        cells = [cell(names[peer].get(setting), setting in reasons[peer], setting) for peer in PEERS]
        lines.append(f"| `{setting}` | " + " | ".join(cells) + " |")
    lines += ["", "## What is named, and why", ""]
    for key, peer in PEERS.items():
        lines += [f"### {peer.name}", "", "| setting | what happens instead |", "|---|---|"]
        named = {shortened(setting): reasons[key][setting] for setting in order if setting in reasons[key]}
        lines += [f"| `{setting}` | {reason} |" for setting, reason in named.items()]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    text = page()
    if "--check" in sys.argv:
        return 0 if FILE.is_file() and FILE.read_text(encoding="utf-8") == text else 1
    FILE.write_text(text, encoding="utf-8")
    return 0


def shortened(setting: str) -> str:
    """What is the same for every optimizer is said once."""
    return "OPTIMIZER.in_backward" if setting.endswith(".in_backward") else setting


def cell(name: str | None, is_named: bool, setting: str) -> str:
    if not name and setting in ("freeze", "peft"):
        return "refused"
    if not name:
        return "–" if is_named else ""
    return f"`{name}`" + (" *" if is_named else "")


if __name__ == "__main__":
    sys.exit(main())
