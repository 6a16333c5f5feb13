"""Packed = unpacked for every architecture and kind of attention, and leaky packings fail the same
comparison."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GptOssForCausalLM, LlamaForCausalLM

from tests.unit.architectures import ARCHITECTURES, VOCAB_SIZE, tiny_model
from tests.unit.built import loss_of, make_recipe, make_run
from tests.unit.packed import LENGTHS, largest_difference, loss_and_gradients, one_by_one, packed_batch
from tunewise.errors import Conflict
from tunewise.layers.attention import DocumentLayout
from tunewise.methods.attention import Attention, AttentionKind, default_attention_kind, documents_touch
from tunewise.methods.loss import SupervisedLoss, WholeLoss
from tunewise.methods.packing import Packing

TOLERANCE = 1e-5
WITHOUT_INTERFACE = {"falcon", "falcon_alibi"}
KINDS: tuple[AttentionKind, ...] = ("per_document", "sdpa", "eager")
CASES = [
    (architecture, kind)
    for architecture in ARCHITECTURES
    for kind in KINDS
    if architecture != "falcon_alibi"
    and not (architecture == "falcon" and kind != "sdpa")
    and not (architecture == "gemma2" and kind == "sdpa")
]


def test_the_number_of_cases() -> None:
    assert len(CASES) == 3 * (len(ARCHITECTURES) - 2) + 1 - 1


@pytest.mark.parametrize(("architecture", "kind"), CASES)
def test_packed_equals_one_by_one(architecture: str, kind: AttentionKind) -> None:
    batch, documents = packed_batch()
    assert max(len(row) for row in batch.document_lengths) > 1
    assert sum(map(sum, batch.document_lengths)) < batch.input_ids_RL.numel()  # some padding
    expected_model = tiny_model(architecture)
    expected = loss_and_gradients(expected_model, lambda: one_by_one(expected_model, documents))
    run = make_run(tiny_model(architecture), Packing(row_tokens=28), Attention(kind=kind), WholeLoss())
    loss, gradients = loss_and_gradients(run.model, loss_of(run, batch))
    assert loss == pytest.approx(expected[0], rel=TOLERANCE)
    assert largest_difference(gradients, expected[1]) < TOLERANCE
    run = make_run(
        tiny_model(architecture), Packing(row_tokens=28), Attention(kind=kind), SupervisedLoss(chunk_tokens=8)
    )
    loss, gradients = loss_and_gradients(run.model, loss_of(run, batch))
    assert loss == pytest.approx(expected[0], rel=TOLERANCE)
    assert largest_difference(gradients, expected[1]) < TOLERANCE


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - WITHOUT_INTERFACE))
@pytest.mark.parametrize("leak", ["no layout", "no positions"])
def test_a_leaky_packing_fails(architecture: str, leak: str) -> None:
    batch, documents = packed_batch()
    expected_model = tiny_model(architecture)
    expected = loss_and_gradients(expected_model, lambda: one_by_one(expected_model, documents))
    run = make_run(tiny_model(architecture), Attention(), WholeLoss())
    if leak == "no layout":
        leaky = replace(batch, document_lengths=tuple((sum(row),) for row in batch.document_lengths))
    else:
        leaky = replace(batch, position_ids_RL=torch.arange(batch.input_ids_RL.shape[1]).expand_as(batch.input_ids_RL))
    _, gradients = loss_and_gradients(run.model, loss_of(run, leaky))
    difference = largest_difference(gradients, expected[1])
    is_relative = leak == "no positions" and not has_absolute_positions(architecture)
    # Rotary positions are relative: shifting a whole document changes nothing, which is the reason that only
    # the layout counts for them.
    assert difference < 1e-4 if is_relative else difference > 1e-2


def has_absolute_positions(architecture: str) -> bool:
    return architecture in ("gpt2", "opt")


@pytest.mark.parametrize("architecture", ["opt", "falcon"])
def test_without_our_mask_these_leak(architecture: str) -> None:
    """The reason for `mask_dtype`; once transformers separates them itself, the mask can go."""
    run = make_run(tiny_model(architecture), Attention(kind="sdpa"), WholeLoss())
    assert run.documents.mask_dtype == torch.bool
    assert not documents_touch(run)
    run.documents.mask_dtype = None
    assert documents_touch(run)


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - WITHOUT_INTERFACE))
def test_the_probe_sees_a_leak(architecture: str) -> None:
    run = make_run(tiny_model(architecture), Attention())
    assert not documents_touch(run)
    shared, run.documents = run.documents, DocumentLayout()
    shared.lengths = None  # the attention function still reads the first layout: one document a row
    assert documents_touch(run)


def test_packing_falcon_with_alibi_is_refused() -> None:
    with pytest.raises(Conflict, match="Leave packing out"):
        make_run(tiny_model("falcon_alibi"), Packing(row_tokens=28), Attention(kind="sdpa"))


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gpt2", "mixtral"])
def test_two_runs_do_not_share_a_layout(architecture: str) -> None:
    batch, documents = packed_batch()
    first, second = (make_run(tiny_model(architecture), Attention(), WholeLoss()) for _ in range(2))
    expected = loss_of(first, batch)().item()
    loss_of(second, packed_batch(row_tokens=None)[0])()
    assert loss_of(first, batch)().item() == expected
    assert len(documents) == len(LENGTHS)


@pytest.mark.parametrize(
    ("architecture", "kind", "words"),
    [
        ("falcon", "per_document", "AttentionInterface.*kind: sdpa"),
        ("falcon", "eager", "stays with 'sdpa'"),
        ("gemma2", "sdpa", "no 'sdpa' attention.*per_document"),
        ("llama", "flash", "CUDA"),
    ],
)
def test_what_a_model_has_not_got(architecture: str, kind: AttentionKind, words: str) -> None:
    with pytest.raises(Conflict, match=words):
        make_run(tiny_model(architecture), Attention(kind=kind))


def test_foreign_layer_types_are_refused() -> None:
    model = tiny_model("llama")
    model.config.layer_types = ["chunked_attention", "full_attention"]
    with pytest.raises(Conflict, match="chunked_attention"):
        make_run(model, Attention())


def test_default_kind() -> None:
    kinds = {architecture: default_attention_kind(type(tiny_model(architecture))) for architecture in ARCHITECTURES}
    assert {architecture for architecture, kind in kinds.items() if kind != "per_document"} == WITHOUT_INTERFACE
    assert kinds["falcon"] == "sdpa"


def test_models_that_per_document_does_not_know_get_another_kind() -> None:
    plain = AutoConfig.for_model("llama")
    assert default_attention_kind(LlamaForCausalLM, plain) == "per_document"
    hybrid = AutoConfig.for_model("lfm2", num_hidden_layers=2, layer_types=["conv", "full_attention"])
    assert default_attention_kind(LlamaForCausalLM, hybrid) == "sdpa"
    assert default_attention_kind(GptOssForCausalLM, AutoConfig.for_model("gpt_oss")) == "eager"


def test_a_state_that_is_carried_along_the_row_refuses_packing() -> None:
    config = AutoConfig.for_model(
        "lfm2", num_hidden_layers=2, layer_types=["conv", "full_attention"], hidden_size=32, intermediate_size=32,
        num_attention_heads=2, num_key_value_heads=1, vocab_size=VOCAB_SIZE, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(Conflict, match=r"conv.* Leave packing out"):
        make_run(model, Packing(row_tokens=28), Attention(kind="sdpa"), is_dry=True)
    make_run(model, Attention(kind="sdpa"))


def test_nothing_of_it_is_saved(tmp_path: object) -> None:
    run = make_run(tiny_model("llama"), Attention())
    run.model.save_pretrained(str(tmp_path))  # type: ignore[operator]
    reloaded = type(run.model).from_pretrained(str(tmp_path))  # type: ignore[attr-defined]
    assert reloaded.config._attn_implementation == "sdpa"
    ids = torch.arange(3, 20)[None] % VOCAB_SIZE
    torch.testing.assert_close(reloaded(ids).logits, run.model(ids, use_cache=False).logits, rtol=1e-5, atol=1e-5)


def test_prompt_learning_conflicts() -> None:
    from tunewise.methods.peft import Peft

    prompt = Peft(kind="PROMPT_TUNING", options={"num_virtual_tokens": 4})
    recipe = make_recipe(prompt)
    assert "sdpa" in str(Attention().conflict(recipe))
    assert Attention(kind="sdpa").conflict(recipe) is None
    assert "packing" in str(Packing(row_tokens=8).conflict(recipe))
    assert "whole_loss" in str(SupervisedLoss().conflict(recipe))
