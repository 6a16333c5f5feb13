"""Measuring keeps to its share of the training's time, and never measures less than the smallest sample."""

from __future__ import annotations

import numpy as np
import pytest

from tunewise.engine.generate import Answer
from tunewise.quality.general_text import GeneralText
from tunewise.quality.losses import DocumentLosses
from tunewise.quality.material import Material
from tunewise.quality.pace import TRAINING_COST, Pace, fraction_after, fraction_before
from tunewise.quality.prompts import Prompt
from tunewise.quality.refusals import Refusals
from tunewise.quality.scores import Scores
from tunewise.recipe import ModelSpec
from tunewise.workload.corpus import Corpus
from tunewise.workload.model import load_tokenizer

PACE = Pace(token_seconds=1e-3, answer_seconds=0.05)


def documents(num: int) -> Corpus:
    return Corpus.from_documents([([number] * 10, [True] * 10) for number in range(num)], ["here"] * num)


@pytest.fixture(scope="module")
def material() -> Material:
    return Material(
        general=GeneralText(documents(64), ("prose",) * 32 + ("code",) * 32, "here"),
        validation=documents(100),
        training=documents(40),
        endings=documents(100),
        answerable=(Prompt((1, 2), "yes", "here"),) * 16,
        unanswerable=(Prompt((1, 2), "no", "here"),) * 3,
        max_new_tokens=8,
        refusals=Refusals(),
        tokenizer=load_tokenizer(ModelSpec(name="embedded")),
    )


def test_the_smallest_part_has_eight_of_each_and_parts_add_up(material: Material) -> None:
    smallest = material.part(0.0)
    assert [len(c) for c in (smallest.validation, smallest.training, smallest.endings)] == [8, 8, 8]
    assert (len(smallest.answerable), len(smallest.unanswerable)) == (4, 3)
    half, more = material.part(0.5), material.more(0.0, 0.5)
    assert (len(half.validation), len(half.training), len(half.answerable)) == (50, 20, 8)
    assert smallest.num_tokens + more.num_tokens == half.num_tokens
    assert smallest.num_answers + more.num_answers == half.num_answers
    joined = np.concatenate((smallest.validation.token_ids, more.validation.token_ids))
    assert joined.tolist() == half.validation.token_ids.tolist()
    assert material.part(1.0).num_tokens == material.num_tokens == 3040


def test_every_beginning_of_the_mixed_text_has_all_domains_alike(material: Material) -> None:
    assert material.general is not None
    mixed = material.general.mixed()
    for num in (2, 8, 20, 64):
        assert mixed.domains[:num].count("code") == num // 2
    first = [int(mixed.corpus.document(number)[0][0]) for number in range(64)]
    assert sorted(first) == list(range(64))
    assert [("code" if each >= 32 else "prose") for each in first] == list(mixed.domains)


def test_both_measurements_keep_to_the_share_of_what_training_will_take(material: Material) -> None:
    for training_tokens in (5e4, 1e5, 2e5):
        for share in (0.02, 0.06, 0.12):
            fraction = fraction_before(material, PACE, training_tokens, spent=0.3, share=share)
            training_seconds = TRAINING_COST * training_tokens * PACE.token_seconds
            taken = 0.3 + 2 * PACE.seconds(material.part(fraction))
            assert fraction == 0.0 or taken <= share * training_seconds
            assert fraction == 1.0 or taken + 2 * PACE.seconds(material) / 32 + 0.2 > share * training_seconds
    assert fraction_before(material, PACE, 1e6, spent=0.3, share=0.12) == 1.0
    assert fraction_before(material, PACE, 1e3, spent=0.3, share=0.12) == 0.0


def test_the_tuned_state_gets_what_the_base_has_left(material: Material) -> None:
    spent = PACE.seconds(material)
    assert fraction_after(material, PACE, 1e3, spent, 0.12, before=0.75) == 0.75
    half = PACE.seconds(material.part(0.5))
    assert fraction_after(material, PACE, (spent + half) / 0.12 + 1e-6, spent, 0.12, before=1.0) == 0.5
    assert fraction_after(material, PACE, 1.0, spent, 0.12, before=1.0) == 0.0


def losses(num: int, start: int = 0) -> DocumentLosses:
    return DocumentLosses(np.arange(start, start + num, dtype=np.float64), np.full(num, 10))


def scores(material: Material, start: int = 0) -> Scores:
    assert material.general is not None
    answers = tuple(Answer(str(number), True, 1) for number in range(len(material.answerable)))
    sizes = (len(material.general.domains), len(material.validation), len(material.training), len(material.endings))
    parts = [losses(num, start) for num in sizes]
    return Scores(parts[0], parts[1], parts[2], parts[3], answers, answers[: len(material.unanswerable)], {}, {}, 2, 1)


def test_scores_are_cut_as_the_material_is(material: Material) -> None:
    cut = scores(material).of(material.part(0.5))
    assert cut.validation is not None
    assert cut.validation.sums.tolist() == list(range(50))
    assert (len(cut.answerable), len(cut.unanswerable)) == (8, 3)
    joined = scores(material.part(0.0)).joined(scores(material.more(0.0, 0.5), start=8))
    assert joined.validation is not None
    assert joined.validation.sums.tolist() == list(range(50))
    assert (joined.loss_seconds, joined.answer_seconds, len(joined.answerable)) == (4, 2, 8)
    nothing = Scores(None, None, None, None, (), ())
    assert nothing.joined(nothing).validation is None
    assert nothing.joined(scores(material)).endings is not None
