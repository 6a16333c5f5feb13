"""General text in two parts that never meet, and replay to the token."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tunewise.errors import InputError
from tunewise.methods.reading import recipe_from_mapping
from tunewise.recipe import ModelSpec, ReplaySpec
from tunewise.workload.corpus import Corpus
from tunewise.workload.general_text import Use, general_corpus
from tunewise.workload.model import load_tokenizer
from tunewise.workload.prepare import prepare
from tunewise.workload.replay import mix

USES: tuple[Use, ...] = ("replayed", "measured")
TOKENIZER = load_tokenizer(ModelSpec(name="embedded"))


def write_lines(file: Path, count: int = 60) -> Path:
    """Write so many different short texts, a JSON record each."""
    written = (f"Text number {n} tells of {n * 7 % 13} ships and {n * 5 % 11} harbours." for n in range(count))
    file.write_text("\n".join(json.dumps({"text": text}) for text in written), encoding="utf-8")
    return file


def texts(corpus: Corpus) -> list[str]:
    return [TOKENIZER.decode(corpus.document(index)[0].tolist()) for index in range(len(corpus))]


def part(source: str, use: Use, max_tokens: int = 10**6, seed: int = 0) -> Corpus:
    return general_corpus(source, use, TOKENIZER, max_length=64, max_tokens=max_tokens, seed=seed)


def test_the_two_parts_of_a_file_are_all_of_it_and_never_meet(tmp_path: Path) -> None:
    file = str(write_lines(tmp_path / "general.jsonl"))
    replayed, measured = set(texts(part(file, "replayed"))), set(texts(part(file, "measured")))
    assert len(replayed) + len(measured) == 60
    assert not replayed & measured
    assert 4 <= len(measured) <= 24


def test_one_long_text_is_divided_by_blocks_whatever_the_windows(tmp_path: Path) -> None:
    """Replayed pieces are as long as training documents, measured windows longer; still they must not overlap."""
    numbers = np.random.default_rng(0).permutation(10**5)[:9000]
    file = tmp_path / "book.txt"
    file.write_text(" ".join(f"{number:05d}" for number in numbers), encoding="utf-8")
    words = []
    for use, length in (("replayed", 23), ("measured", 200)):
        corpus = general_corpus(str(file), use, TOKENIZER, max_length=length, max_tokens=10**6)  # type: ignore[arg-type]
        words.append({word for text in texts(corpus) for word in re.findall(r"(?<= )\d{5}(?= )", text)})
    assert len(words[0]) > 1000
    assert len(words[1]) > 500
    assert not words[0] & words[1]


def test_the_default_replays_other_files_than_it_measures() -> None:
    replayed, measured = part("default", "replayed", 3000), part("default", "measured", 3000)
    assert not set(replayed.origins) & set(measured.origins)
    assert int(replayed.is_supervised.sum()) == int(measured.is_supervised.sum()) == 3000


@pytest.mark.parametrize("max_tokens", [1, 7, 100, 333])
def test_as_many_tokens_as_asked_for(max_tokens: int, tmp_path: Path) -> None:
    file = str(write_lines(tmp_path / "general.jsonl"))
    found = part(file, "replayed", max_tokens)
    assert int(found.is_supervised.sum()) == max_tokens
    again, other = part(file, "replayed", max_tokens), part(file, "replayed", max_tokens, seed=1)
    assert again.fingerprint == found.fingerprint
    assert other.fingerprint != found.fingerprint or max_tokens < 100, "few tokens may be the same by chance"


def test_too_little_text_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("One window.", encoding="utf-8")
    with pytest.raises(InputError, match="too short to be divided"):
        [part(str(file), use) for use in USES]


def made(num_documents: int, length: int) -> Corpus:
    ids = np.random.default_rng(0).integers(5, 90, (num_documents, length)).astype(np.int32)
    return Corpus.from_documents([(row, np.arange(length) > length // 2) for row in ids], ["made"] * num_documents)


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.25, 0.5])
def test_replay_is_its_fraction_of_all_supervised_tokens(fraction: float, tmp_path: Path) -> None:
    train, file = made(40, 30), str(write_lines(tmp_path / "general.jsonl"))
    mixed = mix(train, ReplaySpec(fraction=fraction, source=file), TOKENIZER, max_length=64, seed=3)
    total = int(mixed.corpus.is_supervised.sum())
    assert mixed.num_tokens == total - int(train.is_supervised.sum())
    assert abs(mixed.num_tokens - fraction * total) <= 1
    assert len(mixed.corpus) == 40 + mixed.num_pieces
    for index in range(40):
        for ours, theirs in zip(mixed.corpus.document(index), train.document(index), strict=True):
            assert np.array_equal(ours, theirs)
    pieces = mixed.corpus.lengths[40:]
    assert pieces.max() <= 30, "pieces are no longer than a training document is on average"
    for index in range(40, len(mixed.corpus)):
        assert mixed.corpus.document(index)[1][1:].all(), "every token of general text is learnt"
    assert f"{mixed.num_tokens} of {total} supervised tokens" in mixed.said.replace(",", "")


def test_more_replay_than_there_is_text_is_an_error(tmp_path: Path) -> None:
    replay = ReplaySpec(fraction=0.5, source=str(write_lines(tmp_path / "general.jsonl")))
    with pytest.raises(InputError, match=r"only [0-9,]+ that may be replayed"):
        mix(made(4000, 30), replay, TOKENIZER, max_length=64, seed=0)


def test_prepared_data_have_both_and_say_so(tmp_path: Path) -> None:
    general = str(write_lines(tmp_path / "general.jsonl"))
    records = tmp_path / "records.jsonl"
    records.write_text("\n".join(f'{{"prompt": "Say {n}", "completion": "Well, {n}."}}' for n in range(40)))
    plain = {"model": "embedded", "data": {"source": str(records)}}
    replaying = {**plain, "data": {**plain["data"], "replay": {"fraction": 0.1, "source": general}}}  # type: ignore[dict-item]
    measuring = {**replaying, "evaluation": {"general_text": general, "general_tokens": 50}}
    found = [prepare(recipe_from_mapping(r), TOKENIZER, 1024, 4096) for r in (plain, replaying, measuring)]
    assert len({data.data_fingerprint for data in found}) == 3
    assert [data.validation.fingerprint for data in found] == [found[0].validation.fingerprint] * 3
    assert [bool(data.replayed) for data in found] == [False, True, True]
    assert found[2].replayed in found[2].said
    assert found[1].general is None
    assert found[2].general is not None
    assert int(found[2].general.is_supervised.sum()) == 50


def test_a_misspelt_field_of_replay_names_the_nearest() -> None:
    with pytest.raises(InputError, match="Did you mean 'fraction'"):
        recipe_from_mapping({"model": "embedded", "data": {"source": "x.jsonl", "replay": {"fractoin": 0.1}}})
