from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.tiny_runs import recipe_over, save_model, write_records
from tunewise.engine.assemble import Plan, assemble, settle
from tunewise.engine.dry_run import BatchShape, dry_run
from tunewise.engine.measure import Measuring
from tunewise.engine.sketch import relative_error
from tunewise.engine.throughput import Timing
from tunewise.methods.reading import recipe_from_mapping


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("measure")
    return recipe_over(save_model(folder / "model"), write_records(folder / "records.jsonl", 80))


def plan_of(start: dict[str, Any], methods: dict[str, Any] | None = None, **changes: Any) -> Plan:
    chosen = {"lora": {"rank": 4}, "precision": {"compute": "fp32"}} if methods is None else methods
    return settle(recipe_from_mapping({**start, **changes, "methods": chosen}))


def measuring(plan: Plan) -> Measuring:
    return Measuring(assemble(plan), plan.data.train, plan.data.validation)


def test_the_first_batch_is_the_same_however_it_lies_in_rows(start: dict[str, Any]) -> None:
    plain = measuring(plan_of(start)).timed(1, 1, 1e-3).first
    packed = measuring(
        plan_of(start, {"lora": {"rank": 4}, "precision": {"compute": "fp32"}, "packing": {"row_tokens": 96}})
    )
    found = packed.timed(1, 1, 1e-3).first
    assert plain is not None
    assert found is not None
    assert found.trainable == plain.trainable
    assert found.loss == pytest.approx(plain.loss, rel=1e-5)
    assert relative_error(found.sketch, plain.sketch) < 1e-4


def test_a_wrong_gradient_is_seen(start: dict[str, Any]) -> None:
    plain = measuring(plan_of(start)).timed(1, 1, 1e-3).first
    wrong = measuring(plan_of(start))
    computed = wrong.run.loss
    wrong.run.loss = lambda run, batch: computed(run, batch) * (1.0 + 0.5 * (batch.num_supervised > 12))
    found = wrong.timed(1, 1, 1e-3).first
    assert plain is not None
    assert found is not None
    assert relative_error(found.sketch, plain.sketch) > 0.05


def test_dropout_does_not_disturb_the_comparison(start: dict[str, Any]) -> None:
    lora = {"lora": {"rank": 4, "dropout": 0.5}, "precision": {"compute": "fp32"}}
    plain = measuring(plan_of(start)).timed(1, 1, 1e-3).first
    dropped = measuring(plan_of(start, lora))
    found = dropped.timed(1, 1, 1e-3).first
    assert plain is not None
    assert found is not None
    assert relative_error(found.sketch, plain.sketch) < 1e-4
    assert {module.dropout for module in dropped.run.model.modules() if hasattr(module, "lora_a")} <= {0.5}


def test_worst_case_memory_is_what_the_dry_run_says(start: dict[str, Any]) -> None:
    for methods in (
        {"lora": {"rank": 4}, "precision": {"compute": "fp32"}, "packing": {"row_tokens": 96}},
        {"precision": {"compute": "fp32"}},
    ):
        plan = plan_of(start, methods)
        measured = measuring(plan)
        peak, _ = measured.worst_case()
        fullest = measured._fullest(plan.data.train, measured.run.layout)
        evaluation = measured._fullest(plan.data.validation, measured._evaluation_layout())
        estimate = dry_run(
            plan.recipe,
            plan.config,
            "cpu",
            [BatchShape.of(batch) for batch in fullest],
            evaluation=BatchShape.of(evaluation[0]),
        )
        assert peak == pytest.approx(estimate.peak.total_bytes, rel=0.03)


def test_the_worst_case_is_the_fullest_micro_batch_that_can_come_up(start: dict[str, Any]) -> None:
    plan = plan_of(start, {"lora": {"rank": 4}, "packing": {"row_tokens": 96}})
    one = measuring(plan)
    fullest = one._fullest(plan.data.train, one.run.layout)
    seen = [batch.input_ids_RL.numel() for documents in one._documents(12) for batch in one._micro_batches(documents)]
    assert fullest[0].input_ids_RL.numel() >= max(seen)


def test_the_worst_case_leaves_no_trace_in_what_is_learnt(start: dict[str, Any]) -> None:
    plan = plan_of(start)
    before, after = measuring(plan), measuring(plan)
    after.worst_case()
    assert before.timed(1, 3, 5e-3).losses == after.timed(1, 3, 5e-3).losses
    assert before.validation_loss(8) == after.validation_loss(8)


def test_noise_document_by_document(start: dict[str, Any]) -> None:
    found = measuring(plan_of(start)).noise_per_example(3)
    assert len(found) == 3
    assert all(sums.variance > 0 for sums in found)


def test_throughput_by_rows(start: dict[str, Any]) -> None:
    plan = plan_of(start, {"lora": {"rank": 4}, "packing": {"row_tokens": 96}})
    timing = Timing(assemble(plan), plan.data.train)
    found = timing.micro_batches(4)
    assert [each.micro_batch_size for each in found] == [1, 2, 4]
    assert found[2].tokens > 3 * found[0].tokens
    peaks = [each.peak_tensor_bytes for each in found]
    assert peaks == sorted(peaks)
    assert len(timing.updates()) >= 3


def test_measuring_does_not_write(start: dict[str, Any], tmp_path: Path) -> None:
    measuring(plan_of(start)).timed(1, 1, 1e-3)
    assert not list(tmp_path.iterdir())
