"""Composed predictions against dry runs of the very recipes; time against arithmetic."""

from __future__ import annotations

import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tunewise.engine.tracking import Kind
from tunewise.errors import InputError
from tunewise.machine.catalogue import find
from tunewise.planner.case import Question, settle
from tunewise.planner.footprint import num_parameters
from tunewise.planner.predict import Predictor, kind_of, profile_of
from tunewise.planner.space import ALL_BLOCKS, KEPT, Choice, Wishes, axes, enumerate_space
from tunewise.workload.model import random_model


def combinations(predictor: Predictor) -> list[Choice]:
    options = axes(predictor.config, predictor.machine, predictor.base, Wishes())
    return enumerate_space(options, predictor.base, Wishes(), predictor.load.documents_per_step)[0]


def plain(predictor: Predictor) -> Choice:
    return next(each for each in combinations(predictor) if each.label.startswith("LoRA, bf16 mixed, activations kept"))


@pytest.mark.parametrize(("machine", "length"), [("H100", 96), ("T4", 160)])
def test_composed_bytes_are_those_of_a_dry_run(deep: str, machine: str, length: int) -> None:
    predictor = settle(Question(deep, length=length, machine=machine)).predictor()
    draw = random.Random(length)
    errors = []
    for choice in draw.sample(combinations(predictor), 3):
        predicted = predictor.predict(choice, draw.choice(predictor.micro_batch_sizes(choice)[:3]))
        confirmed, _ = predictor.confirm(predicted)
        errors.append(predicted.peak_bytes / confirmed.peak_bytes - 1)
    assert len(errors) == 3
    assert sorted(errors)[len(errors) // 2] == pytest.approx(0, abs=0.001)
    assert max(map(abs, errors)) < 0.04  # worst seen: 2.8 %


def test_few_traces_serve_many_combinations(tiny: str) -> None:
    predictor = settle(Question(tiny, length=96, machine="H100", wanted=("lora",))).predictor()
    count = 0
    for choice in combinations(predictor):
        if choice["tuning"].label == "LoRA over nf4":
            for size in predictor.micro_batch_sizes(choice):
                predictor.predict(choice, size)
                count += 1
    assert count > 100
    assert predictor.num_traced < 16


def test_bytes_and_seconds_grow_with_the_micro_batch(tiny: str) -> None:
    predictor = settle(Question(tiny, length=96, machine="H100")).predictor()
    choice = plain(predictor)
    found = [predictor.predict(choice, size) for size in predictor.micro_batch_sizes(choice)]
    assert [each.micro_batch_size for each in found] == [1, 2, 4, 8, 16]
    peaks, seconds = [each.peak_bytes for each in found], [each.step_seconds.middle for each in found]
    assert peaks == sorted(peaks)
    assert seconds == sorted(seconds, reverse=True)
    for each in found:
        assert sum(each.kinds.values()) + predictor.profile.workspace_bytes == pytest.approx(each.peak_bytes, abs=8)


def test_checkpointing_trades_time_for_activations(tiny: str) -> None:
    predictor = settle(Question(tiny, length=512, machine="T4")).predictor()
    kept = next(each for each in combinations(predictor) if each.label.startswith("LoRA, fp16 mixed, activations kept"))
    with_it, without = (predictor.predict(kept.replaced("checkpointing", each), 8) for each in (ALL_BLOCKS, KEPT))
    assert with_it.kinds[Kind.ACTIVATIONS] < 0.5 * without.kinds[Kind.ACTIVATIONS]
    assert 1.1 < with_it.step_seconds.middle / without.step_seconds.middle < 1.6


def test_parameters_are_counted_without_the_whole_model(deep: str) -> None:
    case = settle(Question(deep, length=96, machine="H100"))
    with FakeTensorMode():
        expected = sum(p.numel() for p in random_model(case.config, torch.float32, 0).parameters())
    assert num_parameters(case.config, case.base) == expected


def test_apple_machines_are_refused() -> None:
    with pytest.raises(InputError, match="Metal"):
        profile_of(find("M2 Max 96GB"))


def test_the_kind_of_work_has_a_name(tiny: str) -> None:
    predictor = settle(Question(tiny, length=96, machine="H100")).predictor()
    assert kind_of(plain(predictor).recipe(predictor.base, 1)) == "lora bf16 padded"


def test_no_combination_is_faster_than_its_least_seconds(tiny: str) -> None:
    predictor = settle(Question(tiny, length=96, machine="H100")).predictor()
    full = [each for each in combinations(predictor) if each["tuning"].label == "full"]
    for choice in random.Random(3).sample(full, 12):
        least = predictor.least_seconds(choice)
        for size in predictor.micro_batch_sizes(choice):
            assert 0 < least <= predictor.predict(choice, size).step_seconds.middle, (choice.label, size)
