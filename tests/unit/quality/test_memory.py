"""Measuring needs no more memory than training did, and 15 %: also for short rows and a large vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.tiny_runs import recipe_over, save_model, write_records
from tunewise.engine.allocator import allocated_bytes, lasting_bytes
from tunewise.engine.assemble import assemble, settle
from tunewise.engine.measure import Measuring
from tunewise.methods.reading import recipe_from_mapping
from tunewise.quality.material import material_of
from tunewise.quality.scores import scores_of

LORA: dict[str, Any] = {"lora": {"rank": 8}, "precision": {"compute": "fp32"}}
VOCABULARY = 32768
CASES: dict[str, dict[str, Any]] = {
    "a short row at once": LORA,
    "whole logits": {**LORA, "packing": {"row_tokens": 256}, "whole_loss": None},
}


@pytest.mark.parametrize("name", CASES)
def test_the_measures_need_no_more_memory_than_the_training(name: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128)
    mapping = recipe_over(
        model,
        write_records(tmp_path / "records.jsonl", 30),
        data={"max_length": 64},
        methods=CASES[name],
        batch={"documents": 8, "micro_batch_size": 1},
        quality={"gate": True, "share": 0.5},
    )
    plan = settle(recipe_from_mapping(mapping))
    material = material_of(plan)
    measuring = Measuring(assemble(plan), plan.data.train, plan.data.validation)
    training, _ = measuring.worst_case()
    run = measuring.run
    measures = lasting_bytes(run, measuring.optimizer) + allocated_bytes(lambda: scores_of(run, material))
    assert measures <= 1.15 * training, f"{measures / training:.2f} times the training's peak"
