"""The loss of every single document, and the logits behind it a chunk at a time.

Statistics need documents, not one mean: pairs before and after training are compared document by document. Logits of
supervised positions are made in chunks, so that no (tokens, vocabulary) matrix stands in memory.

Shape suffixes: N documents, R rows, L positions in a row, T supervised tokens, C tokens of a chunk, V vocabulary,
D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tunewise.engine.step import autocast
from tunewise.layers.head import CausalHead
from tunewise.methods.loss import SupervisedLoss
from tunewise.methods.method import Run
from tunewise.workload.batches import IGNORED, MicroBatch
from tunewise.workload.corpus import Corpus

MOST_CHUNK_TOKENS, FEWEST_CHUNK_TOKENS = 512, 16
"""Logits are made for so many tokens at once: half of what passes through training at once, within these bounds, so
that measuring needs no more memory than training did, whatever the vocabulary."""


@dataclass(frozen=True, eq=False)
class DocumentLosses:
    """Sums of the cross entropies of each document's supervised tokens, and how many these are.

    Attributes:
        sums: float64 (N,), nats.
        counts: int64 (N,).
    """

    sums: NDArray[np.float64]
    counts: NDArray[np.int64]

    @property
    def mean(self) -> float:
        """Nats per supervised token."""
        return float(self.sums.sum() / self.counts.sum())

    def take(self, chosen: NDArray[np.bool_]) -> DocumentLosses:
        """Return some of the documents."""
        return DocumentLosses(self.sums[chosen], self.counts[chosen])


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some supervised tokens.

    Attributes:
        documents: int64 (C,), which of the asked documents (0 to N - 1) each belongs to.
        labels_C: their token ids.
        logits_CV: fp32 logits from which they are predicted.
    """

    documents: NDArray[np.int64]
    labels_C: Tensor
    logits_CV: Tensor


@torch.no_grad()
def document_losses(run: Run, corpus: Corpus, documents: Sequence[int]) -> DocumentLosses:
    """Return the losses of `documents`, in that order; the model computes in evaluation mode."""
    sums = np.zeros(len(documents))
    counts = np.zeros(len(documents), dtype=np.int64)
    for chunk in logit_chunks(run, corpus, documents):
        losses_C = F.cross_entropy(chunk.logits_CV, chunk.labels_C, reduction="none")
        np.add.at(sums, chunk.documents, losses_C.double().cpu().numpy())
        np.add.at(counts, chunk.documents, 1)
    return DocumentLosses(sums, counts)


@torch.no_grad()
def logit_chunks(run: Run, corpus: Corpus, documents: Sequence[int]) -> Iterator[Chunk]:
    """Yield the logits of all supervised tokens of `documents`, one document a row."""
    was_training = run.model.training
    run.model.eval()
    try:
        place = {document: number for number, document in enumerate(documents)}
        layout = replace(run.layout, row_tokens=None)
        chunk_tokens = max(FEWEST_CHUNK_TOKENS, min(MOST_CHUNK_TOKENS, _positions_at_once(run, corpus) // 2))
        for rows in _rows(run, corpus, documents):
            batch = layout.build([(document,) for document in rows], corpus).to(run.device)
            run.documents.lengths = batch.document_lengths
            numbers_R = np.array([place[document] for document in rows])
            yield from _chunks(run, batch, numbers_R, chunk_tokens)
    finally:
        run.model.train(was_training)
        run.documents.lengths = None


def _chunks(run: Run, batch: MicroBatch, numbers_R: NDArray[np.int64], chunk_tokens: int) -> Iterator[Chunk]:
    labels_N = batch.labels_RL.flatten()
    index_T = (labels_N != IGNORED).nonzero().squeeze(1)
    width = batch.labels_RL.shape[1]
    numbers_T = numbers_R[(index_T // width).cpu().numpy()]
    finish: Callable[[Tensor], Tensor]
    if run.recipe.get(SupervisedLoss) is not None:  # has verified that the head is all that follows the decoder
        head = CausalHead.of(run.model)
        with autocast(run):
            mask = run.documents.mask(batch.input_ids_RL)
            hidden_RLD = head.hidden(run.model, batch.input_ids_RL, batch.position_ids_RL, mask)
        known_T, finish = hidden_RLD, head.logits
    else:
        with autocast(run):
            logits_RLV = run.model(input_ids=batch.input_ids_RL, use_cache=False).logits
        known_T, finish = logits_RLV[:, -width:], _as_they_are  # virtual tokens stand in front
    known_T = known_T.flatten(0, 1).index_select(0, index_T)
    for start in range(0, len(index_T), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        with autocast(run):
            logits_CV = finish(known_T[part])
        yield Chunk(numbers_T[part], labels_N[index_T[part]], logits_CV.float())


def _positions_at_once(run: Run, corpus: Corpus) -> int:
    """Return the positions that pass through the model at once in training."""
    widest = run.layout.row_tokens or run.recipe.data.max_length or int(corpus.lengths.max(initial=1))
    return run.layout.micro_batch_size * widest


def _as_they_are(logits_CV: Tensor) -> Tensor:
    return logits_CV


def _rows(run: Run, corpus: Corpus, documents: Sequence[int]) -> Iterator[list[int]]:
    """Yield documents of similar length together, so many that no more positions pass at once than in training."""
    lengths = corpus.lengths
    longest_first = sorted(documents, key=lambda document: -int(lengths[document]))
    positions = _positions_at_once(run, corpus)
    start = 0
    while start < len(longest_first):
        size = max(1, positions // max(1, int(lengths[longest_first[start]])))
        yield longest_first[start : start + size]
        start += size
