"""Leaks are found and templates are none; exposure and the gap tell learning from memorizing."""

from __future__ import annotations

import numpy as np
import pytest

from tunewise.quality.losses import DocumentLosses
from tunewise.quality.overfitting import exposure, leaked_share, overfitting, sample
from tunewise.workload.corpus import Corpus


def corpus_of(documents: list[list[int]]) -> Corpus:
    return Corpus.from_documents([(ids, [True] * len(ids)) for ids in documents], ["here"] * len(documents))


def random_documents(num: int, length: int, seed: int) -> list[list[int]]:
    drawn: list[list[int]] = np.random.default_rng(seed).integers(0, 4000, size=(num, length)).tolist()
    return drawn


def test_copies_are_leaks_even_with_a_few_changes() -> None:
    train = random_documents(50, 80, 0)
    changed = [*train[3][:60], *random_documents(1, 3, 9)[0]]
    held_out = [train[0], changed, *random_documents(8, 80, 1)]
    assert leaked_share(corpus_of(train), corpus_of(held_out)).middle == pytest.approx(0.2)


def test_what_shares_a_template_is_no_leak() -> None:
    template = list(range(60))
    train = [[*template, *tail] for tail in random_documents(50, 20, 2)]
    held_out = [[*template, *tail] for tail in random_documents(10, 20, 3)]
    assert leaked_share(corpus_of(train), corpus_of(held_out)).middle == 0.0
    assert leaked_share(corpus_of(train), corpus_of(train[:5])).middle == 1.0


def test_short_documents_leak_when_they_are_equal() -> None:
    train, others = random_documents(50, 6, 4), random_documents(10, 6, 5)
    assert leaked_share(corpus_of(train), corpus_of([train[7], *others[:3]])).middle == pytest.approx(0.25)


def test_exposure_of_chance_and_of_memory() -> None:
    generator = np.random.default_rng(6)
    chance = exposure(generator.normal(size=4000), generator.normal(size=999))
    assert chance.mean() == pytest.approx(1.44, abs=0.1)
    known = exposure(np.full(10, 5.0), generator.normal(size=999))
    assert known == pytest.approx(np.log2(1000))


def test_the_gap_is_what_training_gained_beyond_the_held_out() -> None:
    counts = np.full(40, 10)
    generator = np.random.default_rng(7)
    base_train, base_held_out = (DocumentLosses(generator.normal(30, 3, 40), counts) for _ in range(2))
    learnt = overfitting(
        base_train, DocumentLosses(base_train.sums - 10, counts),
        base_held_out, DocumentLosses(base_held_out.sums - 10 + generator.normal(0, 1, 40), counts),
    )  # fmt: skip
    assert learnt.gap.low < 0.0 < learnt.gap.high
    memorized = overfitting(
        base_train, DocumentLosses(base_train.sums - 20, counts),
        base_held_out, DocumentLosses(base_held_out.sums + 5 + generator.normal(0, 1, 40), counts),
    )  # fmt: skip
    assert memorized.gap.middle == pytest.approx(2.5, abs=0.1)
    assert memorized.gap.is_above_zero
    assert memorized.exposure.middle > learnt.exposure.middle


def test_a_sample_is_the_same_each_time_and_in_order() -> None:
    assert sample(5, 9) == [0, 1, 2, 3, 4]
    drawn = sample(1000, 10)
    assert drawn == sample(1000, 10) == sorted(set(drawn))
    assert len(drawn) == 10
