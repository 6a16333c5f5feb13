"""Flat arrays in pieces: in memory or in a file, block by block or at once, the same."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunewise.workload import flat
from tunewise.workload.corpus import Corpus, Origins


@pytest.fixture(params=[flat.LARGE_BYTES, 0], ids=["memory", "file"])
def _where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("TUNEWISE_CACHE", str(tmp_path))
    monkeypatch.setattr(flat, "LARGE_BYTES", request.param)


@pytest.mark.usefixtures("_where")
def test_what_grows_is_what_was_added() -> None:
    growing = flat.Growing(np.int32)
    pieces = [np.arange(n, dtype=np.int32) for n in (3, 0, 5, 1)]
    for piece in pieces:
        growing.add(piece)
    assert growing.array().tolist() == np.concatenate(pieces).tolist()
    assert flat.Growing(np.uint8).array().tolist() == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=20), st.data(), st.integers(1, 12))
def test_gathering_in_blocks(lengths: list[int], data: st.DataObject, block: int) -> None:
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    values = np.arange(100, 100 + offsets[-1]).astype(np.int32)
    wanted = data.draw(st.lists(st.integers(0, max(0, len(lengths) - 1)), max_size=15)) if lengths else []
    pieces = [values[offsets[i] : offsets[i + 1]].tolist() for i in wanted]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flat, "BLOCK", block)
        found, ends = flat.gathered(values, offsets, np.array(wanted, dtype=np.int64))
        marks = values % 3 == 0
        counts = flat.sums(marks, offsets)
        covered = [index for part in flat.blocks(offsets) for index in range(part.start, part.stop)]
    assert [found[a:b].tolist() for a, b in pairwise(ends)] == pieces
    assert counts.tolist() == [int(marks[a:b].sum()) for a, b in pairwise(offsets)]
    assert covered == list(range(len(lengths)))


@pytest.mark.usefixtures("_where")
def test_a_large_gather_lies_in_a_file() -> None:
    values, offsets = np.arange(12, dtype=np.int32), np.array([0, 5, 7, 12])
    found, _ = flat.gathered(values, offsets, np.array([2, 0]))
    assert found.tolist() == [7, 8, 9, 10, 11, 0, 1, 2, 3, 4]


def test_origins_are_a_sequence_of_texts() -> None:
    places = ["a.jsonl:1", "", "ü.csv row 2", "\ud800"]
    origins = Origins.of(places)
    assert list(origins) == places
    assert (origins[-1], origins[1:3]) == (places[-1], places[1:3])
    assert list(origins.take(np.array([2, 0]))) == [places[2], places[0]]
    with pytest.raises(IndexError):
        origins[4]


def test_a_fingerprint_does_not_depend_on_the_pieces_it_is_made_of() -> None:
    ids = np.arange(1, 50, dtype=np.int32)
    corpus = Corpus.from_documents([(ids, ids % 2 == 0), (ids[:3], ids[:3] > 0)], ["a", "b"])
    plain = hashlib.sha256()
    for array in (corpus.token_ids, np.packbits(corpus.is_supervised), corpus.offsets):
        plain.update(array.tobytes())
    assert corpus.fingerprint == plain.hexdigest()[:16]


@pytest.mark.usefixtures("_where")
def test_joined_corpora_are_the_documents_of_both() -> None:
    ids = np.arange(1, 9, dtype=np.int32)
    one = Corpus.from_documents([(ids[:3], ids[:3] > 1), (ids, ids % 2 == 0)], ["a:1", "a:2"])
    other = Corpus.from_documents([(ids[2:], ids[2:] > 4)], ["b:1"])
    whole = Corpus.joined(one, other)
    plain = Corpus.from_documents([*(one.document(i) for i in range(2)), other.document(0)], ["a:1", "a:2", "b:1"])
    assert list(whole.origins) == plain.origins
    assert whole.fingerprint == plain.fingerprint
    assert whole.num_supervised.tolist() == plain.num_supervised.tolist()
