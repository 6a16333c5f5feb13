"""Tokenized documents, end to end in three flat arrays: the form in which everything behind the tokenizer sees data.

A million short records cost a million offsets, not a million Python objects; the arrays may lie in files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tunewise.workload.flat import Growing, blocks, gathered, sums


class Origins(Sequence[str]):
    """Places such as "train.jsonl:17" as one text with offsets.

    Attributes:
        text: uint8, the places in UTF-8 end to end.
        offsets: int64 (N + 1,), place i is `text[offsets[i] : offsets[i + 1]]`.
    """

    def __init__(self, text: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        self.text, self.offsets = text, offsets

    @staticmethod
    def of(places: Sequence[str]) -> Origins:
        """Return a list of places in this form."""
        if isinstance(places, Origins):
            return places
        text, lengths = Growing(np.uint8), np.empty(len(places), dtype=np.int64)
        for number, place in enumerate(places):
            encoded = place.encode("utf-8", "surrogatepass")
            lengths[number] = len(encoded)
            text.add(np.frombuffer(encoded, dtype=np.uint8))
        return Origins(text.array(), np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(lengths))))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # as of every sequence: one, or a list
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        number = int(index) + (len(self) if index < 0 else 0)
        if not 0 <= number < len(self):
            raise IndexError(index)
        return bytes(self.text[self.offsets[number] : self.offsets[number + 1]]).decode("utf-8", "surrogatepass")

    def take(self, indices: NDArray[np.int64]) -> Origins:
        """Return the places at `indices`, in that order."""
        return Origins(*gathered(self.text, self.offsets, indices))


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents as token ids and the marks that say which of these tokens are learnt.

    Shapes: T is the number of tokens of all documents, N the number of documents.

    Attributes:
        token_ids: int32 (T,), document after document.
        is_supervised: bool (T,), True where this token is a target: the loss of predicting it from what stands before
            it in its document counts. A document's first token has nothing before it and is never a target.
        offsets: int64 (N + 1,), document i is `token_ids[offsets[i] : offsets[i + 1]]`.
        origins: N places such as "train.jsonl:17", for error messages.
    """

    token_ids: NDArray[np.int32]
    is_supervised: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    origins: Sequence[str]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, int64 (N,)."""
        return np.diff(self.offsets)

    @cached_property
    def num_supervised(self) -> NDArray[np.int64]:
        """Supervised tokens of each document, int64 (N,)."""
        return sums(self.is_supervised, self.offsets)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of tokens, marks and boundaries: equal exactly when training would see the same data."""
        digest = hashlib.sha256()
        digest.update(np.ascontiguousarray(self.token_ids).data)
        step = 1 << 23  # a multiple of 8, so that pieces are packed as the whole would be
        for start in range(0, len(self.is_supervised), step):
            digest.update(np.packbits(self.is_supervised[start : start + step]).data)
        digest.update(np.ascontiguousarray(self.offsets).data)
        return digest.hexdigest()[:16]

    def knowing(self, num_supervised: NDArray[np.int64], fingerprint: str) -> Corpus:
        """Return this corpus with two answers that were computed before, so that nothing has to be read for them."""
        vars(self).update(num_supervised=num_supervised, fingerprint=fingerprint)
        return self

    def document(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Return (token ids, supervision marks) of one document, views of the flat arrays."""
        part = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.token_ids[part], self.is_supervised[part]

    def pieces(self) -> Iterator[tuple[slice, NDArray[np.int32], NDArray[np.bool_]]]:
        """Yield (documents, their token ids, their marks) of some million tokens at once, in order."""
        for part in blocks(self.offsets):
            tokens = slice(int(self.offsets[part.start]), int(self.offsets[part.stop]))
            yield part, self.token_ids[tokens], self.is_supervised[tokens]

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> Corpus:
        """Return a corpus of the documents at `indices`, in that order."""
        wanted = np.asarray(indices, dtype=np.int64).reshape(-1)
        token_ids, offsets = gathered(self.token_ids, self.offsets, wanted)
        is_supervised, _ = gathered(self.is_supervised, self.offsets, wanted)
        if isinstance(self.origins, Origins):
            return Corpus(token_ids, is_supervised, offsets, self.origins.take(wanted))
        return Corpus(token_ids, is_supervised, offsets, [self.origins[index] for index in wanted.tolist()])

    @staticmethod
    def joined(first: Corpus, second: Corpus) -> Corpus:
        """Return the documents of both, one after the other."""
        token_ids, is_supervised, text = Growing(np.int32), Growing(np.bool_), Growing(np.uint8)
        origins = [Origins.of(corpus.origins) for corpus in (first, second)]
        for corpus, places in zip((first, second), origins, strict=True):
            token_ids.add(corpus.token_ids)
            is_supervised.add(corpus.is_supervised)
            text.add(places.text)
        one, other = (places.offsets for places in origins)
        return Corpus(
            token_ids=token_ids.array(),
            is_supervised=is_supervised.array(),
            offsets=np.concatenate((first.offsets, second.offsets[1:] + first.offsets[-1])),
            origins=Origins(text.array(), np.concatenate((one, other[1:] + one[-1]))),
        )

    @staticmethod
    def from_documents(
        documents: Sequence[tuple[Sequence[int] | NDArray[np.int32], Sequence[bool] | NDArray[np.bool_]]],
        origins: Sequence[str],
    ) -> Corpus:
        """Lay documents, each a pair (token ids, supervision marks), end to end; first tokens lose their mark."""
        lengths = [len(ids) for ids, _ in documents]
        offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))).astype(np.int64)
        token_ids = np.empty(int(offsets[-1]), dtype=np.int32)
        is_supervised = np.empty(int(offsets[-1]), dtype=np.bool_)
        for (ids, marks), start, end in zip(documents, offsets[:-1], offsets[1:], strict=True):
            token_ids[start:end] = ids
            is_supervised[start:end] = marks
        is_supervised[offsets[:-1][np.asarray(lengths) > 0]] = False
        return Corpus(token_ids, is_supervised, offsets, list(origins))
