"""Each check fails for its own reason, and only then."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from tunewise.engine.generate import Answer
from tunewise.quality.gate import Context, judge
from tunewise.quality.general_text import GeneralText
from tunewise.quality.losses import DocumentLosses
from tunewise.quality.material import Material
from tunewise.quality.prompts import Prompt, endings_of, prompts_of, share_of_taught_ends
from tunewise.quality.refusals import Refusals
from tunewise.quality.scores import Scores
from tunewise.quality.template import template_problems
from tunewise.quality.verdict import QualityReport
from tunewise.recipe import ModelSpec, QualitySpec
from tunewise.workload.corpus import Corpus
from tunewise.workload.model import load_tokenizer

NUM = 24
CHATML = (
    "{% for m in messages %}<|begin|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(ModelSpec(name="embedded"))


def documents(seed: int) -> Corpus:
    drawn = np.random.default_rng(seed).integers(3, 4000, size=(NUM, 30)).tolist()
    return Corpus.from_documents([(ids, [True] * 30) for ids in drawn], ["here"] * NUM)


def losses(mean: float, spread: float = 1.0, seed: int = 0) -> DocumentLosses:
    values = 10 * mean + spread * np.random.default_rng(seed).normal(size=NUM)
    return DocumentLosses(values, np.full(NUM, 10))


def answers(*texts: str) -> tuple[Answer, ...]:
    return tuple(Answer(text, True, 5) for text in texts)


@pytest.fixture
def material(tokenizer: PreTrainedTokenizerBase) -> Material:
    text = documents(1)
    prompt = Prompt((1, 2), "yes", "here")
    return Material(
        general=GeneralText(text, ("prose",) * 12 + ("code",) * 12, "here"),
        validation=documents(2),
        training=documents(3),
        endings=documents(4),
        answerable=(prompt,) * 8,
        unanswerable=(prompt,) * 8,
        max_new_tokens=8,
        refusals=Refusals(),
        tokenizer=tokenizer,
    )


def endings(nats: float) -> DocumentLosses:
    return DocumentLosses(np.full(NUM, nats), np.ones(NUM, dtype=np.int64))


WELL, YES, REFUSED = (answers(*[text] * 8) for text in ("well", "yes", "I do not know."))
BASE = Scores(losses(3), losses(4), losses(4, seed=1), endings(6.0), WELL, WELL)
GOOD = Scores(losses(3.01), losses(3.2), losses(3.0, seed=1), endings(0.2), YES, REFUSED)
CONTEXT = Context(documents(9), best_loss=3.2, last_loss=3.2)


def failed(report: QualityReport) -> list[str]:
    assert report.passed == (not [check for check in report.checks if check.status == "failed"])
    return [check.name for check in report.checks if check.status == "failed"]


def test_a_good_model_passes(material: Material) -> None:
    report = judge(QualitySpec(), material, BASE, GOOD, CONTEXT)
    assert failed(report) == []
    assert {check.status for check in report.checks} == {"passed"}
    numbers = [check.measured for check in report.checks if check.measured is not None]
    assert all(number.low <= number.middle <= number.high and number.noise_floor >= 0 for number in numbers)
    assert len(numbers) >= 8
    assert QualityReport.model_validate_json(report.model_dump_json()) == report


BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no gain": ({"validation": losses(4, seed=3)}, ["task gain"]),
    "worse": ({"validation": losses(4.5), "training": losses(4.5, seed=1)}, ["task gain"]),
    "forgotten": ({"general": losses(3.1)}, ["forgetting"]),
    "overfitted": ({"training": losses(1.0, seed=1)}, ["overfitting"]),
    "never ends": ({"endings": DocumentLosses(np.full(NUM, 7.0), np.ones(NUM, dtype=np.int64))}, ["endings"]),
    "refuses all": ({"answerable": answers(*["I cannot answer that."] * 8)}, ["false refusals"]),
    "refuses nothing": ({"unanswerable": answers(*["42"] * 8)}, ["refusals"]),
    "not finite": ({"validation": DocumentLosses(np.full(NUM, np.nan), np.full(NUM, 10))}, ["finite", "task gain"]),
}


@pytest.mark.parametrize("name", list(BAD))
def test_each_check_fails_for_its_own_reason(material: Material, name: str) -> None:
    changes, expected = BAD[name]
    assert failed(judge(QualitySpec(), material, BASE, replace(GOOD, **changes), CONTEXT))[: len(expected)] == expected


def test_one_domain_may_not_pay_for_the_others(material: Material) -> None:
    shift = np.where(np.arange(NUM) < 12, 4.0, -4.0)
    general = DocumentLosses(GOOD.general.sums + shift, GOOD.general.counts) if GOOD.general else None
    assert failed(judge(QualitySpec(), material, BASE, replace(GOOD, general=general), CONTEXT)) == [
        "forgetting, prose"
    ]


def test_what_the_run_knows_besides(material: Material) -> None:
    leaked = replace(material, validation=CONTEXT.train)
    assert failed(judge(QualitySpec(), leaked, BASE, GOOD, CONTEXT)) == ["leaks"]
    regressed = replace(CONTEXT, last_loss=3.4)
    assert failed(judge(QualitySpec(), material, BASE, GOOD, regressed)) == ["best state"]
    mismatched = replace(CONTEXT, template_problems=("differs",))
    assert failed(judge(QualitySpec(), material, BASE, GOOD, mismatched)) == ["template"]


def test_the_thresholds_are_the_recipes(material: Material) -> None:
    forgotten = replace(GOOD, general=losses(3.1))
    assert failed(judge(QualitySpec(max_forgetting=0.2), material, BASE, forgotten, CONTEXT)) == []
    assert failed(judge(QualitySpec(min_gain=1.0), material, BASE, GOOD, CONTEXT)) == ["task gain"]


def test_what_cannot_be_measured_is_said_and_passes(material: Material) -> None:
    nothing = replace(material, general=None, validation=Corpus.from_documents([], []), answerable=(), unanswerable=())
    empty = Scores(None, None, None, None, (), ())
    report = judge(QualitySpec(), nothing, empty, empty, Context(CONTEXT.train, None, None))
    assert report.passed
    assert {check.name for check in report.checks if check.status == "not measured"} == {
        "task gain", "forgetting", "overfitting", "leaks", "endings", "false refusals",
    }  # fmt: skip


def test_off_and_shorthands() -> None:
    assert not QualitySpec.model_validate(False).gate
    assert not QualitySpec.model_validate("off").gate
    assert QualitySpec.model_validate({}).gate


def test_ends_that_were_never_learnt_fail_however_likely_they_are(material: Material) -> None:
    for share, expected in ((0.0, ["endings"]), (0.5, [])):
        assert failed(judge(QualitySpec(), replace(material, taught_ends=share), BASE, GOOD, CONTEXT)) == expected


def test_how_many_ends_are_taught(tokenizer: PreTrainedTokenizerBase) -> None:
    end = tokenizer.eos_token_id
    taught = ([5, 6, end], [False, True, True])
    untaught = ([5, 6, end], [False, True, False])
    cut = ([5, 6, 7, 8], [False, True, True, True])
    corpus = Corpus.from_documents([taught, untaught, untaught, untaught, cut], ["here"] * 5)
    assert share_of_taught_ends(corpus, tokenizer, max_length=4) == 0.25
    assert share_of_taught_ends(corpus.take([4]), tokenizer, max_length=4) is None


def test_prompts_and_endings_out_of_documents(tokenizer: PreTrainedTokenizerBase) -> None:
    end = tokenizer.eos_token_id
    with_end = ([0, 10, 11, 20, 21, end], [False, False, False, True, True, True])
    unsupervised_end = ([0, 10, 11, 20, 21, end], [False, False, False, True, True, False])
    without_end = ([0, 10, 11, 20, 21], [False, False, False, True, True])
    two_turns = ([0, 10, 20, end, 11, 12, 21, end], [False, False, True, True, False, False, True, True])
    whole = ([0, 10, 11], [False, True, True])
    corpus = Corpus.from_documents(
        [with_end, unsupervised_end, without_end, two_turns, whole], ["a", "b", "c", "d", "e"]
    )
    prompts = prompts_of(corpus, range(5), tokenizer)
    assert [prompt.ids for prompt in prompts] == [(0, 10, 11)] * 3 + [(0, 10, 20, end, 11, 12)]
    endings = endings_of(corpus, range(5), tokenizer, max_length=100)
    for index in range(4):
        ids, marks = endings.document(index)
        assert ids[-1] == end
        assert marks.tolist() == [False] * (len(ids) - 1) + [True]
    assert len(endings_of(corpus, range(5), tokenizer, max_length=6)) == 2  # what is that long was cut


def test_the_prompt_must_be_what_training_taught(tokenizer: PreTrainedTokenizerBase) -> None:
    assert template_problems(tokenizer, tokenizer) == []
    chat, other, bare = (load_tokenizer(ModelSpec(name="embedded")) for _ in range(3))
    chat.chat_template = CHATML
    assert template_problems(chat, chat) == []
    assert "training taught answers after" in template_problems(chat, bare)[0]
    other.chat_template = CHATML.replace("assistant", "bot")
    assert "bot" in template_problems(chat, other)[0]
    other.chat_template = CHATML.split("{% if")[0]
    assert template_problems(chat, other)
    other.chat_template = "{{ raise_exception('no') }}"
    assert "refuses these turns" in template_problems(chat, other)[0]


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I don't know.", True),
        ("I'm sorry, but I can't help with that.", True),
        ("The question is unanswerable.", True),
        ("There is not enough information to say.", True),
        ("Paris", False),
        ("I know that it is Paris.", False),
        ("return self._known", False),
        ("", False),
    ],
)
def test_refusals_are_told_from_answers(text: str, refuses: bool) -> None:
    assert Refusals().matches(text) == refuses
    assert Refusals([r"^weiß nicht"]).matches("Weiß nicht, tut mir leid")
