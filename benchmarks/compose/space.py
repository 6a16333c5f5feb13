"""Random recipes from the whole space of methods, over small models of many architectures.

Every slot is drawn for itself, so contradictions come up as they would come up in a user's hands. A method that is not
described here (a new one) takes part with its default options.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from benchmarks.estimate.cpu_cases import ARCHITECTURES, config_of
from transformers import PretrainedConfig

from tunewise.methods import ALL, BY_NAME
from tunewise.methods.low_rank import LowRank
from tunewise.recipe import Slot

Options = dict[str, Any]

KINDS_OF_PEFT: dict[str, Options] = {
    "IA3": {},
    "VERA": {"r": 8, "target_modules": "all-linear"},
    "ADALORA": {"init_r": 4, "target_r": 2, "target_modules": "all-linear"},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "OFT": {"oft_block_size": 4, "target_modules": "all-linear"},
    "LOHA": {"r": 4, "target_modules": "all-linear"},
    "HRA": {"r": 4, "target_modules": "all-linear"},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "P_TUNING": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
}
"""Kinds that have a dry run, with options for small layers."""

LLAMAS = ("llama", "mistral")
"""What every kind above fits; where peft has no layer for an architecture, that is an error of input, no conflict."""

PROMPTS = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING")

LOW_RANK = tuple(method.name for method in ALL if issubclass(method, LowRank))

SHARES = {
    Slot.DATA: 0.35,
    Slot.WEIGHTS: 0.35,
    Slot.PRECISION: 0.8,
    Slot.ATTENTION: 0.6,
    Slot.ACTIVATIONS: 0.4,
    Slot.LOSS: 0.5,
    Slot.OPTIMIZER: 0.7,
    Slot.STORAGE: 0.08,
}
"""How often a slot is filled by name; the adapters' slot has its own rule."""

COMPUTE = ("fp32",) * 8 + ("bf16",) * 8 + ("fp16",) * 3 + ("tf32",)
"""Dtypes, as often as they are drawn."""

TWICE = 0.03
"""How often a slot gets two methods."""

NUM_ADAPTERS = ((0, 0.2), (1, 0.5), (2, 0.22), (3, 0.08))

MENDED = 0.85
"""How often contradictions that a reader of the method cards would see are taken back."""

SECOND_LOW_RANK = 0.15
"""How often a second low-rank update is left where the draw has put it."""


@dataclass(frozen=True)
class Case:
    """One recipe as plain data, and the shape of its batches."""

    number: int
    architecture: str
    depth: int
    methods: dict[str, Options]
    training: Options
    rows: int
    length: int
    micro_batches: int

    def config(self) -> PretrainedConfig:
        """Return the configuration of the model, without dropout."""
        return config_of(self.architecture, self.depth)

    def mapping(self) -> dict[str, Any]:
        """Return the recipe as it would stand in a file."""
        return {
            "model": {"name": f"tiny/{self.architecture}", "weights": "random"},
            "data": {"source": "none"},
            "methods": self.methods,
            "batch": {"documents": self.rows * self.micro_batches, "micro_batch_size": self.rows},
            "training": {"steps": 3, "learning_rate": 1e-3, **self.training},
            "device": "cpu",
        }


def draw_case(seed: int, number: int) -> Case:
    """Return case `number` of a seed, always the same."""
    draw = random.Random(f"{seed} {number}")
    architecture = draw.choice(sorted(ARCHITECTURES))
    names = [name for slot in Slot for name in _names_in(slot, draw)]
    if "stream" in names and draw.random() < MENDED:
        names = [name for name in names if BY_NAME[name].slot not in (Slot.ADAPTER, Slot.ACTIVATIONS)]
        names += ["lora", "checkpointing"]
    if "qalora" in names and "quantize" not in names and draw.random() < MENDED:
        names.append("quantize")
    methods = {name: _options(name, draw, architecture) for name in names}
    if draw.random() < MENDED:
        _mend(methods, draw)
    peft = methods.get("peft")
    if peft is not None and peft["kind"] not in PROMPTS and architecture not in LLAMAS:
        architecture = draw.choice(LLAMAS)
        methods = {name: _options(name, draw, architecture) if name == "freeze" else methods[name] for name in methods}
    in_backward = any(options.get("in_backward") for options in methods.values())
    return Case(
        number=number,
        architecture=architecture,
        depth=draw.choice((2, 3, 4)),
        methods=methods,
        training={"max_grad_norm": None} if in_backward and draw.random() < 0.9 else {},
        rows=draw.choice((1, 2, 3)),
        length=draw.choice((48, 64, 96)),
        micro_batches=1 if in_backward else draw.choice((1, 1, 2)),
    )


def _mend(methods: dict[str, Options], draw: random.Random) -> None:
    """Take back what a reader of the method cards would not have written."""
    if "qalora" in methods and "quantize" in methods:
        methods["quantize"] = {"kind": draw.choice(("int4", "int3", "int2")), "block_size": 32}
    if "lora" in methods:
        impossible = {"pissa"} if "quantize" in methods else {"loftq"}
        impossible |= {"pissa", "loftq"} if "stream" in methods else set()
        if methods["lora"]["init"] in impossible:
            methods["lora"]["init"] = "kaiming"
    if "pad" in methods and methods.keys() & {"qalora", "dylora"}:
        methods["pad"] = {"rank": None}
    if "stream" in methods and "checkpointing" in methods:
        methods["checkpointing"]["every"] = 1
    if methods.get("precision", {}).get("compute") == "fp16":
        methods["precision"]["trainable"] = "fp32"


def _names_in(slot: Slot, draw: random.Random) -> list[str]:
    known = [method.name for method in ALL if method.slot == slot and method.name != "paged_adamw_8bit"]
    if not known:
        return []
    if slot == Slot.ADAPTER:
        counts, weights = zip(*NUM_ADAPTERS, strict=True)
        names = draw.sample(known, min(len(known), draw.choices(counts, weights)[0]))
        doubled = [name for name in names if name in LOW_RANK][1:]
        return [name for name in names if name not in doubled or draw.random() < SECOND_LOW_RANK]
    count = int(draw.random() < SHARES.get(slot, 0.3)) + int(draw.random() < TWICE)
    return draw.sample(known, min(len(known), count))


def _options(name: str, draw: random.Random, architecture: str) -> Options:
    """Return some options of a method, small enough for the models."""
    choose = draw.choice
    low_rank: Options = {"rank": choose((2, 4, 8))}
    if draw.random() < 0.2:
        low_rank["target_modules"] = choose((r".*(q_proj|c_attn|query_key_value|qkv_proj)", "all-linear"))
    if draw.random() < 0.15:
        low_rank["layers_to_transform"] = [1]
    if draw.random() < 0.1:
        low_rank["dropout"] = 0.1
    drawn: dict[str, Options] = {
        "packing": {"row_tokens": 192, "pad_to": choose((1, 64))},
        "quantize": _quantize(draw),
        "lora": low_rank
        | {
            "use_rslora": draw.random() < 0.3,
            "lora_plus_ratio": choose((None, None, 8.0)),
            "init": choose(("kaiming", "kaiming", "gaussian", "pissa", "loftq")),
        },
        "dora": low_rank,
        "lora_fa": low_rank,
        "qalora": low_rank,
        "dylora": low_rank | {"scale_by_rank": draw.random() < 0.5, "ranks": choose((None, [1, 2]))},
        "freeze": {"train": [choose(_patterns(architecture))]},
        "bottleneck": {"size": choose((4, 16)), "after": choose((["mlp"], ["attention", "mlp"]))},
        "precision": {
            "compute": choose(COMPUTE),
            "trainable": choose(("fp32", "same")),
        },
        "attention": {"kind": choose(("per_document", "sdpa", "eager") * 6 + ("flash",))},
        "checkpointing": {"every": choose((1, 1, 2)), "policy": choose(("full", "selective"))},
        "supervised_loss": {"chunk_tokens": choose((16, 1024))},
        "sgd": {"momentum": choose((0.0, 0.9))},
    }
    if name == "peft":
        kind = choose(sorted(KINDS_OF_PEFT))
        return {"kind": kind, "options": KINDS_OF_PEFT[kind]}
    options = dict(drawn.get(name, {}))
    if "in_backward" in BY_NAME[name].model_fields and draw.random() < 0.3:
        options["in_backward"] = True
    return options


def _patterns(architecture: str) -> tuple[str, ...]:
    """Return patterns that match parameters of an architecture: norms, biases, norms of a block, a whole block."""
    norm = "ln_" if architecture == "gpt2" else "layer_norm" if architecture == "opt" else "norm"
    bias = ("*bias",) if architecture in ("gpt2", "gpt_neox", "opt", "qwen2") else ()
    norm = "layernorm" if architecture == "falcon" else norm
    return (f"*{norm}*", f"*.1.*{norm}*", "*.1.*", *bias)


def _quantize(draw: random.Random) -> Options:
    kind = draw.choice(("nf4", "fp4", "int8", "fp8", "int4", "int3", "int2"))
    options: Options = {"kind": kind}
    if kind in ("nf4", "fp4") and draw.random() < 0.3:
        options["double_quant"] = False
    if kind in ("int8", "fp8"):
        options["compute"] = draw.choice(("dequantize", kind))
        if options["compute"] == "int8" and draw.random() < 0.5:
            options["head_compute"] = "int8"
    elif draw.random() < 0.4:
        options["block_size"] = draw.choice((32, 64, 128))
    return options
