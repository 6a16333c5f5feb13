"""From documents to micro-batches: which documents share a step, and how they are laid out in rows.

Two decisions, kept apart on purpose:

* `GlobalBatches` draws at random which documents share an optimizer step. This is learning, and depends on nothing but
  the seed, the corpus and the batch size.
* `Layout` arranges the documents of one step in rows and micro-batches. This is memory and speed only: every layout
  gives the same loss and the same gradients, so it may sort, pack and split as it likes.

Both are pure functions of their arguments; a resumed run recomputes them and needs no saved loader position but the
number of the step.

Shape suffixes: R rows, L positions in a row.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray

from tunewise.errors import InputError
from tunewise.recipe import BatchSpec
from tunewise.workload.corpus import Corpus

IGNORED = -100
"""The label of a position that is not learnt; the value that torch's cross entropy ignores by default."""

Row = tuple[int, ...]
"""The documents (indices into the corpus) that lie one after another in a row."""


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What passes through the model at once.

    Attributes:
        input_ids_RL: int64 token ids; positions behind a row's last document hold 0.
        position_ids_RL: int64 positions, starting again at 0 with every document; padding counts on, so that it looks
            like a continuation of the last document. It stands to the right of all real tokens, so that in a causal
            model nothing real ever sees it.
        labels_RL: int64, at each position the token to be predicted *from* it (already shifted), or `IGNORED`.
        document_lengths: for each row the lengths of its documents; what they leave of L is padding.
        documents: the documents in here, for the record of a failure.
        num_supervised: how many labels count.
        num_tokens: how many positions hold real tokens.
    """

    input_ids_RL: torch.Tensor
    position_ids_RL: torch.Tensor
    labels_RL: torch.Tensor
    document_lengths: tuple[tuple[int, ...], ...]
    documents: tuple[int, ...]
    num_supervised: int
    num_tokens: int

    def to(self, device: torch.device) -> MicroBatch:
        """Return this micro-batch with its tensors on `device`."""
        if device == self.input_ids_RL.device:
            return self
        tensors = (self.input_ids_RL, self.position_ids_RL, self.labels_RL)
        input_ids, position_ids, labels = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return replace(self, input_ids_RL=input_ids, position_ids_RL=position_ids, labels_RL=labels)


@dataclass(frozen=True)
class Layout:
    """How the documents of one step lie in rows, and how many rows pass through the model at once.

    Attributes:
        micro_batch_size: rows in a micro-batch.
        row_tokens: None gives each document a row of its own, padded to the longest of its micro-batch; a number packs
            documents into rows of that many positions (best fit decreasing; a longer document gets a row of its own).
        pad_to: row lengths are rounded up to a multiple of this.
    """

    micro_batch_size: int
    row_tokens: int | None = None
    pad_to: int = 1

    def rows(self, documents: Sequence[int], lengths: NDArray[np.int64]) -> list[Row]:
        """Lay documents in rows, longest first; ties keep the order of `documents`."""
        longest_first = sorted(documents, key=lambda document: -int(lengths[document]))
        if self.row_tokens is None:
            return [(document,) for document in longest_first]
        return _best_fit(longest_first, lengths, self.row_tokens)

    def micro_batches(self, documents: Sequence[int], lengths: NDArray[np.int64]) -> list[list[Row]]:
        """Split the rows of one step into micro-batches, rows of similar length together."""
        rows = self.rows(documents, lengths)
        rows.sort(key=lambda row: -int(lengths[list(row)].sum()))
        size = self.micro_batch_size
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def smaller(self, longest_document: int) -> Layout | None:
        """Return the next smaller layout after running out of memory, or None when nothing is left to split.

        First fewer rows at once, then shorter packed rows; the documents of a step never change.
        """
        if self.micro_batch_size > 1:
            return replace(self, micro_batch_size=(self.micro_batch_size + 1) // 2)
        if self.row_tokens is not None and self.row_tokens > longest_document:
            return replace(self, row_tokens=max(longest_document, self.row_tokens // 2))
        return None

    def build(self, rows: Sequence[Row], corpus: Corpus) -> MicroBatch:
        """Gather the rows' tokens, positions and shifted labels into tensors on the CPU."""
        documents = [[corpus.document(index) for index in row] for row in rows]
        row_lengths = [sum(len(ids) for ids, _ in row) for row in documents]
        width = -(-max(row_lengths) // self.pad_to) * self.pad_to
        input_ids = np.zeros((len(rows), width), dtype=np.int64)
        labels = np.full((len(rows), width), IGNORED, dtype=np.int64)
        positions = np.tile(np.arange(width, dtype=np.int64), (len(rows), 1))
        for number, row in enumerate(documents):
            start = 0
            for ids, marks in row:
                end = start + len(ids)
                input_ids[number, start:end] = ids
                labels[number, start : end - 1] = np.where(marks[1:], ids[1:], IGNORED)
                positions[number, start:] = np.arange(width - start)
                start = end
        return MicroBatch(
            input_ids_RL=torch.from_numpy(input_ids),
            position_ids_RL=torch.from_numpy(positions),
            labels_RL=torch.from_numpy(labels),
            document_lengths=tuple(tuple(len(ids) for ids, _ in row) for row in documents),
            documents=tuple(index for row in rows for index in row),
            num_supervised=int((labels != IGNORED).sum()),
            num_tokens=sum(row_lengths),
        )


def _best_fit(longest_first: Sequence[int], lengths: NDArray[np.int64], row_tokens: int) -> list[Row]:
    """Best fit decreasing: each document goes into the fullest row that still has room for it. O(N log N)."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room left, row number), sorted
    for document in longest_first:
        length = int(lengths[document])
        place = bisect.bisect_left(open_rows, (length, -1))
        if place == len(open_rows):
            rows.append([document])
            room, number = row_tokens - length, len(rows) - 1
        else:
            room, number = open_rows.pop(place)
            rows[number].append(document)
            room -= length
        if room > 0:
            bisect.insort(open_rows, (room, number))
    return [tuple(row) for row in rows]


class Epoch(Sequence[list[int]]):
    """The steps of one epoch, each a list of documents, made when they are asked for.

    Attributes:
        order: int64 (N,), the documents in the order of the epoch.
        ends: int64 (steps + 1,), step i is `order[ends[i] : ends[i + 1]]`.
    """

    def __init__(self, order: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
        self.order, self.ends = order, ends

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, index: int) -> list[int]: ...

    @overload
    def __getitem__(self, index: slice) -> Epoch: ...

    def __getitem__(self, index: int | slice) -> list[int] | Epoch:
        """Return a step, or neighbouring ones as an epoch of their own."""
        if isinstance(index, slice):
            first, last, _ = index.indices(len(self))
            return Epoch(self.order, self.ends[first : max(first, last) + 1])
        number = index + (len(self) if index < 0 else 0)
        if not 0 <= number < len(self):
            raise IndexError(index)
        found: list[int] = self.order[self.ends[number] : self.ends[number + 1]].tolist()
        return found


@dataclass(frozen=True, eq=False)
class GlobalBatches:
    """Which documents share an optimizer step, epoch after epoch, drawn from the seed.

    Each epoch is a fresh permutation, cut into steps of `batch.documents` documents, or into steps that end as soon as
    they hold `batch.supervised_tokens` supervised tokens. The last step of an epoch is ragged: nothing is dropped, and
    no step mixes two epochs.
    """

    corpus: Corpus
    batch: BatchSpec
    seed: int

    def epoch(self, number: int) -> Epoch:
        """Return the steps of one epoch."""
        order = np.random.default_rng([self.seed, number]).permutation(len(self.corpus))
        if self.batch.documents is not None:
            size = self.batch.documents
            return Epoch(order, np.minimum(np.arange(0, len(order) + size, size), len(order)))
        if self.batch.supervised_tokens is None:
            raise InputError("batch: neither 'documents' nor 'supervised_tokens' is set")
        ends, held = [0], 0
        for place, count in enumerate(self.corpus.num_supervised[order].tolist()):
            if held >= self.batch.supervised_tokens:
                ends.append(place)
                held = 0
            held += count
        return Epoch(order, np.array([*ends, len(order)]))

    def from_step(self, step: int) -> Iterator[tuple[int, list[int]]]:
        """Yield (epoch, documents) of step `step`, `step + 1`, ... without end; steps count from 0."""
        epoch, first = 0, 0
        while True:
            steps = self.epoch(epoch)
            for place in range(max(0, step - first), len(steps)):
                yield epoch, steps[place]
            first += len(steps)
            epoch += 1
