"""From documents to token ids and the marks of what is learnt.

The whole text of a document is tokenized once, and a token is learnt when it lies within a learnt part of the
text. Where a prompt ends without a line end or a special token, the answer's first token may begin in the
prompt: it is learnt when all it takes from the prompt is blanks (" Paris" behind "Answer: "), and not learnt
otherwise, because the prompt alone would not have been cut there. Both are counted.

One BOS stands at the start where the tokenizer itself would put one; a chat template writes its own. Nothing
is left out or cut without being counted.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from tunewise.errors import InputError
from tunewise.recipe import Objective
from tunewise.workload.chat_template import ChatRenderer
from tunewise.workload.conversation import Document, PlainText
from tunewise.workload.corpus import Corpus
from tunewise.workload.rendering import PlainRenderer, Rendered, Renderer, eos_text
from tunewise.workload.tally import Event, Tally

TooLong = Literal["cut", "drop", "split", "error"]

_CHUNK_DOCUMENTS = 1000
_CHUNK_CHARACTERS = 4_000_000
_SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True, eq=False)
class Tokenized:
    """A corpus and what the splitter and the doctor must know about each of its N documents.

    Attributes:
        corpus: the documents.
        record_numbers: int64 (N,), the record that a document was made of; windows of one text share it.
        content_keys: uint64 (N,), hashes of the record's content up to case and blanks.
        prompt_keys: uint64 (N,), hashes of what stands before the last answer.
        token_keys: uint64 (N,), hashes of the document's token ids.
        num_records: records read.
        num_tokens_read: tokens before anything was cut or dropped.
        num_tokens_cut: tokens that `too_long` took away, those of dropped records included.
        tally: what else happened.
    """

    corpus: Corpus
    record_numbers: NDArray[np.int64]
    content_keys: NDArray[np.uint64]
    prompt_keys: NDArray[np.uint64]
    token_keys: NDArray[np.uint64]
    num_records: int
    num_tokens_read: int
    num_tokens_cut: int
    tally: Tally

    def take(self, indices: NDArray[np.int64]) -> Tokenized:
        """Return the documents at `indices`; the counts stay those of the whole."""
        return replace(
            self,
            corpus=self.corpus.take(indices),
            record_numbers=self.record_numbers[indices],
            content_keys=self.content_keys[indices],
            prompt_keys=self.prompt_keys[indices],
            token_keys=self.token_keys[indices],
        )

    def by_window(self) -> Tokenized:
        """Return the same documents, each with keys of its own tokens: windows of a text differ."""
        return replace(self, content_keys=self.token_keys, prompt_keys=self.token_keys)


@dataclass(frozen=True)
class Draft:
    """A document that awaits its tokens."""

    rendered: Rendered
    record_number: int
    content_key: int
    prompt_key: int
    origin: str


def renderer_for(tokenizer: PreTrainedTokenizerBase) -> Renderer:
    """Return the renderer that fits the tokenizer: its chat template, or the plain layout.

    Raises:
        InputError: there is neither a chat template nor an EOS token.
    """
    return ChatRenderer(tokenizer) if tokenizer.chat_template else PlainRenderer(eos_text(tokenizer))


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return [BOS] when the tokenizer itself puts it before a text (found out by trying), else []."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a").input_ids[:1] == [bos] else []


def tokenize(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    objective: Objective = "sft",
    max_length: int,
    too_long: TooLong = "cut",
    tally: Tally | None = None,
    first_record: int = 0,
) -> Tokenized:
    """Turn documents into a corpus, reading them lazily.

    Args:
        documents: in the normal form.
        tokenizer: a fast tokenizer.
        objective: "sft" learns answers (and plain texts whole); "continue" and "pretrain" learn every token.
        max_length: the most tokens of a document, BOS and EOS included.
        too_long: what happens to longer ones: "cut" keeps their beginning, "drop" leaves them out, "error"
            refuses, "split" makes windows of `max_length` tokens, each beginning with its predecessor's last
            token, so that every token is a target once. "split" needs texts, or an objective that learns
            every token.
        tally: where to count; a new one by default.
        first_record: the number of the first document, where these are a part of many.

    Raises:
        InputError: the tokenizer is slow or has no EOS, a template refuses a conversation, or `too_long` says
            so.
    """
    if not tokenizer.is_fast:
        raise InputError(f"the tokenizer {type(tokenizer).__name__} is a slow one; tunewise needs a tokenizer.json.")
    tally = Tally() if tally is None else tally
    builder = _Builder(max_length, too_long, tally)
    drafts = _Drafting(tokenizer, objective, too_long, tally, first_record)
    bos = bos_ids(tokenizer)
    for chunk in _chunks(drafts.drafts(documents)):
        for draft, ids, marks in _encoded(chunk, tokenizer, tally):
            if draft.rendered.takes_bos and bos and ids[:1].tolist() != bos:
                ids, marks = (
                    np.concatenate((np.array(bos, dtype=np.int32), ids)),
                    np.concatenate(([False], marks)),
                )
            builder.add(draft, ids, marks)
    return builder.build(drafts.num_records)


class _Drafting:
    """Lays documents out as text and counts them."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        objective: Objective,
        too_long: TooLong,
        tally: Tally,
        first_record: int,
    ) -> None:
        self.num_records = 0
        self._first_record = first_record
        self._renderer = renderer_for(tokenizer)
        self._eos = eos_text(tokenizer) if tokenizer.eos_token or not tokenizer.chat_template else ""
        self._learns_all = objective != "sft"
        self._may_split = too_long == "split"
        self._tally = tally

    def drafts(self, documents: Iterable[Document]) -> Iterator[Draft]:
        for number, document in enumerate(documents, start=self._first_record):
            self.num_records += 1
            if document.is_empty:
                self._tally.add(Event.EMPTY, document.origin)
                continue
            rendered = self._rendered(document)
            if not rendered.text.isascii() and (surrogate := _SURROGATE.search(rendered.text)):
                raise InputError(
                    f"{document.origin}: the text has {surrogate.group()!r}, half of a surrogate pair, "
                    "which is no character. Make the file anew (JSON needs both halves as \\u escapes)."
                )
            for event in rendered.events:
                self._tally.add(event, document.origin)
            yield Draft(rendered, number, document.content_key, document.prompt_key, document.origin)

    def _rendered(self, document: Document) -> Rendered:
        if isinstance(document, PlainText):
            if not self._eos:
                raise InputError(
                    "the tokenizer has no EOS token, which must end every text. Set one in the model folder."
                )
            text = document.text if document.text.endswith(self._eos) else document.text + self._eos
            return Rendered(text, ((0, len(text)),), takes_bos=True)
        if self._may_split and not self._learns_all:
            raise InputError(
                f"{document.origin}: too_long: split is for plain texts; conversations would lose their "
                "beginning. Choose cut, drop or error, or a greater max_length."
            )
        rendered = self._renderer.render(document)
        return replace(rendered, spans=((0, len(rendered.text)),)) if self._learns_all else rendered


def _chunks(drafts: Iterator[Draft]) -> Iterator[list[Draft]]:
    """Group drafts, so that the tokenizer's threads have work and memory stays bounded."""
    chunk: list[Draft] = []
    characters = 0
    for draft in drafts:
        chunk.append(draft)
        characters += len(draft.rendered.text)
        if len(chunk) >= _CHUNK_DOCUMENTS or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _encoded(
    chunk: Sequence[Draft], tokenizer: PreTrainedTokenizerBase, tally: Tally
) -> Iterator[tuple[Draft, NDArray[np.int32], NDArray[np.bool_]]]:
    whole = [draft.rendered.spans == ((0, len(draft.rendered.text)),) for draft in chunk]
    encoding = tokenizer(
        [draft.rendered.text for draft in chunk],
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=not all(whole),
        verbose=False,
    )
    offsets = encoding.get("offset_mapping", itertools.repeat(None))
    for draft, is_whole, ids, places in zip(chunk, whole, encoding["input_ids"], offsets, strict=False):
        if is_whole:
            yield draft, np.asarray(ids, dtype=np.int32), np.ones(len(ids), dtype=np.bool_)
            continue
        marks, events = _marks(np.asarray(places, dtype=np.int64).reshape(-1, 2), draft.rendered)
        for event in events:
            tally.add(event, draft.origin)
        yield draft, np.asarray(ids, dtype=np.int32), marks


def _marks(places_T2: NDArray[np.int64], rendered: Rendered) -> tuple[NDArray[np.bool_], set[Event]]:
    """Mark tokens (start and end characters, (T, 2)) within a span; say what happens at the spans'
    beginnings."""
    starts_T, ends_T = places_T2[:, 0], places_T2[:, 1]
    marks_T = np.zeros(len(places_T2), dtype=np.bool_)
    events: set[Event] = set()
    for start, end in rendered.spans:
        blanks_start = start
        while blanks_start > 0 and rendered.text[blanks_start - 1].isspace():
            blanks_start -= 1
        is_inside_T = (starts_T >= blanks_start) & (ends_T > start) & (ends_T <= end) & (ends_T > starts_T)
        if (is_inside_T & (starts_T < start)).any():
            events.add(Event.BLANK_JOINED)
        if ((starts_T < blanks_start) & (ends_T > start)).any():
            events.add(Event.STRADDLING)
        marks_T |= is_inside_T
    return marks_T, events


class _Builder:
    """Applies `too_long` and lays documents end to end in growing arrays (no Python object per token)."""

    def __init__(self, max_length: int, too_long: TooLong, tally: Tally) -> None:
        self._max_length = max_length
        self._too_long = too_long
        self._tally = tally
        self._ids, self._marks, self._offsets = array("i"), bytearray(), array("q", [0])
        self._records, self._content_keys, self._prompt_keys = array("q"), array("Q"), array("Q")
        self._token_keys = bytearray()
        self._origins: list[str] = []
        self._num_read = self._num_cut = 0

    def add(self, draft: Draft, ids: NDArray[np.int32], marks: NDArray[np.bool_]) -> None:
        """Take a document in, whole, cut or in windows, or count why not."""
        self._num_read += len(ids)
        if not marks[1:].any():
            self._tally.add(Event.NOTHING_SUPERVISED, draft.origin)
            return
        if len(ids) <= self._max_length:
            self._append(draft, ids, marks)
        elif self._too_long == "error":
            raise InputError(
                f"{draft.origin}: {len(ids)} tokens are more than max_length ({self._max_length}). "
                "Choose a greater max_length, or too_long: cut, drop or split."
            )
        elif self._too_long == "drop":
            self._tally.add(Event.DROPPED_TOO_LONG, draft.origin)
            self._num_cut += len(ids)
        elif self._too_long == "split" and self._max_length > 1:
            self._tally.add(Event.SPLIT, draft.origin)
            for start in range(0, len(ids) - 1, self._max_length - 1):
                window = slice(start, start + self._max_length)
                self._append(draft, ids[window], marks[window])
        else:
            self._cut(draft, ids, marks)

    def _cut(self, draft: Draft, ids: NDArray[np.int32], marks: NDArray[np.bool_]) -> None:
        self._num_cut += len(ids) - self._max_length
        if marks[1 : self._max_length].any():
            self._tally.add(Event.CUT, draft.origin)
            self._append(draft, ids[: self._max_length], marks[: self._max_length])
        else:
            self._num_cut += self._max_length
            self._tally.add(Event.ANSWER_CUT_AWAY, draft.origin)

    def _append(self, draft: Draft, ids: NDArray[np.int32], marks: NDArray[np.bool_]) -> None:
        plain = ids.astype(np.intc).tobytes()
        self._ids.frombytes(plain)
        self._token_keys += hashlib.blake2b(plain, digest_size=8).digest()
        self._marks += b"\x00" + marks[1:].astype(np.uint8).tobytes()
        self._offsets.append(len(self._ids))
        self._records.append(draft.record_number)
        self._content_keys.append(draft.content_key)
        self._prompt_keys.append(draft.prompt_key)
        self._origins.append(draft.origin)

    def build(self, num_records: int) -> Tokenized:
        """Return what was taken in."""
        corpus = Corpus(
            token_ids=np.frombuffer(self._ids, dtype=np.intc).astype(np.int32),
            is_supervised=np.frombuffer(self._marks, dtype=np.uint8).astype(np.bool_),
            offsets=np.frombuffer(self._offsets, dtype=np.int64).copy(),
            origins=self._origins,
        )
        return Tokenized(
            corpus=corpus,
            record_numbers=np.frombuffer(self._records, dtype=np.int64).copy(),
            content_keys=np.frombuffer(self._content_keys, dtype=np.uint64).copy(),
            prompt_keys=np.frombuffer(self._prompt_keys, dtype=np.uint64).copy(),
            token_keys=np.frombuffer(bytes(self._token_keys), dtype=np.uint64),
            num_records=num_records,
            num_tokens_read=self._num_read,
            num_tokens_cut=self._num_cut,
            tally=self._tally,
        )
