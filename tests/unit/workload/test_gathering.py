"""Chunks and processes change nothing: not the documents, not the counts, not which error comes first."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from tests.unit.workload.tiny_tokenizers import tiny_tokenizer
from tunewise.errors import InputError
from tunewise.workload import gathering
from tunewise.workload.conversation import PlainText
from tunewise.workload.record import Record
from tunewise.workload.tally import Event, Tally
from tunewise.workload.tokens import Tokenized, tokenize

TOKENIZER = tiny_tokenizer()


def work(records: Sequence[Record], first: int) -> Tokenized:
    """Texts; "bad" is refused, and "end" ends the process that works on it, but not the one that asked."""
    for record in records:
        if record.fields["text"] == "bad":
            raise InputError(f"{record.origin}: bad")
        if record.fields["text"] == "end" and os.getpid() != PARENT:
            os.kill(os.getpid(), signal.SIGKILL)
    texts = (PlainText(record.fields["text"], record.origin) for record in records)
    return tokenize(texts, TOKENIZER, objective="pretrain", max_length=16, too_long="split", first_record=first)


PARENT = os.getpid()


def records(count: int, **special: str) -> Iterator[Record]:
    """Texts of several lengths, some empty; `special` puts a text at "n17"; "stop" breaks the reading."""
    for number in range(count):
        text = special.get(f"n{number}", "" if number % 11 == 5 else f"text {number} " * (1 + number % 7))
        if text == "stop":
            raise InputError(f"f:{number}: unreadable")
        yield Record({"text": text}, f"f:{number}")


@pytest.fixture(params=[1, 2], ids=["one process", "two processes"])
def _processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "CHUNK_RECORDS", 10)
    monkeypatch.setattr(gathering, "num_cores", lambda: request.param)


def assert_same(found: Tokenized, expected: Tokenized) -> None:
    for name in ("token_ids", "is_supervised", "offsets"):
        assert np.array_equal(getattr(found.corpus, name), getattr(expected.corpus, name)), name
    for name in ("record_numbers", "content_keys", "prompt_keys", "token_keys"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
    assert list(found.corpus.origins) == list(expected.corpus.origins)
    for name in ("num_records", "num_tokens_read", "num_tokens_cut"):
        assert getattr(found, name) == getattr(expected, name)
    for event in Event:
        assert found.tally.count(event) == expected.tally.count(event)
        assert found.tally.origins(event) == expected.tally.origins(event)


@pytest.mark.usefixtures("_processes")
def test_many_chunks_are_one_piece_of_work() -> None:
    expected = work(list(records(97)), 0)
    assert expected.tally.count(Event.EMPTY) > 5
    assert_same(gathering.tokenized(records(97), work), expected)


@pytest.mark.usefixtures("_processes")
@pytest.mark.parametrize(
    ("special", "message"),
    [
        ({"n3": "bad"}, "f:3: bad"),
        ({"n71": "bad", "n88": "bad"}, "f:71: bad"),
        ({"n71": "bad", "n74": "stop"}, "f:71: bad"),
        ({"n55": "stop", "n71": "bad"}, "f:55: unreadable"),
    ],
)
def test_the_earliest_error_is_told(special: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        gathering.tokenized(records(97, **special), work)


@pytest.mark.usefixtures("_processes")
def test_the_work_of_a_process_that_was_ended_is_done_here() -> None:
    expected = work(list(records(397, n64="end")), 0)  # most chunks come when the pool is broken already
    assert_same(gathering.tokenized(records(397, n64="end"), work), expected)


def test_tallies_merge_in_order() -> None:
    first, second, whole = Tally(), Tally(), Tally()
    for number in range(8):
        for tally in (whole, first if number < 3 else second):
            tally.add(Event.CUT, f"f:{number // 2}")
    first.merge(second)
    assert first.count(Event.CUT) == whole.count(Event.CUT)
    assert first.origins(Event.CUT) == whole.origins(Event.CUT)


def test_no_records_are_no_documents() -> None:
    nothing: Any = gathering.tokenized(iter(()), work)
    assert (len(nothing.corpus), nothing.num_records) == (0, 0)
