"""Random recipes for hypothesis: valid ones, with every method and every field."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from tunewise.methods import BY_NAME
from tunewise.methods.reading import method_from_mapping
from tunewise.recipe import (
    BatchSpec,
    CheckpointSpec,
    DataSpec,
    EvaluationSpec,
    Method,
    ModelSpec,
    Recipe,
    ReplaySpec,
    TrainingSpec,
)

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=12)
COUNTS = st.integers(1, 10**9)
SHARES = st.floats(0.0, 1.0)
BELOW_ONE = st.floats(0.0, 1.0, exclude_max=True)
POSITIVE = st.floats(0.0, 1e6, exclude_min=True)
SOME_WORDS = st.lists(WORDS, min_size=1, max_size=3).map(tuple)
NUMBER_FORMATS = st.sampled_from(["fp32", "bf16", "fp16", "fp8", "fp8_e5m2"])
IN_BACKWARD = {"in_backward": st.booleans()}
ADAM = {**IN_BACKWARD, "beta1": BELOW_ONE, "beta2": BELOW_ONE, "eps": POSITIVE}

LOW_RANK: dict[str, st.SearchStrategy[Any]] = {
    "rank": COUNTS,
    "alpha": st.none() | POSITIVE,
    "dropout": BELOW_ONE,
    "target_modules": WORDS | SOME_WORDS,
    "exclude_modules": WORDS | SOME_WORDS,
    "layers_to_transform": st.none() | st.lists(st.integers(0, 99), max_size=3).map(tuple),
    "modules_to_save": SOME_WORDS,
}

OPTIONS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "packing": {"row_tokens": st.none() | COUNTS, "pad_to": COUNTS},
    "quantize": {"kind": st.sampled_from(["nf4", "fp4"]), "double_quant": st.none() | st.booleans()},
    "stream": {"source": st.sampled_from(["disk", "host"]), "folder": st.none() | WORDS},
    "initialize": {
        "kind": st.sampled_from(["normal", "uniform", "glorot", "he", "orthogonal", "sparse"]),
        "gain": POSITIVE,
        "std": POSITIVE,
        "num_nonzero": COUNTS,
    },
    "offload_activations": {
        "to": st.sampled_from(["disk", "host"]),
        "min_bytes": COUNTS,
        "folder": st.none() | WORDS,
    },
    "pad": dict.fromkeys(("vocabulary", "rank", "length"), st.none() | COUNTS),
    "fused": dict.fromkeys(("norms", "mlp", "attention", "loss"), st.booleans()),
    "freeze": {"train": SOME_WORDS},
    "lora": {
        **LOW_RANK,
        "use_rslora": st.booleans(),
        "lora_plus_ratio": st.none() | POSITIVE,
        "init": st.sampled_from(["kaiming", "gaussian", "pissa", "loftq"]),
    },
    "bottleneck": {
        "size": COUNTS,
        "after": st.sampled_from([("attention",), ("mlp",), ("attention", "mlp")]),
        "activation": st.sampled_from(["relu", "gelu", "silu"]),
        "scale": POSITIVE,
        "target_modules": st.none() | SOME_WORDS,
    },
    "dora": LOW_RANK,
    "lora_fa": LOW_RANK,
    "qalora": LOW_RANK,
    "dylora": {
        **LOW_RANK,
        "rank": st.integers(8, 64),
        "ranks": st.none() | st.lists(st.integers(1, 8), min_size=1, max_size=3).map(tuple),
        "scale_by_rank": st.booleans(),
    },
    "peft": {"kind": st.just("IA3"), "options": st.dictionaries(WORDS, st.none() | st.integers() | WORDS, max_size=2)},
    "precision": {
        "compute": st.sampled_from(["fp32", "tf32", "bf16", "fp16"]),
        "trainable": st.sampled_from(["fp32", "same"]),
    },
    "attention": {"kind": st.sampled_from(["per_document", "sdpa", "eager", "flash"])},
    "checkpointing": {"every": COUNTS, "policy": st.sampled_from(["full", "selective"])},
    "whole_loss": {},
    "supervised_loss": {"chunk_tokens": COUNTS},
    "kl_to_base": {"beta": POSITIVE, "chunk_tokens": COUNTS},
    "l2_sp": {"strength": POSITIVE},
    "sgd": {**IN_BACKWARD, "momentum": BELOW_ONE, "nesterov": st.booleans()},
    "adagrad": {**IN_BACKWARD, "eps": POSITIVE},
    "rmsprop": {**IN_BACKWARD, "decay": BELOW_ONE, "momentum": BELOW_ONE, "nesterov": st.booleans(), "eps": POSITIVE},
    "adam": {**ADAM, "fused": st.booleans()},
    "adamw": {**ADAM, "fused": st.booleans()},
    "adamw_8bit": ADAM,
    "paged_adamw_8bit": ADAM,
    "adafactor": {**IN_BACKWARD, "decay": st.floats(-1.0, 0.0), "clip": st.floats(1.0, 10.0)},
    "lion": {**IN_BACKWARD, "beta1": BELOW_ONE, "beta2": BELOW_ONE},
    "adamw_4bit": ADAM,
    "adam_mini": ADAM,
    "apollo": {
        **ADAM,
        "rank": COUNTS,
        "scale": st.sampled_from(["channel", "tensor"]),
        "alpha": st.none() | POSITIVE,
        "update_every": COUNTS,
    },
    "fp8_lm": {
        **ADAM,
        **dict.fromkeys(("gradient", "first_moment", "second_moment", "master"), NUMBER_FORMATS),
        "threshold": SHARES,
        "window": COUNTS,
    },
}
REQUIRED = {"freeze": {"train"}, "peft": {"kind"}}


@st.composite
def methods(draw: st.DrawFn) -> tuple[Method, ...]:
    """Draw some methods, in any order, each with some of its options."""
    names = draw(st.lists(st.sampled_from(sorted(BY_NAME)), unique=True, max_size=6))
    found = []
    for name in names:
        options = {
            option: draw(values)
            for option, values in OPTIONS[name].items()
            if option in REQUIRED.get(name, ()) or draw(st.booleans())
        }
        found.append(method_from_mapping(name, options))
    return tuple(found)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Draw a recipe that is valid by itself; its methods may contradict each other."""
    end = draw(st.sampled_from(["epochs", "steps", "tokens", None]))
    keep_best = draw(st.booleans())
    size = draw(st.sampled_from(["documents", "supervised_tokens", "gradient_accumulation_steps", None]))
    return Recipe(
        model=ModelSpec(
            name=draw(WORDS),
            weights=draw(st.sampled_from(["pretrained", "random"])),
            tokenizer=draw(st.none() | WORDS),
            chat_template=draw(st.none() | WORDS),
            resize_vocabulary=draw(st.booleans()),
        ),
        data=DataSpec(
            source=draw(WORDS),
            format=draw(st.sampled_from(["auto", "alpaca", "messages", "text"])),
            fields=draw(st.dictionaries(WORDS, WORDS, max_size=2)),
            validation_fraction=draw(BELOW_ONE),
            max_length=draw(st.none() | COUNTS),
            too_long=draw(st.sampled_from([None, "cut", "drop", "split", "error"])),
            system_prompt=draw(st.none() | WORDS),
            replay=draw(st.none() | st.builds(ReplaySpec, fraction=st.floats(0.001, 0.5), source=WORDS)),
        ),
        objective=draw(st.sampled_from(["sft", "continue", "pretrain"])),
        methods=draw(st.none() | methods()),
        batch=BatchSpec(
            micro_batch_size=draw(st.none() | st.integers(1, 64)),
            **({} if size is None else {size: draw(st.integers(1, 64))}),
        ),
        training=TrainingSpec(
            learning_rate=draw(st.none() | POSITIVE),
            schedule=draw(st.sampled_from(["linear", "cosine", "constant", "wsd", "inverse_sqrt"])),
            warmup=draw(st.floats(0.0, 1000.0)),
            final_learning_rate=draw(SHARES),
            weight_decay=draw(POSITIVE),
            max_grad_norm=draw(st.none() | POSITIVE),
            spike=draw(st.none() | POSITIVE),
            oom=draw(st.sampled_from(["halve", "stop"])),
            **({} if end is None else {end: draw(st.integers(1, 1000))}),
        ),
        evaluation=EvaluationSpec(
            every=draw(st.none() | COUNTS),
            patience=draw(st.none() | COUNTS),
            keep_best=keep_best,
            general_text=draw(st.none() | WORDS),
            general_tokens=draw(COUNTS),
            forgetting_budget=draw(st.none() | SHARES) if keep_best else None,
        ),
        checkpoints=CheckpointSpec(every=draw(st.none() | COUNTS), keep=draw(COUNTS)),
        seed=draw(st.integers(0, 2**63 - 1)),
        device=draw(st.sampled_from(["auto", "cpu"])),
        report_to=draw(st.sampled_from([(), ("tensorboard",), ("wandb", "mlflow")])),
        out=draw(st.none() | WORDS),
    )
