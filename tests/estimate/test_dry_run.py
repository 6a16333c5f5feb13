"""The dry run by itself: what it adds up to, how it grows, and that depth is extended exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from tunewise.engine.device_profile import CPU
from tunewise.engine.dry_run import BatchShape, dry_run, trace
from tunewise.engine.extension import shallow_depths
from tunewise.engine.tracking import Kind, Moment
from tunewise.errors import Conflict
from tunewise.export.merge import merge_adapters
from tunewise.methods import complete
from tunewise.methods.reading import recipe_from_mapping
from tunewise.recipe import Recipe

STEP = (Moment.FORWARD, Moment.BACKWARD, Moment.UPDATE)


def config_of(architecture: str, depth: int, **changes: Any) -> PretrainedConfig:
    options: dict[str, Any] = {
        "vocab_size": 500,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "num_hidden_layers": depth,
        "pad_token_id": 0,
    }
    return AutoConfig.for_model(architecture, **{**options, **changes})


def recipe_of(config: PretrainedConfig, methods: dict[str, Any], **changes: Any) -> Recipe:
    mapping = {
        "model": {"name": "x", "weights": "random"},
        "data": {"source": "y"},
        "methods": {"precision": {"compute": "fp32"}, **methods},
        "batch": {"documents": 2, "micro_batch_size": 2},
        **changes,
    }
    return complete(recipe_from_mapping(mapping, "test"), config, torch.device("cpu"))


def step_bytes(config: PretrainedConfig, recipe: Recipe, *shapes: BatchShape) -> int:
    moments = dry_run(recipe, config, "cpu", shapes).moments
    return max(moments[moment].total_bytes for moment in STEP)


def test_parts_are_what_they_are_called() -> None:
    config = config_of("llama", 3)
    estimate = dry_run(recipe_of(config, {"adamw": {}}), config, "cpu", BatchShape.uniform(2, 64))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert estimate.total_parameters == estimate.trainable_parameters == num_parameters
    kinds = estimate.moments[Moment.UPDATE].kinds
    inverse_frequencies = 2 * 4 * 8  # of the rotary embedding: a buffer and its original
    assert kinds[Kind.WEIGHTS] == 4 * num_parameters + inverse_frequencies
    assert kinds[Kind.GRADIENTS] == 4 * num_parameters
    num_tensors = len(list(model.parameters()))
    assert kinds[Kind.OPTIMIZER] == 8 * num_parameters + 4 * num_tensors
    assert kinds[Kind.ADAPTER] == kinds[Kind.LOGITS] == 0
    for peak in estimate.moments.values():
        assert min(peak.kinds.values()) >= 0
        assert sum(peak.kinds.values()) == peak.total_bytes
    assert estimate.peak_bytes == max(peak.total_bytes for peak in estimate.moments.values())


def test_the_head_makes_logits_of_a_known_size() -> None:
    config = config_of("llama", 2)
    shape = BatchShape.uniform(2, 64)
    estimate = dry_run(recipe_of(config, {"whole_loss": {}}), config, "cpu", shape)
    # The logits, their log-softmax and its gradient, each (128, 500) in fp32.
    assert estimate.moments[Moment.BACKWARD].kinds[Kind.LOGITS] in (2 * 128 * 500 * 4, 3 * 128 * 500 * 4)


def test_adapter_and_weights_are_told_apart() -> None:
    config = config_of("llama", 2)
    estimate = dry_run(recipe_of(config, {"lora": {"rank": 4}}), config, "cpu", BatchShape.uniform(2, 64))
    kinds = estimate.moments[Moment.UPDATE].kinds
    assert kinds[Kind.ADAPTER] == 4 * estimate.trainable_parameters == kinds[Kind.GRADIENTS]
    assert kinds[Kind.WEIGHTS] > 4 * (estimate.total_parameters - estimate.trainable_parameters) - 1


EAGER = {"attention": {"kind": "eager"}, "whole_loss": {}}


@pytest.mark.parametrize("methods", [EAGER, {"checkpointing": {}, "lora": {}}])
def test_memory_and_work_grow_with_rows_and_length(methods: dict[str, Any]) -> None:
    config = config_of("qwen3", 2)
    recipe = recipe_of(config, methods)
    for shapes in ([(1, 64), (2, 64), (4, 64)], [(2, 32), (2, 64), (2, 128)]):
        estimates = [dry_run(recipe, config, "cpu", BatchShape.uniform(rows, length)) for rows, length in shapes]
        needed = [max(estimate.moments[moment].total_bytes for moment in STEP) for estimate in estimates]
        assert needed == sorted(set(needed))
        flops = [estimate.flops() for estimate in estimates]
        assert flops == sorted(set(flops))


def test_a_second_micro_batch_meets_the_gradients_of_the_first() -> None:
    config = config_of("llama", 2)
    recipe, shape = recipe_of(config, {}), BatchShape.uniform(1, 256)
    one, two, three = (step_bytes(config, recipe, *[shape] * count) for count in (1, 2, 3))
    assert one < two == three


@pytest.mark.parametrize(
    ("architecture", "depth", "methods"),
    [
        ("llama", 8, {}),
        ("llama", 8, {"checkpointing": {}, "whole_loss": {}}),
        ("llama", 8, {"checkpointing": {"every": 2}, "lora": {"rank": 4}}),
        ("llama", 8, {"lora": {"rank": 4, "layers_to_transform": [6, 7]}}),
        ("llama", 8, {"freeze": {"train": ["model.layers.[67].*"]}}),
        ("gemma2", 8, {}),
        ("gemma3_text", 19, {"checkpointing": {"policy": "selective"}}),
        ("mixtral", 8, {"adafactor": {}}),
        ("llama", 8, {"peft": {"kind": "LILY", "options": {"stride_A": 2, "r": 4}}}),
        ("llama", 8, {"peft": {"kind": "ADAPTION_PROMPT", "options": {"adapter_len": 4, "adapter_layers": 2}}}),
        ("llama", 8, {"peft": {"kind": "LOHA", "options": {"r": 4, "layers_to_transform": [6, 7]}}}),
    ],
)
def test_extended_depth_equals_a_trace_of_all_blocks(architecture: str, depth: int, methods: dict[str, Any]) -> None:
    special = {"num_local_experts": 4} if architecture == "mixtral" else {}
    config = config_of(architecture, depth, **special)
    recipe, shape = recipe_of(config, methods), BatchShape.uniform(2, 48)
    assert shallow_depths(config, recipe) is not None
    extended = dry_run(recipe, config, "cpu", shape, evaluation=shape)
    whole = trace(recipe, config, CPU, (shape,), shape)
    for moment, peak in whole.peaks().items():
        assert extended.moments[moment].total_bytes == pytest.approx(peak.total_bytes, rel=2e-3), moment
    flops = sum(work.flops for key, work in whole.work.items() if key.moment in STEP)
    assert extended.flops() == pytest.approx(flops, rel=1e-9)
    assert extended.total_parameters == whole.total_parameters
    assert extended.trainable_parameters == whole.trainable_parameters


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "TINYLORA", "options": {"weight_tying": 0.5}},
        {"kind": "HIRA", "options": {"rank_pattern": {"layers.3.self_attn.q_proj": 7}}},
        {"kind": "LILY", "options": {"stride_A": 5}},
    ],
)
def test_options_that_tell_blocks_apart_forbid_extension(options: dict[str, Any]) -> None:
    config = config_of("llama", 8)
    assert shallow_depths(config, recipe_of(config, {"peft": options})) is None


def test_a_large_model_is_never_instantiated() -> None:
    config = AutoConfig.for_model(
        "llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip
    methods = {"quantize": {"kind": "nf4"}, "lora": {}, "checkpointing": {}, "precision": {"compute": "bf16"}}
    recipe = recipe_of(config, {**methods, "attention": {"kind": "per_document"}})
    kinds = dry_run(recipe, config, "cuda", BatchShape.uniform(1, 4096)).moments[Moment.BACKWARD].kinds
    packed = 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    unpacked = 2 * 128256 * 8192
    # 4.127 bits with double quantization (QLoRA, section 3), the head and the embedding in bf16.
    assert kinds[Kind.WEIGHTS] == pytest.approx(packed * 4.127 / 8 + unpacked * 2, rel=0.002)


def test_products_in_fp8_are_run_dry_for_a_card_that_is_not_here() -> None:
    """Whether a run computes in bf16 is asked of the recipe: precision acts on the run only after the weights."""
    config = config_of("llama", 2)
    products = {"quantize": {"kind": "fp8", "compute": "fp8"}, "lora": {"rank": 16}}
    for trainable in ("fp32", "same"):
        recipe = recipe_for_cuda(config, {**products, "precision": {"compute": "bf16", "trainable": trainable}})
        estimate = dry_run(recipe, config, "cuda", BatchShape.uniform(2, 64))
        assert any(key.dtype == torch.float8_e4m3fn for key in estimate.work)
    recipe = recipe_for_cuda(config, {**products, "precision": {"compute": "fp16"}})
    with pytest.raises(Conflict, match=r"Use precision: \{compute: bf16\}"):
        dry_run(recipe, config, "cuda", BatchShape.uniform(2, 64))


def test_merging_is_estimated_too() -> None:
    config = config_of("llama", 4)
    recipe = recipe_of(config, {"quantize": {"kind": "int8"}, "lora": {"rank": 4}})
    estimate = dry_run(recipe, config, "cpu", BatchShape.uniform(1, 16), finish=merge_adapters)
    dense = 4 * 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)  # the unpacked linear layers of 4 blocks in fp32
    assert estimate.moments[Moment.MERGE].total_bytes > dense
    assert estimate.moments[Moment.UPDATE].kinds[Kind.WEIGHTS] < dense


def test_flops_of_a_step_are_six_for_each_weight_and_token() -> None:
    """Kaplan et al. 2020 (arXiv 2001.08361), table 1: 6 N a token, plus attention's 12 L D for each layer."""
    config = config_of("llama", 2)
    estimate = dry_run(recipe_of(config, {"whole_loss": {}}), config, "cpu", BatchShape.uniform(2, 64))
    matrices = 500 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    products = 6 * matrices * 128
    attention = 2 * (2 + 5) * 2 * 2 * 4 * 64 * 64 * 16
    assert estimate.flops() == pytest.approx(products + attention, rel=0.01)


def recipe_for_cuda(config: PretrainedConfig, methods: dict[str, Any]) -> Recipe:
    mapping = {
        "model": {"name": "x", "weights": "random"},
        "data": {"source": "y"},
        "methods": {"precision": {"compute": "bf16", "trainable": "same"}, **methods},
        "batch": {"documents": 2, "micro_batch_size": 2},
    }
    return complete(recipe_from_mapping(mapping, "test"), config, torch.device("cuda"))


def test_packed_rows_are_one_varlen_call_a_block_on_cuda_and_buckets_on_the_cpu() -> None:
    config = config_of("llama", 4)
    recipe, shape = recipe_for_cuda(config, {"packing": {"row_tokens": 64}}), BatchShape(((30, 34), (20, 40)), 100, 64)
    on_cuda, on_cpu = (dry_run(recipe.replace(device=kind), config, kind, shape) for kind in ("cuda", "cpu"))
    calls = {key.operator: work.calls for key, work in on_cuda.work.items() if key.moment == Moment.FORWARD}
    assert calls["torch_attn._varlen_attn"] == 4
    assert not any("scaled_dot_product" in operator for operator in calls)
    assert not any("varlen" in key.operator for key in on_cpu.work)


def test_a_paged_optimizer_is_estimated_like_one_that_has_not_been_paged_out() -> None:
    config, shape = config_of("llama", 4), BatchShape.uniform(2, 64)
    paged, plain = (
        dry_run(recipe_for_cuda(config, {"lora": {"rank": 64}, name: {}}), config, "cuda", shape)
        for name in ("paged_adamw_8bit", "adamw_8bit")
    )
    assert paged.peak.kinds[Kind.OPTIMIZER] == plain.peak.kinds[Kind.OPTIMIZER] > 0


def test_saving_from_a_gpu_takes_memory_of_the_host() -> None:
    config, shape = config_of("llama", 4), BatchShape.uniform(2, 64)
    estimate = dry_run(recipe_for_cuda(config, {}), config, "cuda", shape)
    saved = estimate.moments[Moment.SAVE]
    state = 2 * estimate.trainable_parameters * (1 + 2)  # weights and both moments in bf16
    assert state <= saved.host_bytes < 1.1 * state  # besides: counts of steps, the generator, rounding to 512 bytes
    assert saved.kinds[Kind.TEMPORARIES] == 0
    assert saved.total_bytes < estimate.moments[Moment.UPDATE].total_bytes
    on_the_cpu = dry_run(recipe_of(config, {}), config, "cpu", shape).moments[Moment.SAVE]
    assert on_the_cpu.host_bytes == 0
    assert on_the_cpu.kinds[Kind.TEMPORARIES] > 0


def test_dropout_keeps_a_byte_a_number_on_cuda() -> None:
    config, shape = config_of("llama", 32), BatchShape.uniform(2, 64)
    target = {"rank": 4, "target_modules": ["down_proj"]}
    with_dropout = recipe_for_cuda(config, {"lora": {**target, "dropout": 0.1}})
    on_cuda, on_cpu = (
        dry_run(with_dropout.replace(device=kind), config, kind, shape).moments[Moment.BACKWARD].kinds[Kind.ACTIVATIONS]
        for kind in ("cuda", "cpu")
    )
    numbers = 32 * 2 * 64 * 96  # inputs of one layer in each block; the CPU keeps factors in 16 bit
    assert on_cpu - on_cuda == pytest.approx(numbers, rel=0.1)


def test_dropout_in_checkpointed_blocks_is_recomputed_on_cuda() -> None:
    config, shape = config_of("llama", 8), BatchShape.uniform(2, 64)
    lora = {"lora": {"dropout": 0.1}}
    kept = dry_run(recipe_for_cuda(config, lora), config, "cuda", shape)
    recomputed = dry_run(recipe_for_cuda(config, {**lora, "checkpointing": {}}), config, "cuda", shape)
    assert recomputed.peak_bytes < kept.peak_bytes
