"""Packed rows and the same documents one by one: what the laws about packing compare."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from tests.unit.architectures import VOCAB_SIZE
from tunewise.layers.loss import whole_loss
from tunewise.workload.batches import Layout, MicroBatch
from tunewise.workload.corpus import Corpus

LENGTHS = (9, 14, 3, 20, 5, 7, 13, 2)
"""Longer and shorter than the tiny models' sliding window of 6."""


def packed_batch(row_tokens: int | None = 28, seed: int = 0) -> tuple[MicroBatch, list[list[int]]]:
    """Return a micro-batch of all documents (every third token unsupervised) and the documents themselves."""
    draw = np.random.default_rng(seed)
    documents = [draw.integers(3, VOCAB_SIZE, size=length).tolist() for length in LENGTHS]
    marks = [[place % 3 != 1 for place in range(length)] for length in LENGTHS]
    corpus = Corpus.from_documents(list(zip(documents, marks, strict=True)), [""] * len(documents))
    layout = Layout(micro_batch_size=len(documents), row_tokens=row_tokens)
    rows = layout.micro_batches(range(len(documents)), corpus.lengths)
    assert len(rows) == 1
    return layout.build(rows[0], corpus), documents


def one_by_one(model: nn.Module, documents: list[list[int]]) -> Tensor:
    """Return the loss of the same supervised tokens with each document alone in a forward pass."""
    total = torch.zeros(())
    for document in documents:
        ids = torch.tensor([document])
        labels = torch.tensor([[token if place % 3 != 1 else -100 for place, token in enumerate(document)]])
        total = total + whole_loss(model(input_ids=ids, use_cache=False).logits[:, :-1], labels[:, 1:])
    return total


def loss_and_gradients(model: nn.Module, compute: Callable[[], Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Return the loss and the gradients of all trainable parameters."""
    model.zero_grad(set_to_none=True)
    loss = compute()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.item(), gradients


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the largest |difference| of a parameter's gradients relative to its largest gradient.

    Gradients that are zero in theory (a key's bias) are compared with a hundredth of the largest of all.
    """
    assert ours.keys() == theirs.keys()
    floor = 1e-2 * max(float(gradient.abs().max()) for gradient in theirs.values())
    return max(
        float((ours[name] - theirs[name]).abs().max()) / max(float(theirs[name].abs().max()), floor) for name in theirs
    )
