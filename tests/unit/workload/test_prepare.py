"""From a recipe to corpora, and what is said on the way; real data sets where they are at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.unit.workload import tiny_tokenizers as tiny
from tests.unit.workload.tiny_tokenizers import tiny_tokenizer
from tunewise.errors import InputError
from tunewise.recipe import DataSpec, ModelSpec, Objective, Recipe
from tunewise.workload.prepare import Prepared, default_max_length, prepare, resolved_too_long

SHARED = Path(__file__).parents[4] / "shared" / "data"


def _recipe(source: Path | str, objective: Objective = "sft", seed: int = 0, **data: Any) -> Recipe:
    spec = DataSpec(source=str(source), **data)
    return Recipe(model=ModelSpec(name="tiny"), data=spec, objective=objective, seed=seed)


def _prepared(recipe: Recipe, template: str | None = None) -> Prepared:
    return prepare(recipe, tiny_tokenizer(template), context_length=512, vocab_size=400)


def _rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = [{"question": f"What is {i}?", "answer": f"The answer is {i}."} for i in range(100)]
    return _rows(tmp_path / "train.jsonl", rows)


def test_said_and_split(pairs: Path) -> None:
    prepared = _prepared(_recipe(pairs))
    assert (len(prepared.train), len(prepared.validation)) == (95, 5)
    assert any("prompt <- 'question', completion <- 'answer'" in sentence for sentence in prepared.said)
    assert any("longer than 512 tokens: cut" in sentence for sentence in prepared.said)
    assert any("95 documents for training, 5 for validation" in sentence for sentence in prepared.said)


def test_fingerprint_depends_on_data_and_seed_only(pairs: Path, tmp_path: Path) -> None:
    first = _prepared(_recipe(pairs)).data_fingerprint
    assert _prepared(_recipe(pairs, fields={"prompt": "question"})).data_fingerprint == first
    assert _prepared(_recipe(pairs, seed=1)).data_fingerprint != first
    changed = tmp_path / "changed.jsonl"
    changed.write_text(pairs.read_text().replace("answer is 7.", "answer is 8."))
    assert _prepared(_recipe(changed)).data_fingerprint != first


def test_prompts_do_not_straddle(tmp_path: Path) -> None:
    rows = [{"mr": f"name {i % 10}", "ref": f"reference {i}"} for i in range(100)]
    prepared = _prepared(_recipe(_rows(tmp_path / "e2e.jsonl", rows), validation_fraction=0.1))
    lines = [int(origin.split(":")[1]) - 1 for origin in prepared.validation.origins]
    assert len({line % 10 for line in lines}) == 1
    assert len(lines) == 10


def test_explicit_validation_and_its_leak(pairs: Path, tmp_path: Path) -> None:
    other = _rows(tmp_path / "v.jsonl", [{"question": f"Who is {i}?", "answer": "me"} for i in range(9)])
    prepared = _prepared(_recipe(pairs, validation=str(other)))
    assert (len(prepared.train), len(prepared.validation)) == (100, 9)
    with pytest.raises(InputError, match="validation documents whose content is in the training data, of 100: 100"):
        _prepared(_recipe(pairs, validation=str(pairs)))


def test_system_prompt_is_put_in_front(pairs: Path) -> None:
    tokenizer = tiny_tokenizer(tiny.CHATML)
    prepared = _prepared(_recipe(pairs, system_prompt="be kind"), tiny.CHATML)
    assert tokenizer.decode(prepared.train.document(0)[0]).startswith("<|im_start|>system\nbe kind<|im_end|>")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"max_length": 1000}, "1000 tokens are more than the model's context of 512"),
        ({"too_long": "split"}, "split is for plain texts"),
        ({"format": "messages"}, "do not fit the format messages"),
        ({"max_length": 8}, "training on these data makes no sense"),
    ],
)
def test_wishes_that_cannot_be_honoured(pairs: Path, data: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _prepared(_recipe(pairs, **data))


def test_all_records_empty_is_told(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"question": "a", "answer": ""}, {"question": "b", "answer": None}]
    with pytest.raises(InputError, match=r"(?s)Nothing is left to learn.*train\.jsonl:1"):
        _prepared(_recipe(_rows(tmp_path / "train.jsonl", rows)))


def test_one_long_text_is_split_by_windows(tmp_path: Path) -> None:
    words = " ".join(f"word{i}" for i in range(5000))
    (tmp_path / "book.txt").write_text(words)
    prepared = _prepared(_recipe(tmp_path / "book.txt", "pretrain", max_length=128))
    assert prepared.train.lengths.max() == 128
    share = len(prepared.validation) / (len(prepared.train) + len(prepared.validation))
    assert share == pytest.approx(0.05, abs=0.01)
    with pytest.raises(InputError, match="too_long: split"):
        _prepared(_recipe(tmp_path / "book.txt"))


def test_defaults() -> None:
    assert (default_max_length(512), default_max_length(131072)) == (512, 2048)
    assert resolved_too_long(_recipe("x")) == "cut"
    assert resolved_too_long(_recipe("x", "pretrain")) == "split"
    assert resolved_too_long(_recipe("x", "pretrain", too_long="cut")) == "cut"


@pytest.mark.parametrize("objective", ["sft", "pretrain"])
def test_stdlib(objective: Objective) -> None:
    prepared = _prepared(_recipe("stdlib", objective, max_records=40))
    assert len(prepared.train) >= 35
    assert not {origin.split(":")[0] for origin in prepared.train.origins} & {
        origin.split(":")[0] for origin in prepared.validation.origins
    }
    assert prepared.diagnosis.errors == ()


REAL = [
    ("gpteacher/toolformer_sim06.jsonl.gz", "alpaca", {}),
    ("gsm8k/test.jsonl.gz", "prompt-completion", {}),
    ("chat/oasst_en_100_messages.jsonl.gz", "messages", {}),
    ("chat/glaive_toolcall_en_demo.jsonl.gz", "sharegpt", {}),
    ("self_instruct/seed_tasks.jsonl.gz", "alpaca", {}),
    ("code/conala_train.jsonl.gz", "prompt-completion", {}),
    ("code/mbpp.jsonl.gz", "alpaca", {"instruction": "text", "output": "code"}),
    ("e2e_nlg/devset.csv.gz", "prompt-completion", {}),
    ("tinystories/valid_head.txt.gz", "text", {}),
]


@pytest.mark.skipif(not SHARED.exists(), reason=f"no real data at {SHARED}")
@pytest.mark.parametrize("template", [None, tiny.CHATML, tiny.CHATML_WITH_GENERATION])
@pytest.mark.parametrize(("name", "format", "fields"), REAL)
def test_real_data(name: str, format: str, fields: dict[str, str], template: str | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "stories260k")
    if template:
        tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
        tokenizer.chat_template = template
    objective: Objective = "pretrain" if format == "text" else "sft"
    recipe = _recipe(SHARED / name, objective, fields=fields, max_records=300)
    prepared = prepare(recipe, tokenizer, context_length=2048, vocab_size=len(tokenizer))
    assert any(f"format {format}:" in sentence for sentence in prepared.said)
    ends = {tokenizer.eos_token_id, *(tokenizer.convert_tokens_to_ids(["<|im_end|>"]) if template else [])}
    if format != "text":
        fitting = np.flatnonzero(prepared.train.lengths < 2048)
        assert len(fitting) > 0
        for index in fitting:
            ids, marks = prepared.train.document(int(index))
            assert int(ids[marks][-1]) in ends
