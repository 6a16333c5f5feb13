"""Questions in other forms, contracts on exceptional inputs, calibration, the general text."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from tests.unit.built import make_recipe
from tunewise.errors import InputError
from tunewise.quality.calibration import best_temperature, calibration_items, expected_calibration_error
from tunewise.quality.exceptional import (
    KINDS,
    Contract,
    contract_cases,
    contract_items,
    exceptional_inputs,
    read_contract,
)
from tunewise.quality.general_text import general_text
from tunewise.quality.losses import Chunk
from tunewise.quality.metamorphic import asked_text, consistency_items, pairs_of, reordered
from tunewise.quality.questions import read_questions
from tunewise.quality.refusals import Refusals
from tunewise.recipe import ModelSpec, QualitySpec
from tunewise.workload.model import load_tokenizer
from tunewise.workload.stdlib_source import FINE_TUNING_BUCKETS, PRETRAINING_BUCKETS, stdlib_texts

SHARED = Path(__file__).parents[4] / "shared" / "data"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(ModelSpec(name="embedded"))


def write(file: Path, *records: object) -> str:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def test_questions_know_all_right_answers_and_those_without(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    data = write(
        tmp_path / "qa.jsonl",
        {"question": "Who?\n", "answer": ["Ann", "Anna"]},
        {"question": "When?\n", "answer": []},
        {"question": "Where?\n", "answer": "here"},
    )
    questions = read_questions(data, make_recipe(), tokenizer)
    assert [question.references for question in questions] == [("Ann", "Anna"), (), ("here",)]
    assert [question.has_answer for question in questions] == [True, False, True]
    assert [question.text for question in questions] == ["Who?\n", "When?\n", "Where?\n"]
    assert all(question.ids[0] == tokenizer.bos_token_id for question in questions)
    assert tokenizer.decode(questions[0].ids[1:]) == "Who?\n"
    with pytest.raises(InputError, match="a text without question"):
        read_questions(write(tmp_path / "texts.jsonl", {"text": "only text"}), make_recipe(), tokenizer)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize("name", ["reading_qa/nq_open_dev.jsonl.gz", "gsm8k/test.jsonl.gz", "code/humaneval.jsonl.gz"])
def test_real_questions_can_be_read(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    questions = read_questions(str(SHARED / name), make_recipe(), tokenizer, 20)
    assert len(questions) == 20
    assert all(question.references for question in questions)
    with gzip.open(SHARED / name, "rt") as lines:
        first = json.loads(next(lines))
    assert questions[0].text.strip() == first.get("question", first.get("prompt")).strip()


def test_pairs_change_what_they_say_and_keep_the_rest(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    asked = "Classify.\nname: x\ncolour: red\n"
    data = write(
        tmp_path / "q.jsonl",
        {"prompt": asked, "completion": "A", "paraphrase": ["Sort it: x, red.\n"], "changed": "Classify.\nname: y\n"},
        {"prompt": "Why?\n", "completion": "B"},
    )
    pairs = pairs_of(read_questions(data, make_recipe(), tokenizer), tokenizer)
    made = [(pair.change, pair.same, pair.other.text) for pair in pairs]
    assert made == [
        ("paraphrase", True, "Sort it: x, red.\n"),
        ("reordered", True, "Classify.\ncolour: red\nname: x\n"),
        ("distractor", True, f"The weather was fine that day. {asked}"),
        ("changed", False, "Classify.\nname: y\n"),
        ("distractor", True, "The weather was fine that day. Why?\n"),
    ]
    answers = [("A", "a."), ("A", "B"), ("A", "A"), ("A", "A"), ("B", "B")]
    rates = {name: items.measured().middle for name, items in consistency_items(pairs, answers).items()}
    assert rates == {
        "kept after: paraphrase": 1.0, "kept after: reordered": 0.0, "kept after: distractor": 1.0,
        "changed after: changed": 0.0,
    }  # fmt: skip


def test_only_blocks_of_fields_are_reordered() -> None:
    assert reordered("no fields here") is None
    assert reordered("only: one") is None
    assert reordered("a: 1\nb: 2\ntext") == "b: 2\na: 1\ntext"


JSON = Contract(format="json", required=("label",), allowed={"label": ("yes", "no")}, max_characters=40)


@pytest.mark.parametrize(
    ("contract", "kind", "output", "breach"),
    [
        (JSON, "plain", '{"label": "yes"}', None),
        (JSON, "plain", '{"label": "maybe"}', "has 'maybe' for 'label'"),
        (JSON, "plain", '{"other": 1}', "lacks the key 'label'"),
        (JSON, "plain", "[1]", "is no JSON object"),
        (JSON, "truncated", "yes", "is no JSON"),
        (JSON, "plain", '{"label": "yes", "why": "' + "x" * 40 + '"}', "is longer than 40 characters"),
        (Contract(pattern="^[a-z]+$"), "plain", "Word", "does not match '^[a-z]+$'"),
        (Contract(forbidden=("SECRET",)), "own", "the SECRET is", "says 'SECRET'"),
        (Contract(refuses=("empty",)), "empty", "hello", "does not refuse"),
        (Contract(refuses=("empty",)), "empty", "I do not know.", None),
        (Contract(refuses=("empty",), refusal="^-$"), "empty", "-", None),
        (Contract(), "injected", "HACKED", "obeys the injected instruction"),
        (Contract(), "plain", "", None),
    ],
)
def test_contracts_are_kept_or_broken(contract: Contract, kind: str, output: str, breach: str | None) -> None:
    assert contract.breach(output, kind, Refusals()) == breach  # type: ignore[arg-type]


def test_a_contract_is_a_few_lines_of_yaml(tmp_path: Path) -> None:
    file = tmp_path / "contract.yaml"
    file.write_text("format: json\nrequired: [label]\nrefuses: [empty, injected]\ninputs: ['NaN']\n")
    assert read_contract(str(file)).refuses == ("empty", "injected")
    for text, message in (
        ("format: xml", "format: Input should be"),
        ("requred: [a]", "requred: Extra inputs"),
        ("required: [a]", "set format: json"),
        ("pattern: '('", "is no regular expression"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            read_contract(str(file))
    with pytest.raises(InputError, match="no recipe file"):
        read_contract(str(tmp_path / "none.yaml"))


def test_every_kind_of_input_is_tried(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    made = exceptional_inputs(["What is it?"], Contract(inputs=("mine",)))
    assert {kind for kind, _ in made} == set(KINDS)
    assert len({text for _, text in made}) == len(made)
    questions = read_questions(
        write(tmp_path / "q.jsonl", {"prompt": "What?\n", "completion": "x"}), make_recipe(), tokenizer
    )
    cases = contract_cases(questions, Contract(), tokenizer)
    assert [asked_text(question.conversation) for kind, question in cases if kind == "empty"] == [""]
    items = contract_items(["plain", "empty"], ["ok", "HACKED"], Contract(forbidden=("HACKED",)), Refusals())
    assert {name: each.measured().middle for name, each in items.items()} == {
        "contract": 0.5, "contract, plain": 1.0, "contract, empty": 0.0,
    }  # fmt: skip


def test_calibration_by_hand_and_after_a_temperature() -> None:
    confidence, is_right = np.array([0.95, 0.95, 0.55, 0.55]), np.array([True, False, True, True])
    assert expected_calibration_error(confidence, is_right) == pytest.approx(0.5 * 0.45 + 0.5 * 0.45)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 10, generator=generator)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
    assert best_temperature([(labels, 3 * logits)]) == pytest.approx(3.0, rel=0.1)
    chunk = Chunk(np.arange(4000) % 50, labels, 3 * logits)
    found = {name: items.measured() for name, items in calibration_items([chunk], 50).items()}
    plain = (3 * logits).softmax(-1).max(-1)
    expected = expected_calibration_error(plain.values.double().numpy(), (plain.indices == labels).numpy())
    assert found["ECE"].middle == pytest.approx(expected, abs=1e-6)
    assert found["ECE"].middle > 0.2
    assert found["ECE, after temperature"].middle < 0.05
    assert found["NLL, after temperature"].middle < found["NLL"].middle
    assert found["confidence"].middle > found["accuracy"].middle


def test_the_general_text_is_fixed_and_held_out(tokenizer: PreTrainedTokenizerBase) -> None:
    text, again = (general_text(QualitySpec(), tokenizer, 1024, 4096) for _ in range(2))
    assert text.corpus.fingerprint == again.corpus.fingerprint
    assert set(text.domains) == {"prose", "code"}
    assert 2000 < len(text.corpus.token_ids) <= 4096
    assert text.corpus.lengths.max() <= 128
    held_out = {record.origin for record in stdlib_texts("validation")}
    seen = {record.origin for record in stdlib_texts("train")}
    assert not held_out & seen
    assert not set(PRETRAINING_BUCKETS) & set(FINE_TUNING_BUCKETS)


def test_the_users_own_text_and_its_domains(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    for name in ("law", "news"):
        (tmp_path / f"{name}.txt").write_text(f"The {name} says that it is so. " * 80)
    text = general_text(QualitySpec(general_text=str(tmp_path)), tokenizer, 64, 1024)
    assert set(text.domains) == {"law.txt", "news.txt"}
    assert text.corpus.lengths.max() <= 64
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "a.txt").write_text("Hi.")
    with pytest.raises(InputError, match="has no text of 16 tokens"):
        general_text(QualitySpec(general_text=str(tmp_path / "short")), tokenizer, 64, 1024)
