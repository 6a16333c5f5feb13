"""Tokenized documents, end to end in three flat arrays: the form in which everything behind the tokenizer sees data.

A million short records cost a million offsets, not a million Python objects.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


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

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, int64 (N,)."""
        return np.diff(self.offsets)

    @property
    def num_supervised(self) -> NDArray[np.int64]:
        """Supervised tokens of each document, int64 (N,)."""
        return np.diff(np.concatenate(([0], np.cumsum(self.is_supervised, dtype=np.int64)))[self.offsets])

    def document(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Return (token ids, supervision marks) of one document, views of the flat arrays."""
        part = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.token_ids[part], self.is_supervised[part]

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> Corpus:
        """Return a corpus of the documents at `indices`, in that order."""
        documents = [self.document(int(index)) for index in indices]
        return Corpus.from_documents(documents, [self.origins[int(index)] for index in indices])

    @property
    def fingerprint(self) -> str:
        """A hash of tokens, marks and boundaries: equal exactly when training would see the same data."""
        digest = hashlib.sha256()
        for array in (self.token_ids, np.packbits(self.is_supervised), self.offsets):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]

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
