"""How documents fill rows, micro-batches and steps: what the data contribute to memory and time.

Memory is decided by the fullest micro-batch that can come up; time by all of them. Both come from the layout that
training itself uses (`workload.batches.Layout`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tunewise.engine.dry_run import BatchShape
from tunewise.errors import InputError
from tunewise.methods import Packing
from tunewise.recipe import BatchSpec, Recipe
from tunewise.workload.batches import GlobalBatches, Layout
from tunewise.workload.corpus import Corpus

SAMPLED_STEPS = 64
"""So many steps of the first epoch are laid out to learn about all; a step costs well under a millisecond."""


@dataclass(frozen=True, eq=False)
class Load:
    """The documents of a run.

    Attributes:
        corpus: their lengths and which tokens are learnt; the tokens themselves do not matter.
        batch: how many of them make a step.
        num_steps: steps of the whole run; None when nobody said how long it is.
        description: for people.
        steps: documents of the sampled steps.
    """

    corpus: Corpus
    batch: BatchSpec
    num_steps: int | None
    description: str
    steps: tuple[tuple[int, ...], ...]

    @staticmethod
    def of_corpus(corpus: Corpus, recipe: Recipe, num_steps: int | None, description: str) -> Load:
        """Sample the steps that training on `corpus` would make."""
        if len(corpus) == 0:
            raise InputError("There are no documents to plan for.")
        steps = GlobalBatches(corpus, recipe.batch, recipe.seed).epoch(0)
        full = steps[:-1] or steps  # the last one is ragged
        places = np.unique(np.linspace(0, len(full) - 1, SAMPLED_STEPS).astype(int))
        sampled = tuple(tuple(full[place]) for place in places)
        return Load(corpus, recipe.batch, num_steps, description, sampled)

    @staticmethod
    def uniform(length: int, recipe: Recipe, num_documents: int | None, num_steps: int | None) -> Load:
        """Documents of `length` tokens each, all of them learnt; `num_documents` only says how long the run is."""
        documents = recipe.batch.documents or -(-(recipe.batch.supervised_tokens or 1) // max(length - 1, 1))
        ids, marks = np.zeros(length, dtype=np.int32), np.ones(length, dtype=np.bool_)
        corpus = Corpus.from_documents([(ids, marks)] * documents, ["--length"] * documents)
        count = "" if num_documents is None else f"{num_documents} "
        batch = BatchSpec(documents=documents)
        return Load(corpus, batch, num_steps, f"{count}documents of {length} tokens", (tuple(range(documents)),))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document."""
        return self.corpus.lengths

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int(self.lengths.max())

    @property
    def documents_per_step(self) -> int:
        """The most documents in a sampled step."""
        return max(map(len, self.steps))

    @property
    def tokens_per_step(self) -> float:
        """Real tokens (no padding) of a step, on average."""
        return float(np.mean([self.lengths[list(step)].sum() for step in self.steps]))

    @property
    def supervised_share(self) -> float:
        """Tokens that are learnt over tokens."""
        return float(self.corpus.num_supervised.sum() / max(1, self.lengths.sum()))

    def cut(self, length: int) -> Corpus:
        """Return the documents with no more than `length` tokens of each."""
        parts = [self.corpus.document(index) for index in range(len(self.corpus))]
        cut = [(ids[:length], marks[:length]) for ids, marks in parts]
        return Corpus.from_documents(cut, list(self.corpus.origins))

    def laid_out(self, packing: Packing | None, micro_batch_size: int) -> Rows:
        """Lay the sampled steps in rows as training would."""
        row_tokens, pad_to = (packing.row_tokens, packing.pad_to) if packing else (None, 1)
        layout = Layout(micro_batch_size, row_tokens, pad_to)
        micro_batches, positions, squares, widest, most_rows = 0, 0, 0.0, 0, 0
        for step in self.steps:
            batches = layout.micro_batches(step, self.lengths)
            most_rows = max(most_rows, sum(map(len, batches)))
            micro_batches += len(batches)
            for rows in batches:
                sizes = [[int(self.lengths[document]) for document in row] for row in rows]
                width = -(-max(map(sum, sizes)) // pad_to) * pad_to
                positions += len(rows) * width
                widest = max(widest, width)
                if packing is None:
                    squares += len(rows) * width**2
                else:
                    squares += sum(size**2 for row in sizes for size in row)
        count = len(self.steps)
        return Rows(
            micro_batch_size=min(micro_batch_size, most_rows),
            micro_batches_per_step=micro_batches / count,
            positions_per_step=positions / count,
            squares_per_step=squares / count,
            rows_per_step=most_rows,
            width=self._widest(packing, widest),
            documents_per_row=1 if packing is None else max(1, round(widest / float(self.lengths.mean()))),
            supervised_share=self.supervised_share,
        )

    def _widest(self, packing: Packing | None, seen: int) -> int:
        """The widest row that can come up in any epoch."""
        if packing is None:
            return self.longest
        assert packing.row_tokens is not None
        together = np.sort(self.lengths)[-self.documents_per_step :].sum()
        bound = max(self.longest, min(packing.row_tokens, int(together)))
        return max(seen, -(-bound // packing.pad_to) * packing.pad_to)


@dataclass(frozen=True)
class Rows:
    """A step in rows.

    Attributes:
        micro_batch_size: rows at once, at most.
        micro_batches_per_step, positions_per_step: means; positions count padding.
        squares_per_step: mean sum of the squares of what attention sees together: documents when packed, else rows.
        rows_per_step: the most rows in a step.
        width: positions of the widest row that can come up.
        documents_per_row: of a full packed row.
        supervised_share: learnt tokens over tokens.
    """

    micro_batch_size: int
    micro_batches_per_step: float
    positions_per_step: float
    squares_per_step: float
    rows_per_step: int
    width: int
    documents_per_row: int
    supervised_share: float

    @property
    def words(self) -> str:
        """How many rows there are at once: "1 row"."""
        return f"{self.micro_batch_size} row{'s' if self.micro_batch_size > 1 else ''}"

    @property
    def largest_micro_batch(self) -> int:
        """Positions of the fullest micro-batch that can come up."""
        return self.micro_batch_size * self.width

    def shape(self, rows: int | None = None) -> BatchShape:
        """Return the fullest micro-batch, or one of `rows` such rows."""
        count = rows or self.micro_batch_size
        each = self.width // self.documents_per_row
        row = (each,) * (self.documents_per_row - 1) + (self.width - each * (self.documents_per_row - 1),)
        learnt = max(1, round(count * (self.width - self.documents_per_row) * self.supervised_share))
        return BatchShape((row,) * count, learnt)
