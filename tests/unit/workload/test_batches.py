"""Layouts lose nothing, mix nothing, and a step's documents depend on the seed alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunewise.errors import InputError
from tunewise.recipe import BatchSpec
from tunewise.workload.batches import IGNORED, GlobalBatches, Layout
from tunewise.workload.corpus import Corpus


def corpus_of(lengths: list[int], seed: int = 0) -> Corpus:
    generator = np.random.default_rng(seed)
    documents = [(generator.integers(1, 99, n).astype(np.int32), generator.random(n) < 0.5) for n in lengths]
    return Corpus.from_documents(documents, [f"made:{i}" for i in range(len(lengths))])


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(lengths, st.one_of(st.none(), st.integers(1, 64)), st.integers(1, 5), st.integers(1, 8))
def test_every_layout_keeps_every_document_and_every_label(
    sizes: list[int], row_tokens: int | None, micro_batch_size: int, pad_to: int
) -> None:
    corpus = corpus_of(sizes)
    layout = Layout(micro_batch_size, row_tokens, pad_to)
    batches = layout.micro_batches(range(len(corpus)), corpus.lengths)
    built = [layout.build(rows, corpus) for rows in batches]
    assert sorted(d for batch in built for d in batch.documents) == list(range(len(corpus)))
    assert sum(batch.num_supervised for batch in built) == corpus.num_supervised.sum()
    assert sum(batch.num_tokens for batch in built) == sum(sizes)
    for batch in built:
        assert batch.input_ids_RL.shape[0] <= micro_batch_size
        assert batch.input_ids_RL.shape[1] % pad_to == 0
        documents = iter(batch.documents)
        for row, row_lengths in enumerate(batch.document_lengths):
            assert row_tokens is None or len(row_lengths) == 1 or sum(row_lengths) <= row_tokens
            start = 0
            for length in row_lengths:
                ids, marks = corpus.document(next(documents))
                part = slice(start, start + length)
                assert batch.input_ids_RL[row, part].tolist() == ids.tolist()
                assert batch.position_ids_RL[row, part].tolist() == list(range(length))
                expected = [int(i) if m else IGNORED for i, m in zip(ids[1:], marks[1:], strict=True)] + [IGNORED]
                assert batch.labels_RL[row, part].tolist() == expected
                start += length
            assert bool((batch.labels_RL[row, start:] == IGNORED).all())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(100, 150))
def test_best_fit_wastes_little(sizes: list[int], row_tokens: int) -> None:
    """Best fit decreasing needs at most 11/9 of the optimum plus one row (Johnson 1973)."""
    corpus = corpus_of(sizes)
    rows = Layout(1, row_tokens).rows(range(len(corpus)), corpus.lengths)
    assert (
        len(rows) <= 11 / 9 * -(-sum(sizes) // row_tokens) + 4
        or len(rows) <= sum(s > row_tokens / 2 for s in sizes) + 1
    )


def test_a_layout_shrinks_until_one_document_is_alone() -> None:
    layout: Layout | None = Layout(5, 256)
    seen = []
    while layout is not None:
        seen.append((layout.micro_batch_size, layout.row_tokens))
        layout = layout.smaller(longest_document=70)
    assert seen == [(5, 256), (3, 256), (2, 256), (1, 256), (1, 128), (1, 70)]


def test_an_epoch_holds_every_document_once_and_ends_ragged() -> None:
    corpus = corpus_of([3] * 10)
    steps = GlobalBatches(corpus, BatchSpec(documents=4), seed=7).epoch(0)
    assert [len(step) for step in steps] == [4, 4, 2]
    assert sorted(document for step in steps for document in step) == list(range(10))


def test_batches_of_supervised_tokens_close_when_full() -> None:
    corpus = corpus_of([20] * 30, seed=3)
    batches = GlobalBatches(corpus, BatchSpec(supervised_tokens=50), seed=1)
    steps = batches.epoch(0)
    held = [int(corpus.num_supervised[step].sum()) for step in steps]
    assert all(count >= 50 for count in held[:-1])
    assert all(count - int(corpus.num_supervised[step[-1]]) < 50 for count, step in zip(held, steps, strict=True))
    assert sorted(document for step in steps for document in step) == list(range(30))


def test_steps_depend_on_the_seed_and_continue_where_asked() -> None:
    corpus = corpus_of([3] * 10)
    batches = GlobalBatches(corpus, BatchSpec(documents=4), seed=7)
    endless = batches.from_step(0)
    first = [next(endless) for _ in range(9)]
    assert [epoch for epoch, _ in first] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    resumed = batches.from_step(5)
    assert [next(resumed) for _ in range(4)] == first[5:]
    other = GlobalBatches(corpus, BatchSpec(documents=4), seed=8)
    assert list(other.epoch(0)) != list(batches.epoch(0))
    assert list(batches.epoch(0)) != list(batches.epoch(1))


@settings(max_examples=50, deadline=None)
@given(lengths, st.integers(1, 40), st.booleans())
def test_steps_of_an_epoch_are_its_permutation_cut(sizes: list[int], size: int, counts_tokens: bool) -> None:
    corpus = corpus_of(sizes)
    batch = BatchSpec(supervised_tokens=size) if counts_tokens else BatchSpec(documents=size)
    steps = GlobalBatches(corpus, batch, seed=3).epoch(2)
    order = np.random.default_rng([3, 2]).permutation(len(corpus)).tolist()
    plain: list[list[int]] = [[]]
    for document in order:
        held = sum(int(corpus.num_supervised[each]) for each in plain[-1]) if counts_tokens else len(plain[-1])
        if held >= size:
            plain.append([])
        plain[-1].append(document)
    assert list(steps) == plain
    assert [*steps[:-1], steps[-1]] == plain
    assert list(steps[1:3]) == plain[1:3]
    with pytest.raises(IndexError):
        steps[len(plain)]


def test_a_batch_without_size_is_refused() -> None:
    with pytest.raises(InputError, match="neither"):
        GlobalBatches(corpus_of([3]), BatchSpec(), seed=0).epoch(0)


def test_moving_a_micro_batch_keeps_it() -> None:
    corpus = corpus_of([4, 5])
    layout = Layout(2)
    batch = layout.build(layout.micro_batches([0, 1], corpus.lengths)[0], corpus)
    assert batch.to(torch.device("cpu")) is batch
