"""A walk over all methods: each obeys its plain formula, is saved and comes back, is dry-run within the planner's
tolerance, and has a card with formula, source, when to use it, when not, and what it was measured to do here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.estimate.test_cpu import COMBINATIONS, benchmark
from tests.laws.plain import plain_loss_and_gradients
from tests.laws.test_same_gradients import CONFIG, assert_same, corpus, loss_and_gradients, make_run
from tests.unit.engine.test_resume import train_with_crashes
from tests.unit.methods import test_optimizers, test_padding, test_retention
from tests.unit.tiny_runs import assert_same_end, logits, recipe_over, save_model, write_records
from tunewise import api
from tunewise.engine.assemble import assemble, settle
from tunewise.engine.build import build
from tunewise.errors import Conflict
from tunewise.export.reload import saved_run
from tunewise.layers import native
from tunewise.layers.dylora import dylora_layers
from tunewise.methods import (
    ALL,
    FP8LM,
    L2SP,
    SGD,
    Adafactor,
    Adagrad,
    Adam,
    AdamMini,
    AdamW,
    AdamW4bit,
    AdamW8bit,
    Apollo,
    Attention,
    BottleneckAdapter,
    Checkpointing,
    DoRA,
    DyLoRA,
    Freeze,
    Fused,
    Initialize,
    KLToBase,
    Lion,
    LoRA,
    LoRAFA,
    OffloadActivations,
    Packing,
    Pad,
    PagedAdamW8bit,
    Peft,
    Precision,
    QALoRA,
    Quantize,
    RMSProp,
    Stream,
    SupervisedLoss,
    WholeLoss,
    complete,
)
from tunewise.methods.compatibility import conflicts
from tunewise.methods.reading import load_recipe, recipe_from_mapping
from tunewise.recipe import BatchSpec, DataSpec, Method, ModelSpec, Recipe
from tunewise.workload.model import random_model

CARDS = Path(__file__).parents[2] / "docs" / "methods.md"
EFFECTS = Path(__file__).parents[2] / "benchmarks" / "results" / "cpu-2core" / "effects.json"
TOLERANCE = 0.02
"""The dry run's aim for its worst row on a CPU (benchmarks/estimate/cpu.py)."""

ONLY_ON_A_GPU = {PagedAdamW8bit}
FP32 = {"precision": {"compute": "fp32"}}
LORA: dict[str, Any] = {"lora": {"rank": 4}, **FP32}

Law = Callable[[], None]


def formula(*methods: Method, prepare: Callable[[Any], None] = lambda run: None, tolerance: float = 1e-5) -> Law:
    """Return the law that a run with these methods has the loss and gradients of the plain formula."""

    def law() -> None:
        run = make_run(methods, micro_batch_size=3)
        prepare(run)
        assert_same(loss_and_gradients(run), plain_loss_and_gradients(run, CONFIG, corpus()), tolerance)

    return law


def update(method: Method, *others: Method) -> Law:
    """Return the law that an optimizer's steps are the steps of its formula."""
    (mark,) = (mark for mark in test_optimizers.test_formula.pytestmark if mark.name == "parametrize")  # type: ignore[attr-defined]
    rows = {(type(row[0]), str(row[0])): row for row in mark.args[1]}

    def law() -> None:
        for each in (method, *others):
            test_optimizers.test_formula(*rows[type(each), str(each)])

    return law


def initialized() -> None:
    """Drawn values are the model's: what follows is computed with them, and with nothing else."""
    recipe = Recipe(
        model=ModelSpec(name="tiny", weights="random"),
        data=DataSpec(source="made"),
        methods=(Initialize(), Attention(kind="eager"), WholeLoss(), Precision(compute="fp32")),
        batch=BatchSpec(documents=7, micro_batch_size=3),
    )
    cpu = torch.device("cpu")
    run = build(complete(recipe, CONFIG, cpu), random_model(CONFIG, torch.float32, seed=0), cpu)
    assert_same(loss_and_gradients(run), plain_loss_and_gradients(run, CONFIG, corpus()), 1e-5)
    drawn = dict(run.model.named_parameters())["model.layers.0.self_attn.q_proj.weight"]
    assert float(drawn.abs().max()) <= (6 / sum(drawn.shape)) ** 0.5


def in_16_bits() -> None:
    run = make_run((LoRA(rank=4), Precision(compute="bf16")), micro_batch_size=3)
    loss, found = loss_and_gradients(run)
    expected_loss, expected = plain_loss_and_gradients(run, CONFIG, corpus())
    assert loss == pytest.approx(expected_loss, rel=2e-2)
    ours, theirs = (torch.cat([each[name].flatten().double() for name in expected]) for each in (found, expected))
    assert float(torch.cosine_similarity(ours, theirs, dim=0)) > 0.995


def at_rank_two(run: Any) -> None:
    for layer in dylora_layers(run.model).values():
        layer.active_rank = 2


@dataclass(frozen=True)
class Case:
    """How one method is tried.

    Attributes:
        law: fails where the method does not compute what its formula says.
        methods: of the recipe that is trained, saved and dry-run.
        changes: other sections of the trained one.
    """

    law: Law
    methods: dict[str, Any]
    changes: dict[str, Any] = field(default_factory=dict)


CASES: dict[type[Method], Case] = {
    Packing: Case(formula(Packing(row_tokens=64)), {**LORA, "packing": {"row_tokens": 192}}),
    Stream: Case(formula(LoRA(rank=4), Checkpointing(), Stream()), {**LORA, "stream": {}, "checkpointing": {}}),
    Initialize: Case(initialized, {"initialize": {}, **FP32}, {"model": {"weights": "random"}}),
    Quantize: Case(formula(LoRA(rank=4), Quantize(kind="nf4")), {**LORA, "quantize": {"kind": "nf4"}}),
    Freeze: Case(formula(Freeze(train=("*norm*",))), {"freeze": {"train": ["*norm*"]}, **FP32}),
    LoRA: Case(formula(LoRA(rank=4)), LORA),
    DoRA: Case(formula(DoRA(rank=4)), {"dora": {"rank": 4}, **FP32}),
    LoRAFA: Case(formula(LoRAFA(rank=4)), {"lora_fa": {"rank": 4}, **FP32}),
    DyLoRA: Case(formula(DyLoRA(rank=4), prepare=at_rank_two), {"dylora": {"rank": 4}, **FP32}),
    QALoRA: Case(
        formula(QALoRA(rank=4), Quantize(kind="int4")),
        {"qalora": {"rank": 4}, "quantize": {"kind": "int4"}, **FP32},
    ),
    BottleneckAdapter: Case(formula(BottleneckAdapter(size=4)), {"bottleneck": {"size": 4}, **FP32}),
    Peft: Case(formula(Peft(kind="IA3")), {"peft": {"kind": "IA3"}, **FP32}),
    Precision: Case(in_16_bits, {"lora": {"rank": 4}, "precision": {"compute": "bf16"}}),
    Attention: Case(formula(LoRA(rank=4), Attention(kind="per_document")), {**LORA, "attention": {"kind": "sdpa"}}),
    Checkpointing: Case(formula(LoRA(rank=4), Checkpointing()), {**LORA, "checkpointing": {}}),
    OffloadActivations: Case(
        formula(LoRA(rank=4), OffloadActivations(min_bytes=1)), {**LORA, "offload_activations": {"min_bytes": 1}}
    ),
    WholeLoss: Case(formula(LoRA(rank=4), WholeLoss()), {**LORA, "whole_loss": {}}),
    SupervisedLoss: Case(
        formula(LoRA(rank=4), SupervisedLoss(chunk_tokens=5)), {**LORA, "supervised_loss": {"chunk_tokens": 32}}
    ),
    KLToBase: Case(
        lambda: test_retention.test_loss_and_gradients_are_those_of_a_second_model("plain"),
        {**LORA, "kl_to_base": {"beta": 0.5}},
    ),
    SGD: Case(update(SGD(), SGD(momentum=0.9)), {"sgd": {"momentum": 0.9}, **FP32}),
    Adagrad: Case(update(Adagrad()), {"adagrad": {}, **FP32}),
    RMSProp: Case(update(RMSProp(decay=0.9)), {"rmsprop": {}, **FP32}),
    Adam: Case(update(Adam()), {"adam": {}, **FP32}),
    AdamW: Case(update(AdamW()), {"adamw": {}, **FP32}),
    AdamW8bit: Case(update(AdamW8bit()), {"adamw_8bit": {}, **FP32}),
    Adafactor: Case(update(Adafactor()), {"adafactor": {}, **FP32}),
    Lion: Case(update(Lion()), {"lion": {}, **FP32}),
    AdamW4bit: Case(update(AdamW4bit()), {"adamw_4bit": {}, **FP32}),
    AdamMini: Case(update(AdamMini()), {"adam_mini": {}, **FP32}),
    Apollo: Case(update(Apollo()), {"apollo": {"rank": 4}, **FP32}),
    FP8LM: Case(
        update(FP8LM(first_moment="fp32", second_moment="fp32", master="fp32", gradient="fp32")),
        {"fp8_lm": {}, "precision": {"compute": "bf16", "trainable": "same"}},
    ),
    L2SP: Case(
        lambda: test_retention.test_one_step_of_sgd_is_the_gradient_of_the_penalty("lora"),
        {**LORA, "l2_sp": {"strength": 0.5}},
    ),
    Pad: Case(
        lambda: test_padding.test_loss_and_gradients_of_real_entries(WholeLoss(), False, (LoRA(rank=6),)),
        {"lora": {"rank": 6}, "pad": {}, **FP32},
    ),
    Fused: Case(
        formula(LoRA(rank=4), Fused(), Packing(row_tokens=64), Attention(kind="per_document"), SupervisedLoss()),
        {**LORA, "fused": {}},
    ),
}
"""One entry a method: a new method fails this file until it has its own."""

ON_CPU = [method for method in ALL if method not in ONLY_ON_A_GPU]


def compiled(method: type[Method]) -> None:
    if method is Fused and native.compiler() is None:
        pytest.skip("no C++ compiler for the fused kernels")


def test_no_method_is_left_out() -> None:
    assert set(CASES) | ONLY_ON_A_GPU == set(ALL)
    assert len(ALL) == 35
    for method, case in CASES.items():
        assert method.name in case.methods


@pytest.mark.parametrize("method", [method for method in ALL if method in ONLY_ON_A_GPU], ids=lambda m: m.name)
def test_what_cannot_run_here_is_refused_here(method: type[Method]) -> None:
    recipe = recipe_from_mapping({"model": "x", "data": "y", "methods": {method.name: {}}, "device": "cpu"})
    with pytest.raises(Conflict, match="CUDA"):
        raise Conflict(" ".join(conflicts(recipe)))


@pytest.mark.parametrize("method", ON_CPU, ids=lambda method: method.name)
def test_it_obeys_its_plain_formula(method: type[Method]) -> None:
    compiled(method)
    CASES[method].law()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("workload")
    return save_model(folder / "model"), write_records(folder / "records.jsonl", 40)


@pytest.mark.parametrize("method", ON_CPU, ids=lambda method: method.name)
def test_it_is_saved_and_comes_back(method: type[Method], files: tuple[Path, Path], tmp_path: Path) -> None:
    """The result reads back as what was trained, and a killed training ends as one that nobody killed."""
    compiled(method)
    case = CASES[method]
    changes = {"training": {"steps": 4, "learning_rate": 5e-3}, "checkpoints": {"every": 2}, **case.changes}
    recipe = recipe_over(*files, methods=case.methods, **changes)
    result = api.train(recipe, out=tmp_path / "whole")
    assert result.saved.max_difference <= (1e-4 if case.methods["precision"]["compute"] == "fp32" else 3e-2)
    plan = settle(load_recipe(tmp_path / "whole" / "recipe.yaml"))
    again = saved_run(plan, tmp_path / "whole")
    train_with_crashes(recipe, tmp_path / "killed", [("step", 3)])
    assert_same_end(tmp_path / "whole", tmp_path / "killed")
    killed = saved_run(plan, tmp_path / "killed")
    assert torch.equal(logits(killed.model), logits(again.model))
    assert not torch.equal(logits(again.model), logits(assemble(plan).model))


@pytest.mark.parametrize("method", ON_CPU, ids=lambda method: method.name)
def test_the_dry_run_is_within_its_tolerance(method: type[Method], monkeypatch: pytest.MonkeyPatch) -> None:
    compiled(method)
    monkeypatch.setitem(COMBINATIONS, method.name, (CASES[method].methods, {}))
    case = benchmark.Case("llama", method.name, depth=4, rows=3, length=160, supervised=0.6, micro_batches=1)
    row = benchmark.run_case(case)
    assert row.left_out is None
    for what in ("step", "evaluation", "save"):
        assert row.predicted[what] == pytest.approx(row.measured[what], rel=TOLERANCE), what


PARTS = ("Formula", "Source: ", "When to use: ", "When not: ", "Measured here: ")


@pytest.mark.parametrize("method", ALL, ids=lambda method: method.name)
def test_its_card_says_everything(method: type[Method]) -> None:
    after = CARDS.read_text(encoding="utf-8").partition(f"\n## `{method.name}`\n")[2]
    card = " ".join(after.partition("\n## ")[0].split())
    for part in PARTS:
        says = re.split("|".join(PARTS), card.partition(part)[2])[0]
        assert len(says) > 15, f"the card of {method.name} has no '{part.strip()}'"


def test_the_measured_effects_are_the_benchmarks() -> None:
    measured = {row["method"] for row in json.loads(EFFECTS.read_text(encoding="utf-8"))["rows"]}
    assert measured == {method.name for method in ALL}
