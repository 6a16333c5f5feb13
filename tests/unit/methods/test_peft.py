"""The peft library's methods by name: every kind that is offered is built, trained, saved and loaded; the
rest refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoModelForCausalLM

from tests.unit.architectures import tiny_model
from tests.unit.methods.adapted import disturb, logits, make_recipe, make_run, token_ids
from tunewise.engine.fake_tensors import Answers, FakeTensors
from tunewise.errors import Conflict, InputError
from tunewise.export.adapter import load_peft, save_peft
from tunewise.methods.checkpointing import Checkpointing
from tunewise.methods.freezing import Freeze
from tunewise.methods.lora import LoRA
from tunewise.methods.peft import NOT_DRY, PROMPT_LEARNING, REFUSED, Peft
from tunewise.methods.precision import Precision
from tunewise.methods.quantization import Quantize

peft = pytest.importorskip("peft")

# Options that the kind needs, or whose defaults are too large for layers of 32 features.
OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "BEFT": {},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "DEFT": {},
    "DELORA": {},
    "FOURIERFT": {"n_frequency": 8},
    "FROD": {},
    "GLORA": {},
    "GRALORA": {},
    "HIRA": {},
    "HRA": {},
    "IA3": {},
    "LILY": {},
    "LN_TUNING": {},
    "LOHA": {},
    "LOKR": {},
    "MISS": {"r": 8},
    "OFT": {"oft_block_size": 4},
    "OSF": {},
    "PEANUT": {},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "PSOFT": {"r": 8},
    "PVERA": {},
    "P_TUNING": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "RANDLORA": {},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 4},
    "SUPERTUNING": {},
    "TINYLORA": {},
    "TRAINABLE_TOKENS": {"token_indices": list(range(3, 30))},
    "UNILORA": {},
    "VBLORA": {"vector_length": 16, "num_vectors": 8},
    "VERA": {},
    "WAVEFT": {"n_frequency": 64},
}
NEEDS_SKLEARN = {"ADAMSS"}


def test_every_kind_of_the_library_is_offered_or_refused() -> None:
    assert set(OPTIONS) | set(REFUSED) | NEEDS_SKLEARN == {kind.value for kind in peft.PeftType}
    assert len(OPTIONS) == 38


@pytest.mark.parametrize("kind", OPTIONS)
def test_forward_backward_save_load(kind: str, tmp_path: Path) -> None:
    run = make_run(tiny_model("llama"), Peft(kind=kind.lower(), options=OPTIONS[kind]))
    output = run.model.train()(input_ids=token_ids(), use_cache=False).logits[:, -9:]
    output.square().mean().backward()
    trained = dict(run.trainable())
    assert trained
    assert all(parameter.grad is not None for parameter in trained.values())
    assert any(bool(parameter.grad.any()) for parameter in trained.values())  # type: ignore[union-attr]
    disturb(run.model, 0.01)
    expected = logits(run.model)
    save_peft(run.model, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert not list(tmp_path.glob("*.bin"))
    loaded = logits(load_peft(tiny_model("llama"), tmp_path))
    assert torch.allclose(loaded, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected[:, -9:], logits(tiny_model("llama")), rtol=1e-5, atol=1e-5)


def test_prompt_learning_is_what_the_library_says() -> None:
    flags = {}
    for kind, make in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items():
        flags[kind.value] = issubclass(make, peft.PromptLearningConfig)
    assert {kind for kind, flag in flags.items() if flag} == PROMPT_LEARNING
    assert Peft(kind="prefix_tuning").is_prompt_learning
    assert not Peft(kind="IA3").is_prompt_learning


def test_the_seed_decides_the_first_values() -> None:
    def values(seed: int) -> torch.Tensor:
        run = make_run(tiny_model("llama"), Peft(kind="VERA"), seed=seed)
        return torch.cat([parameter.detach().flatten() for _, parameter in run.trainable()] + shared(run.model))

    def shared(model: torch.nn.Module) -> list[torch.Tensor]:
        return [buffer.flatten() for name, buffer in model.named_buffers() if "vera" in name]

    torch.manual_seed(1)
    first = values(3)
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    assert torch.equal(first, values(3))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Peft(kind="IA4"), r"there is no kind 'IA4'. Did you mean 'IA3'\?"),
        (Peft(kind="VERA", options={"rr": 3}), "VERA has no option 'rr'"),
        (Peft(kind="VERA", options={"projection_prng": 3}), r"Did you mean 'projection_prng_key'\?"),
        (Peft(kind="IA3", options={"task_type": "SEQ_CLS"}), "IA3 has no option 'task_type'"),
        (
            Peft(kind="IA3", options={"target_modules": ["q_proj"], "feedforward_modules": ["up_proj"]}),
            "options of IA3 are not valid",
        ),
        (Peft(kind="VERA", options={"target_modules": ["nothing"]}), "VERA does not fit this model"),
        (Peft(kind="MISS"), r"MISS does not fit this model: .*in_features"),
        (Peft(kind="ADAMSS", options={"use_asa": True}), "use_asa"),
    ],
)
def test_clear_errors(method: Peft, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_run(tiny_model("llama"), method)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_step_cannot_compute_is_refused(kind: str) -> None:
    method = Peft(kind=kind)
    assert REFUSED[kind] in str(method.conflict(make_recipe(method)))


def test_conflicts() -> None:
    ia3 = Peft(kind="IA3")
    assert ia3.conflict(make_recipe(ia3)) is None
    assert "two adapters" in str(ia3.conflict(make_recipe(ia3, LoRA())))
    assert "'freeze'" in str(ia3.conflict(make_recipe(ia3, Freeze(train=("*.bias",)))))
    assert "cannot wrap quantized layers" in str(ia3.conflict(make_recipe(ia3, Quantize())))
    prompts = Peft(kind="PROMPT_TUNING", options={"num_virtual_tokens": 4})
    assert prompts.conflict(make_recipe(prompts, Quantize())) is None


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "CARTRIDGE"])
def test_tokens_that_come_as_a_cache_do_not_reach_checkpointed_blocks(kind: str) -> None:
    method = Peft(kind=kind, options={"num_virtual_tokens": 4})
    assert method.conflict(make_recipe(method)) is None
    assert "'checkpointing' out" in (method.conflict(make_recipe(method, Checkpointing())) or "")


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "LN_TUNING"])
def test_kinds_beside_quantized_weights(kind: str) -> None:
    run = make_run(tiny_model("llama"), Quantize(kind="int8"), Peft(kind=kind, options=OPTIONS[kind]))
    run.model(input_ids=token_ids(), use_cache=False).logits.square().mean().backward()
    assert all(parameter.grad is not None for _, parameter in run.trainable())


Shapes = dict[str, tuple[tuple[int, ...], torch.dtype, bool]]


def shapes_of(model: torch.nn.Module) -> Shapes:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: (tuple(each.shape), each.dtype, each.requires_grad) for name, each in tensors}


def adapted(kind: str, *, is_dry: bool) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_config(tiny_model("llama").config, dtype=torch.bfloat16)
    return make_run(model, Peft(kind=kind, options=OPTIONS[kind]), is_dry=is_dry).model


@pytest.mark.parametrize("kind", sorted(OPTIONS.keys() - NOT_DRY.keys()))
def test_an_adapter_of_fake_tensors_has_the_shapes_of_a_real_one(kind: str) -> None:
    with FakeTensors(), Answers():
        fake = adapted(kind, is_dry=True)
    assert all(isinstance(parameter, FakeTensor) for parameter in fake.parameters())
    assert shapes_of(fake) == shapes_of(adapted(kind, is_dry=False))


@pytest.mark.parametrize("kind", sorted(NOT_DRY))
def test_kinds_that_need_values_have_no_dry_run(kind: str) -> None:
    with pytest.raises(Conflict, match=f"{kind} {NOT_DRY[kind]}, so there is no dry run"):
        make_run(tiny_model("llama"), Peft(kind=kind), is_dry=True)


def test_an_option_that_needs_values_has_no_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunewise.methods.peft.NOT_DRY", {})
    with FakeTensors(), Answers(), pytest.raises(Conflict, match="SHIRA with these options reads values"):
        adapted("SHIRA", is_dry=True)


@pytest.mark.parametrize("kind", OPTIONS)
def test_every_kind_computes_in_16_bits_only(kind: str) -> None:
    methods = Peft(kind=kind.lower(), options=OPTIONS[kind]), Precision(compute="bf16", trainable="same")
    model = tiny_model("llama").to(torch.bfloat16)
    run = make_run(model, *methods)
    output = run.model.train()(input_ids=token_ids(), use_cache=False).logits
    output.float().square().mean().backward()
    trained = dict(run.trainable())
    assert {parameter.dtype for parameter in trained.values()} == {torch.bfloat16}
    assert all(parameter.grad is not None for parameter in trained.values())
