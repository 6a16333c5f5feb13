"""The published ladders that are rebuilt: their recipes can be run, and the table says what was measured."""

from __future__ import annotations

import pytest

from tunewise.lab.outcome import Failed, Interval, Measurement
from tunewise.methods.compatibility import conflicts
from tunewise.methods.reading import recipe_from_mapping
from tunewise.recipe import BatchSpec
from tunewise.reproduce.ladders import hugging_face, torchtune
from tunewise.reproduce.ladders.laboratory import SEED, documents
from tunewise.reproduce.ladders.ladder import Ladder, Row
from tunewise.reproduce.ladders.table import Measured, Results, table
from tunewise.workload.batches import GlobalBatches, Layout

LADDERS = {
    f"{make.__module__.rsplit('.', 1)[1]} on {device}": make(device)
    for make in (hugging_face.ladder, torchtune.ladder)
    for device in ("cpu", "cuda")
}


@pytest.mark.parametrize("ladder", LADDERS.values(), ids=LADDERS.keys())
def test_every_rebuilt_row_is_a_recipe_without_conflicts(ladder: Ladder) -> None:
    for row in ladder.rebuilt:
        assert row.recipe is not None
        common = {"model": {"name": "embedded"}, "data": {"source": "stdlib"}, "training": ladder.training}
        assert conflicts(recipe_from_mapping({**common, **row.recipe})) == [], row.name


@pytest.mark.parametrize("ladder", LADDERS.values(), ids=LADDERS.keys())
def test_rows_compare_with_rows_of_the_ladder(ladder: Ladder) -> None:
    singles = [row.effect for row in ladder.rows if row.is_single]
    assert len(singles) == len(set(singles))
    for whole in ladder.wholes:
        assert set(whole.effects) <= set(singles)
        assert ladder.row(whole.row) in ladder.rebuilt
    for row in ladder.rows:
        assert row.recipe is not None or row.note
        if row.over is not None:
            assert ladder.row(row.over).name == row.over


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_packed_steps_fill_their_two_rows_exactly(device: str) -> None:
    ladder = torchtune.ladder(device)
    packed = ladder.row(torchtune.PACKED).recipe
    assert packed is not None
    row_tokens = packed["methods"]["packing"]["row_tokens"]
    corpus = documents(ladder).train
    for step in GlobalBatches(corpus, BatchSpec(**packed["batch"]), SEED).epoch(0)[:4]:
        rows = Layout(2, row_tokens).rows(step, corpus.lengths)
        assert [int(corpus.lengths[list(row)].sum()) for row in rows] == [row_tokens, row_tokens]


def published_again(ladder: Ladder, *, speed: float = 10.0, memory: int = 2**20) -> Results:
    """Measurements that are the published ones in other units."""
    return {row.name: Measured(row, (measurement(row, speed, memory),) * 3) for row in ladder.rebuilt}


def measurement(row: Row, speed: float, memory: int) -> Measurement:
    assert row.published is not None
    rate = speed * row.published.speed
    return Measurement(
        tokens_per_second=Interval(middle=rate, low=0.9 * rate, high=1.1 * rate),
        peak_tensor_bytes=round(memory * row.published.memory),
    )


def test_a_table_of_the_published_figures_agrees_with_the_published_table() -> None:
    ladder = hugging_face.ladder("cuda")
    found = table(ladder, published_again(ladder))
    summary = found["summary"]
    assert summary["rows"] == 9
    assert summary["memory_order_kept"] is True
    assert summary["speed_signs_agree"] == summary["speed_signs"] == 8
    assert summary["product_speed"] == pytest.approx(12.60 / 8.86, rel=1e-3)
    assert summary["whole_speed"] == pytest.approx(10.09 / 8.86)
    assert summary["synergy"] == pytest.approx(summary["published_synergy"]) == pytest.approx(0.80, abs=0.005)


def test_a_table_says_what_disagrees_and_what_failed() -> None:
    ladder = hugging_face.ladder("cpu")
    results = published_again(ladder)
    light, heavy, failing = (ladder.row(name) for name in ("batch 1 x 4", "vanilla, batch 4", "8-bit Adam, batch 4"))
    swapped = Measurement(
        tokens_per_second=Interval(middle=100.0, low=99.0, high=101.0),
        peak_tensor_bytes=2**20 * round(heavy.published.memory if heavy.published else 0) + 1,
    )
    results[light.name] = Measured(light, (swapped,) * 3)
    results[failing.name] = Measured(failing, (Failed(reason="refused here"),) * 3)
    found = table(ladder, results)
    assert found["summary"]["memory_order_kept"] is False
    assert f"'{heavy.name}' and '{light.name}'" in found["memory_order"]["swapped"]
    assert light.name in found["speed_signs"]["differing"]
    row = next(row for row in found["rows"] if row["name"] == failing.name)
    assert row["problem"] == "refused here"
    assert row["to_start"]["speed"] is None
    assert row["to_start"]["published_speed"] == pytest.approx(9.15 / 8.86)
    assert [whole["row"] for whole in found["wholes"]] == ["all of it", "Adafactor, all of it"]


def test_a_row_without_counterpart_stands_in_the_table() -> None:
    ladder = torchtune.ladder("cpu")
    rebuilt = [row for row in ladder.rebuilt if row.published is not None]
    results = {row.name: Measured(row, (measurement(row, 1.0, 2**20),)) for row in rebuilt}
    ours = [row for row in ladder.rebuilt if row.published is None]
    results |= {row.name: Measured(row, (Failed(reason="not run"),)) for row in ours}
    found = table(ladder, results)
    compiled = next(row for row in found["rows"] if row["name"] == "+ compile")
    assert compiled["tokens_per_second"] is None
    assert compiled["to_over"]["published_speed"] == pytest.approx(8998 / 7075)
    assert "no counterpart" in compiled["note"]
    assert found["wholes"] == []
