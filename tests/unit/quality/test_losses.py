"""The loss of single documents is the engine's loss, however the documents lie; generation is transformers' own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.unit.tiny_runs import recipe_over, save_model, write_records
from tunewise.engine.assemble import Plan, assemble, settle
from tunewise.engine.evaluate import validation_loss
from tunewise.engine.generate import Sampling, generate
from tunewise.errors import Conflict
from tunewise.layers.head import base_model_of
from tunewise.methods.method import Run
from tunewise.methods.reading import recipe_from_mapping
from tunewise.quality.base import adapter_off
from tunewise.quality.forgetting import change_of, drift
from tunewise.quality.losses import document_losses
from tunewise.quality.prompts import prompts_of

LORA = {"lora": {"rank": 4}, "packing": {"row_tokens": 96}, "precision": {"compute": "fp32"}}
METHODS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "pissa": {**LORA, "lora": {"rank": 4, "init": "pissa"}},
    "everything": {"precision": {"compute": "fp32"}},
    "whole loss": {**LORA, "whole_loss": {}, "attention": {"kind": "sdpa"}},
    "virtual tokens": {
        "peft": {"kind": "PREFIX_TUNING", "options": {"num_virtual_tokens": 3}},
        "precision": {"compute": "fp32"},
    },
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("losses")
    return save_model(folder / "model"), write_records(folder / "records.jsonl", 40)


def planned(files: tuple[Path, Path], methods: dict[str, Any]) -> tuple[Plan, Run]:
    plan = settle(recipe_from_mapping(recipe_over(*files, methods=methods)))
    return plan, assemble(plan)


@torch.no_grad()
def disturb(run: Run, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(7)
    for _, parameter in run.trainable():
        parameter.add_(size * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("name", list(METHODS))
def test_documents_have_the_engines_loss(files: tuple[Path, Path], name: str) -> None:
    plan, run = planned(files, METHODS[name])
    disturb(run)
    corpus, documents = plan.data.train, [7, 2, 30, 11, 5]
    found = document_losses(run, corpus, documents)
    whole = validation_loss(run, corpus, documents, run.layout)
    assert found.mean == pytest.approx(whole, rel=1e-5)
    assert found.counts.tolist() == corpus.num_supervised[documents].tolist()
    alone = [validation_loss(run, corpus, [document], run.layout) for document in documents]
    assert found.sums / found.counts == pytest.approx(alone, rel=1e-5)
    assert run.model.training


@pytest.mark.parametrize("name", ["lora", "pissa", "virtual tokens"])
def test_the_adapter_can_be_switched_off(files: tuple[Path, Path], name: str) -> None:
    plan, run = planned(files, METHODS[name])
    _, base = planned(files, METHODS["everything"])
    documents = range(10)
    disturb(run)
    tuned = document_losses(run, plan.data.train, documents).sums
    with adapter_off(run):
        off = document_losses(run, plan.data.train, documents).sums
    expected = document_losses(base, plan.data.train, documents).sums
    assert off == pytest.approx(expected, rel=1e-5)
    assert np.abs(tuned - expected).max() > 1e-3
    assert (document_losses(run, plan.data.train, documents).sums == tuned).all()


def test_trained_base_weights_cannot_be_switched_off(files: tuple[Path, Path]) -> None:
    _, run = planned(files, {**LORA, "freeze": {"train": ["*norm*"]}})
    with pytest.raises(Conflict, match="weights of its own"), adapter_off(run):
        pass


def test_drift_is_the_divergence_of_two_models(files: tuple[Path, Path]) -> None:
    plan, run = planned(files, LORA)
    _, base = planned(files, METHODS["everything"])
    disturb(run)
    documents = [3, 9, 1, 20, 4]
    found = drift(run, plan.data.train, documents)
    expected = list(plain_divergence(base, run, plan, documents))
    assert found.kl.middle == pytest.approx(np.mean([kl for kl, _ in expected]), rel=1e-4)
    assert found.soft.middle == pytest.approx(np.mean([soft for _, soft in expected]), rel=1e-4)
    assert found.kl.low > 0.0
    assert found.kl.num == 5


@torch.no_grad()
def plain_divergence(base: Run, tuned: Run, plan: Plan, documents: list[int]) -> Iterator[tuple[float, float]]:
    for document in documents:
        ids, marks = plan.data.train.document(document)
        rows = []
        for run in (base, tuned):
            run.documents.lengths = None
            output = run.model.eval()(input_ids=torch.tensor(ids[None].astype(np.int64)), use_cache=False).logits
            rows.append(output[0, :-1][torch.from_numpy(marks[1:])].log_softmax(-1))
        for one, other in zip(*rows, strict=True):
            yield float(F.kl_div(other, one, log_target=True, reduction="sum")), float(-(one.exp() * other).sum())


def test_an_untrained_adapter_forgot_nothing(files: tuple[Path, Path]) -> None:
    plan, run = planned(files, LORA)
    losses = document_losses(run, plan.data.train, range(20))
    change = change_of(losses, losses)
    assert (change.low, change.middle, change.high) == (0.0, 0.0, 0.0)
    assert drift(run, plan.data.train, range(4)).kl.middle == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", ["lora", "everything"])
def test_batches_with_cache_generate_what_each_prompt_alone_would(files: tuple[Path, Path], name: str) -> None:
    plan, run = planned(files, METHODS[name])
    disturb(run)
    prompts = [prompt.ids for prompt in prompts_of(plan.data.train, range(9), plan.tokenizer)]
    prompts = [(*prompt, *prompt[: number % 4]) for number, prompt in enumerate(prompts)]  # of several lengths
    seen: list[tuple[int, int]] = []
    implementation = base_model_of(run.model).config._attn_implementation
    found = generate(run, plan.tokenizer, prompts, Sampling(12), lambda done, total: seen.append((done, total)))
    assert base_model_of(run.model).config._attn_implementation == implementation
    assert seen == [(9, 9)]
    for prompt, (answer,) in zip(prompts, found, strict=True):
        assert answer.text == plain_answer(run, plan, prompt, 12)


@torch.no_grad()
def plain_answer(run: Run, plan: Plan, prompt: tuple[int, ...], num_tokens: int) -> str:
    run.documents.lengths = None
    ids = list(prompt)
    for _ in range(num_tokens):
        token = int(run.model.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token == plan.tokenizer.eos_token_id:
            break
        ids.append(token)
    return str(plan.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))


def test_samples_repeat_and_leave_the_random_state_alone(files: tuple[Path, Path]) -> None:
    plan, run = planned(files, LORA)
    prompts = [prompt.ids for prompt in prompts_of(plan.data.train, range(3), plan.tokenizer)]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, again = (generate(run, plan.tokenizer, prompts, Sampling(6, 1.0, 3, seed=4)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert one == again
    assert [len(answers) for answers in one] == [3, 3, 3]
    assert len({answer.text for answers in one for answer in answers}) > 3
