"""The method `fused`: what it replaces, the whole fast path against the plain one, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import LlamaForCausalLM, MistralConfig, Qwen2Config, Qwen3Config

from tests.laws.test_same_gradients import (
    CONFIG,
    CPU,
    PROBLEMS,
    TOLERANCE,
    TOLERANCES,
    assert_same,
    corpus,
    loss_and_gradients,
    make_run,
)
from tests.laws.test_same_gradients import reference as plain_reference
from tests.unit.tiny_runs import recipe_over, save_model, write_records
from tunewise.engine.assemble import assemble, settle
from tunewise.engine.build import build
from tunewise.engine.device_profile import CPU as CPU_PROFILE
from tunewise.engine.dry_run import BatchShape, dry_run
from tunewise.errors import Conflict
from tunewise.export.finish import save_merged, save_result
from tunewise.layers import native
from tunewise.layers.blocks import FusedAttention, FusedMLP
from tunewise.layers.fused import FusedRMSNorm
from tunewise.layers.head import base_model_of
from tunewise.layers.twins import own_modules
from tunewise.methods import (
    Attention,
    Checkpointing,
    DoRA,
    Freeze,
    Fused,
    LoRA,
    Packing,
    Precision,
    Quantize,
    SupervisedLoss,
    complete,
)
from tunewise.methods import fused as fused_module
from tunewise.methods.reading import recipe_from_mapping
from tunewise.recipe import BatchSpec, DataSpec, Method, ModelSpec, Recipe
from tunewise.workload.model import load_tokenizer, random_model

pytestmark = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler")

FAST: tuple[Method, ...] = (
    Fused(),
    Packing(row_tokens=64),
    Attention(kind="per_document"),
    SupervisedLoss(chunk_tokens=5),
)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("checkpointing", [None, Checkpointing(), Checkpointing(policy="selective")])
def test_the_whole_fast_path(problem: str, checkpointing: Method | None) -> None:
    more = () if checkpointing is None else (checkpointing,)
    run = make_run((*PROBLEMS[problem], *FAST, *more), micro_batch_size=2)
    assert_same(loss_and_gradients(run), plain_reference(problem), TOLERANCES.get(problem, TOLERANCE))


def kinds(fused: Fused) -> dict[str, int]:
    model = make_run((LoRA(rank=4), fused, *FAST[1:]), micro_batch_size=2).model
    wanted = (FusedRMSNorm, FusedMLP, FusedAttention)
    return {kind.__name__: sum(type(m) is kind for m in model.modules()) for kind in wanted}


def test_what_is_replaced() -> None:
    assert kinds(Fused()) == {"FusedRMSNorm": 7, "FusedMLP": 3, "FusedAttention": 3}
    assert kinds(Fused(norms=False, mlp=False, attention=False)) == dict.fromkeys(kinds(Fused()), 0)


@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_16_bit_weights_beside_trained_fp32_ones_are_compared_as_they_compute(compute: Literal["bf16", "fp16"]) -> None:
    methods = (DoRA(rank=4), Freeze(train=("*norm*",)), Precision(compute=compute, trainable="fp32"), *FAST)
    run = make_run(methods, micro_batch_size=2)
    assert any(isinstance(module, FusedMLP) for module in run.model.modules())
    loss, found = loss_and_gradients(run)
    assert loss == pytest.approx(loss_and_gradients(make_run(methods[:2], 2))[0], rel=2e-2)
    assert all(bool(gradient.any()) for gradient in found.values())


def test_names_of_what_is_learnt_stay() -> None:
    names = [
        [name for name, _ in make_run((LoRA(rank=4), *methods), micro_batch_size=2).trainable()]
        for methods in ((), FAST)
    ]
    assert names[0] == names[1]


def test_bf16_stays_near_fp32() -> None:
    """No farther from fp32 than the unfused path in bf16 is, but for a half of it."""
    runs = {}
    for name, methods in {"fp32": (), "bf16": FAST[1:], "fused": FAST}.items():
        compute = Precision(compute="fp32" if name == "fp32" else "bf16")
        runs[name] = loss_and_gradients(make_run((LoRA(rank=4), compute, *methods), micro_batch_size=2))
    truth = runs["fp32"][1]

    def error(name: str) -> float:
        squares = [(runs[name][1][key] - gradient).square().sum() for key, gradient in truth.items()]
        return float(torch.stack(squares).sum().sqrt())

    assert error("fused") < 1.5 * error("bf16")


def test_a_model_can_still_generate() -> None:
    run = make_run((LoRA(rank=4), *FAST), micro_batch_size=2)
    plain = make_run((LoRA(rank=4),), micro_batch_size=2)
    prompt = torch.arange(5, 11)[None]
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": True, "eos_token_id": None, "pad_token_id": 0}
    run.documents.kernels = None
    for each in (run, plain):
        each.model.eval()
        base_model_of(each.model).set_attn_implementation("sdpa")
    assert isinstance(run.model, LlamaForCausalLM)
    assert isinstance(plain.model, LlamaForCausalLM)
    assert torch.equal(run.model.generate(prompt, **options), plain.model.generate(prompt, **options))


def test_a_models_own_modules_come_back_for_a_while() -> None:
    run, plain = (make_run((LoRA(rank=4), *methods), micro_batch_size=2) for methods in (FAST, ()))
    run.model.eval()
    before = {name: id(module) for name, module in run.model.named_modules()}
    ids = torch.arange(5, 11)[None]
    for each in (run, plain):
        base_model_of(each.model).set_attn_implementation("eager")
    with own_modules(run.model), torch.no_grad():
        kinds = [type(module).__name__ for _, module in run.model.named_modules()]
        assert torch.equal(run.model(ids).logits, plain.model.eval()(ids).logits)
    assert [kinds.count(name) for name in ("LlamaRMSNorm", "LlamaMLP", "LlamaAttention")] == [7, 3, 3]
    assert {name: id(module) for name, module in run.model.named_modules()} == before


@pytest.mark.parametrize("methods", [{}, {"lora": {"rank": 4}}], ids=["full", "merged"])
def test_a_whole_model_is_saved_as_what_it_will_compute(methods: dict[str, Any], tmp_path: Path) -> None:
    records = write_records(tmp_path / "records.jsonl")
    methods = {"fused": {}, "precision": {"compute": "fp32"}, **methods}
    recipe = recipe_over(save_model(tmp_path / "model"), records, methods=methods)
    run = assemble(settle(recipe_from_mapping(recipe)))
    with torch.no_grad():
        for _, parameter in run.trainable():
            parameter.add_(0.01)
    tokenizer = load_tokenizer(run.recipe.model)
    saved = (
        save_merged(run, tokenizer, tmp_path / "out")
        if "lora" in methods
        else save_result(run, tokenizer, tmp_path / "out")
    )
    assert saved.kind == "model"
    assert saved.max_difference < 1e-5


SMALL = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "sliding_window": 6,
}  # fmt: skip
FAMILIES = {
    "qwen2, biases": Qwen2Config(use_sliding_window=True, max_window_layers=0, **SMALL),
    "mistral": MistralConfig(head_dim=16, **SMALL),
    "qwen3, norms of heads": Qwen3Config(head_dim=16, use_sliding_window=True, max_window_layers=0, **SMALL),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_biases_and_windows_of_other_families(family: str) -> None:
    config = FAMILIES[family]
    results = []
    for methods in ((Attention(kind="eager"),), FAST):
        recipe = Recipe(
            model=ModelSpec(name="tiny"),
            data=DataSpec(source="made"),
            methods=(LoRA(rank=4), Precision(compute="fp32"), *methods),
            batch=BatchSpec(documents=7, micro_batch_size=2),
        )
        run = build(complete(recipe, config, CPU), random_model(config, torch.float32, seed=0), CPU)
        with torch.no_grad():
            for name, parameter in run.trainable():
                if "lora_B" in name:
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        results.append(loss_and_gradients(run))
    assert_same(results[1], results[0], 1e-5)


def test_packed_layers_without_parameters() -> None:
    """An MLP whose weights are all packed has no parameter to ask for a dtype."""
    methods = (Freeze(train=("*norm*",)), Quantize(kind="int8"))
    runs = [make_run((*methods, *more), micro_batch_size=2) for more in (FAST, ())]
    assert any(isinstance(module, FusedMLP) for module in runs[0].model.modules())
    assert_same(loss_and_gradients(runs[0]), loss_and_gradients(runs[1]), 1e-5)


def test_a_norm_that_is_another_one_is_refused() -> None:
    model = random_model(CONFIG, torch.float32, seed=0)
    norm = model.model.norm
    norm.forward = lambda hidden: (1.0 + norm.weight) * hidden
    recipe = Recipe(
        model=ModelSpec(name="tiny"),
        data=DataSpec(source="made"),
        methods=(LoRA(rank=4), Fused()),
        batch=BatchSpec(documents=7, micro_batch_size=1),
    )
    with pytest.raises(Conflict, match="something else than its kernel"):
        build(complete(recipe, CONFIG, CPU), model, CPU)


def test_without_a_compiler_a_wish_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise Conflict("fused: there is no C++ compiler")

    monkeypatch.setattr(fused_module, "library", refuse)
    with pytest.raises(Conflict, match="no C\\+\\+ compiler"):
        make_run((LoRA(rank=4), Fused()), micro_batch_size=2)


def test_a_training_without_the_default_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = recipe_over(save_model(tmp_path / "model"), write_records(tmp_path / "records.jsonl"))
    fast = settle(recipe_from_mapping(recipe))
    assert fast.recipe.get(Fused) is not None
    assert not any("without the compiled kernels" in note for note in assemble(fast).notes)
    monkeypatch.setattr(native, "why_not", lambda: "there is no compiler")
    slow = settle(recipe_from_mapping(recipe))
    assert slow.recipe.get(Fused) is None
    assert any("without the compiled kernels" in n and "no compiler" in n for n in assemble(slow).notes)


def test_not_on_a_gpu() -> None:
    run = make_run((LoRA(rank=4),), micro_batch_size=2)
    run.device = torch.device("cuda")
    with pytest.raises(Conflict, match="for CPUs"):
        Fused().apply(run)


@pytest.mark.parametrize("problem", ["lora", "full"])
def test_the_dry_run_knows_it(problem: str) -> None:
    """What the dry run says of the fast path is less than of the plain one, and what the allocator sees."""
    from tunewise.engine.allocator import peak_tensor_bytes
    from tunewise.engine.step import clipped_norm, gradients, parameter_groups, set_learning_rate, update

    run = make_run((*PROBLEMS[problem], *FAST), micro_batch_size=2)
    documents = range(len(corpus()))
    batches = [run.layout.build(rows, corpus()) for rows in run.layout.micro_batches(documents, corpus().lengths)]
    shapes = [BatchShape.of(batch) for batch in batches]
    estimate = dry_run(run.recipe, CONFIG, "cpu", shapes, profile=CPU_PROFILE)
    optimizer = run.make_optimizer(parameter_groups(run))
    set_learning_rate(optimizer, 0.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def step() -> None:
        gradients(run, batches, 1, scaler)
        clipped_norm(run, optimizer, scaler)
        update(run, optimizer, scaler)

    step()
    peak = peak_tensor_bytes(run, optimizer, batches, step)
    assert estimate.peak_bytes == pytest.approx(peak, rel=0.02)
