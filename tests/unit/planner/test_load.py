"""How documents fill rows, against the layout that training uses."""

from __future__ import annotations

import numpy as np
import pytest

from tunewise.engine.dry_run import BatchShape
from tunewise.methods import Packing
from tunewise.methods.reading import recipe_from_mapping
from tunewise.planner.load import Load
from tunewise.recipe import Recipe
from tunewise.workload.batches import GlobalBatches, Layout
from tunewise.workload.corpus import Corpus


def recipe(**batch: int) -> Recipe:
    return recipe_from_mapping({"model": "embedded", "data": "stdlib", "batch": batch or {"documents": 8}})


def corpus(count: int = 100) -> Corpus:
    lengths = np.random.default_rng(1).integers(5, 200, count)
    documents = [(np.zeros(n, dtype=np.int32), np.arange(n) >= n // 2) for n in lengths]
    return Corpus.from_documents(documents, ["test"] * count)


@pytest.mark.parametrize("packing", [None, Packing(row_tokens=256)])
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_rows_are_those_of_training(packing: Packing | None, rows: int) -> None:
    data = corpus(96)
    load = Load.of_corpus(data, recipe(), 12, "test")
    found = load.laid_out(packing, rows)
    layout = Layout(rows, packing.row_tokens if packing else None, packing.pad_to if packing else 1)
    positions, count, widest = [], [], 0
    for step in GlobalBatches(data, recipe().batch, 0).epoch(0)[:-1]:
        shapes = [BatchShape.of(layout.build(each, data)) for each in layout.micro_batches(step, data.lengths)]
        positions.append(sum(len(shape.document_lengths) * (shape.width or 0) for shape in shapes))
        count.append(len(shapes))
        widest = max([widest, *(len(shape.document_lengths) * (shape.width or 0) for shape in shapes)])
    assert found.positions_per_step == pytest.approx(np.mean(positions))
    assert found.micro_batches_per_step == pytest.approx(np.mean(count))
    assert found.largest_micro_batch >= widest


def test_packing_wastes_fewer_positions() -> None:
    load = Load.of_corpus(corpus(), recipe(), 12, "test")
    packed, padded = load.laid_out(Packing(row_tokens=512), 2), load.laid_out(None, 8)
    assert load.tokens_per_step <= packed.positions_per_step < padded.positions_per_step
    assert packed.squares_per_step < padded.squares_per_step


def test_the_fullest_micro_batch_has_the_longest_document() -> None:
    load = Load.of_corpus(corpus(), recipe(), 12, "test")
    rows = load.laid_out(None, 4)
    assert rows.width == load.longest == int(corpus().lengths.max())
    assert rows.shape().document_lengths == ((load.longest,),) * 4


def test_a_packed_row_is_filled_with_several_documents() -> None:
    rows = Load.of_corpus(corpus(), recipe(), 12, "test").laid_out(Packing(row_tokens=512), 1)
    (row,) = rows.shape().document_lengths
    assert sum(row) == rows.width == 512
    assert len(row) == rows.documents_per_row > 1


def test_documents_of_one_length() -> None:
    load = Load.uniform(64, recipe(documents=4), 100, 25)
    assert (load.tokens_per_step, load.documents_per_step, load.longest) == (256, 4, 64)
    assert load.laid_out(None, 4).squares_per_step == 4 * 64**2
    assert load.cut(16).lengths.tolist() == [16] * 4
