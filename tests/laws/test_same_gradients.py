"""The law of the step: a method that does not change the learning problem changes neither its loss nor its gradients.

Every learning problem (full fine-tuning, LoRA, LoRA over NF4, ...) is computed plainly: eager attention, whole logits,
no checkpointing, one padded micro-batch, fp32. Then every other method is added alone, in pairs, and under several
splits into micro-batches; loss and gradients must stay what they were.
"""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from tunewise.engine.build import build
from tunewise.engine.step import gradients
from tunewise.layers import native
from tunewise.methods import (
    Attention,
    BottleneckAdapter,
    Checkpointing,
    DoRA,
    DyLoRA,
    Freeze,
    Fused,
    LoRA,
    LoRAFA,
    OffloadActivations,
    Packing,
    Peft,
    Precision,
    QALoRA,
    Quantize,
    SupervisedLoss,
    WholeLoss,
    complete,
)
from tunewise.methods.method import Run
from tunewise.recipe import BatchSpec, DataSpec, Fidelity, Method, ModelSpec, Recipe
from tunewise.workload.corpus import Corpus
from tunewise.workload.model import random_model

CPU = torch.device("cpu")
CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)

PROBLEMS: dict[str, tuple[Method, ...]] = {
    "full": (),
    "lora": (LoRA(rank=4),),
    "rslora on attention": (LoRA(rank=4, use_rslora=True, target_modules=("q_proj", "v_proj")),),
    "lora over nf4": (LoRA(rank=4), Quantize(kind="nf4")),
    "lora over int8": (LoRA(rank=4), Quantize(kind="int8")),
    "lora, products in int8": (LoRA(rank=4), Quantize(kind="int8", compute="int8")),
    "lora, products in fp8": (LoRA(rank=4), Quantize(kind="fp8", compute="fp8")),
    "dora over nf4": (DoRA(rank=4), Quantize(kind="nf4")),
    "lora-fa": (LoRAFA(rank=4),),
    "bottleneck, lora and norms": (BottleneckAdapter(size=4), LoRA(rank=4), Freeze(train=("*norm*",))),
    "qalora over int3": (QALoRA(rank=4), Quantize(kind="int3")),
    "dylora over int8": (DyLoRA(rank=4), Quantize(kind="int8")),
    "norms and biases": (Freeze(train=("*norm*",)),),
    "lora and norms": (LoRA(rank=4), Freeze(train=("*norm*",))),
    "ia3": (Peft(kind="IA3"),),
}
SAME: dict[str, Method] = {
    "packing": Packing(row_tokens=64),
    "per document": Attention(kind="per_document"),
    "sdpa": Attention(kind="sdpa"),
    "checkpoint all": Checkpointing(),
    "checkpoint every 2nd": Checkpointing(every=2),
    "checkpoint selective": Checkpointing(policy="selective"),
    "supervised loss": SupervisedLoss(),
    "chunked loss": SupervisedLoss(chunk_tokens=5),
    "activations on disk": OffloadActivations(min_bytes=1),
    "fused": Fused(),
}
SPLITS = (1, 2, 3)
PLAIN: tuple[Method, ...] = (Attention(kind="eager"), WholeLoss(), Precision(compute="fp32"))
TOLERANCE = 1e-5
TOLERANCES = {"lora, products in int8": 1e-2, "lora, products in fp8": 4e-2}
"""Ways that differ by rounding carry a few numbers over the edge between two of 127 steps, or of the eight between two
powers of two. Also below: bit-equal."""

COMBINATIONS: list[tuple[str, ...]] = [(name,) for name in SAME]
COMBINATIONS += [pair for pair in itertools.combinations(SAME, 2) if SAME[pair[0]].name != SAME[pair[1]].name]
CASES = [(problem, combination) for problem in PROBLEMS for combination in COMBINATIONS]


@cache
def corpus() -> Corpus:
    generator = np.random.default_rng(0)
    lengths = [3, 21, 8, 40, 2, 13, 17]
    documents = [(generator.integers(0, 97, n).astype(np.int32), generator.random(n) < 0.6) for n in lengths]
    return Corpus.from_documents(documents, [f"made:{i}" for i in range(len(lengths))])


def make_run(methods: tuple[Method, ...], micro_batch_size: int, device: torch.device = CPU) -> Run:
    names = {method.name for method in methods}
    slots = {method.slot for method in methods}
    plain = tuple(method for method in PLAIN if method.name not in names and method.slot not in slots)
    recipe = Recipe(
        model=ModelSpec(name="tiny"),
        data=DataSpec(source="made"),
        methods=(*methods, *plain),
        batch=BatchSpec(documents=7, micro_batch_size=micro_batch_size),
    )
    model = random_model(CONFIG, torch.float32, seed=0)
    run = build(complete(recipe, CONFIG, device), model, device)
    with torch.no_grad():  # leave the point where B is zero, at which A has no gradient
        generator = torch.Generator().manual_seed(1)
        for name, parameter in run.trainable():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return run


def loss_and_gradients(run: Run) -> tuple[float, dict[str, Tensor]]:
    documents = range(len(corpus()))
    scaler = torch.amp.GradScaler(run.device.type, enabled=False)
    batches = [run.layout.build(rows, corpus()) for rows in run.layout.micro_batches(documents, corpus().lengths)]
    loss = float(gradients(run, batches, int(corpus().num_supervised.sum()), scaler))
    found = {}
    for name, parameter in run.trainable():
        assert parameter.grad is not None, f"{name} has no gradient"
        found[name] = parameter.grad
    return loss, found


@cache
def reference(problem: str) -> tuple[float, dict[str, Tensor]]:
    return loss_and_gradients(make_run(PROBLEMS[problem], micro_batch_size=7))


Gradients = tuple[float, dict[str, Tensor]]


def assert_same(found: Gradients, expected: Gradients, tolerance: float) -> None:
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert found[1].keys() == expected[1].keys()
    scale = max(float(gradient.norm()) for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        error = float((found[1][name] - gradient).norm()) / max(float(gradient.norm()), 1e-3 * scale)
        assert error < tolerance, f"gradient of {name} is off by {error:.1e}"


@pytest.mark.parametrize(("problem", "combination"), CASES, ids=[f"{p}-{'+'.join(c)}" for p, c in CASES])
def test_methods_alone_and_in_pairs(problem: str, combination: tuple[str, ...]) -> None:
    if "fused" in combination and native.compiler() is None:
        pytest.skip("no C++ compiler for the fused kernels")
    methods = (*PROBLEMS[problem], *(SAME[name] for name in combination))
    assert all(SAME[name].fidelity in (Fidelity.EXACT, Fidelity.ROUNDING) for name in combination)
    split = SPLITS[CASES.index((problem, combination)) % len(SPLITS)]
    assert_same(loss_and_gradients(make_run(methods, split)), reference(problem), TOLERANCES.get(problem, TOLERANCE))


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("micro_batch_size", range(1, 7))
@pytest.mark.parametrize("is_packed", [False, True])
def test_every_split_of_the_global_batch(problem: str, micro_batch_size: int, is_packed: bool) -> None:
    methods = (*PROBLEMS[problem], *((Packing(row_tokens=48),) if is_packed else ()))
    assert_same(
        loss_and_gradients(make_run(methods, micro_batch_size)), reference(problem), TOLERANCES.get(problem, TOLERANCE)
    )


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_mean_of_means_fails_this_law(problem: str) -> None:
    """The well-known bug: averaging the micro-batches' means. If it passed, the law would prove nothing."""
    run = make_run(PROBLEMS[problem], micro_batch_size=1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    rows = run.layout.micro_batches(range(len(corpus())), corpus().lengths)
    batches = [run.layout.build(part, corpus()) for part in rows]
    batches = [batch for batch in batches if batch.num_supervised]
    losses = [float(gradients(run, [batch], batch.num_supervised * len(batches), scaler)) for batch in batches]
    found = {name: parameter.grad for name, parameter in run.trainable() if parameter.grad is not None}
    with pytest.raises(AssertionError):
        assert_same((sum(losses), found), reference(problem), TOLERANCES.get(problem, TOLERANCE))


@pytest.mark.parametrize("problem", PROBLEMS)
def test_checkpointing_is_bit_equal(problem: str) -> None:
    """Recomputing runs the same kernels on the same numbers, so not even the last bit may differ."""
    expected = reference(problem)
    for checkpointing in (Checkpointing(), Checkpointing(every=2), Checkpointing(policy="selective")):
        loss, found = loss_and_gradients(make_run((*PROBLEMS[problem], checkpointing), micro_batch_size=7))
        assert loss == expected[0]
        assert all(torch.equal(found[name], gradient) for name, gradient in expected[1].items())


def test_the_number_of_cases_does_not_fall() -> None:
    assert len(PROBLEMS) == 15
    assert len(COMBINATIONS) == 10 + 40
    assert len(CASES) == 750
