"""Activations on a disk: bit-equal gradients (also in tests/laws), less memory, a file that is used again, and a dry
run that knows it."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.laws.test_same_gradients import CONFIG, PROBLEMS, corpus, loss_and_gradients, make_run
from tests.unit.built import make_recipe
from tunewise.engine.allocator import allocated_bytes
from tunewise.engine.dry_run import BatchShape, dry_run
from tunewise.engine.tracking import Moment
from tunewise.errors import Conflict, StorageError
from tunewise.layers.activation_offload import DiskFile, OffloadedActivations
from tunewise.methods import Attention, Checkpointing, LoRA, OffloadActivations, Precision, complete
from tunewise.recipe import BatchSpec, Method

CPU = torch.device("cpu")


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("other", [(), (Checkpointing(),), (Checkpointing(policy="selective"),)], ids=str)
def test_gradients_are_bit_equal(problem: str, other: tuple[Method, ...]) -> None:
    expected = loss_and_gradients(make_run((*PROBLEMS[problem], *other), 3))
    offloaded = make_run((*PROBLEMS[problem], *other, OffloadActivations(min_bytes=1)), 3)
    loss, found = loss_and_gradients(offloaded)
    assert loss == expected[0]
    assert all(torch.equal(found[name], gradient) for name, gradient in expected[1].items())
    assert isinstance(offloaded.saved_tensors, OffloadedActivations)
    place = offloaded.saved_tensors._place
    assert isinstance(place, DiskFile)  # something was offloaded
    gc.collect()
    assert place.num_bytes == 0  # and nothing waits any more


def test_memory_falls_and_the_dry_run_knows_it() -> None:
    peaks, predicted = [], []
    for methods in ((), (OffloadActivations(min_bytes=4096),)):
        plain = (Precision(compute="fp32"), Attention(kind="sdpa"))
        recipe = make_recipe(LoRA(rank=4), *plain, *methods).replace(batch=BatchSpec(documents=7, micro_batch_size=7))
        run = make_run((LoRA(rank=4), Attention(kind="sdpa"), *methods), 7)
        shape = BatchShape.of(run.layout.build(run.layout.micro_batches(range(7), corpus().lengths)[0], corpus()))
        recipe = complete(recipe, CONFIG, CPU)
        peaks.append(allocated_bytes(lambda run=run: loss_and_gradients(run)))  # type: ignore[misc]
        moments = dry_run(recipe, CONFIG, "cpu", shape).moments
        predicted.append(max(moments[moment].total_bytes for moment in (Moment.FORWARD, Moment.BACKWARD)))
    assert peaks[1] < 0.6 * peaks[0]
    assert predicted[0] - predicted[1] == pytest.approx(peaks[0] - peaks[1], rel=0.02)


def save_and_return(values: Tensor, offloaded: OffloadedActivations) -> tuple[Tensor, Tensor]:
    """Return the gradients of a product, with and without offloading."""
    found = []
    for context in (offloaded, None):
        leaf = values.detach().clone().requires_grad_()
        if context is None:
            (leaf.sin() * leaf.cos()).sum().backward()
        else:
            with context():
                result = (leaf.sin() * leaf.cos()).sum()
            result.backward()
        assert leaf.grad is not None
        found.append(leaf.grad)
    return found[0], found[1]


def test_strides_dtypes_and_repetitions() -> None:
    file = DiskFile(None)
    offloaded = OffloadedActivations(nn.Identity(), lambda: file, min_bytes=1)
    for values in (torch.randn(6, 5).T, torch.randn(4, 3, 2).permute(2, 0, 1), torch.randn(7, dtype=torch.bfloat16)):
        assert torch.equal(*save_and_return(values, offloaded))
    with offloaded():
        leaf = torch.randn(100, requires_grad=True)
        inner = leaf * 2.0
        first = inner.sin() + inner.cos()  # both keep `inner`
        assert file.num_bytes == 400
    first.sum().backward()
    del first
    gc.collect()
    assert file.num_bytes == 0


def test_weights_and_small_tensors_stay() -> None:
    layer, file = nn.Linear(40, 40), DiskFile(None)
    offloaded = OffloadedActivations(layer, lambda: file, min_bytes=1000)
    with offloaded():
        layer(torch.randn(2, 40, requires_grad=True)).sum()
    assert file.num_bytes == 0


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="offload_activations"):
        loss_and_gradients(make_run((LoRA(rank=4), OffloadActivations(min_bytes=1, folder=str(tmp_path / "no"))), 3))


def test_conflicts() -> None:
    on_host, on_disk = OffloadActivations(to="host"), OffloadActivations()
    assert "to: disk" in str(on_host.conflict(make_recipe(device="cpu")))
    assert "to: host" in str(on_disk.conflict(make_recipe(device="cuda")))
    assert on_host.conflict(make_recipe(device="cuda")) is None
    assert on_disk.conflict(make_recipe(device="cpu")) is None
    assert "folder" in str(OffloadActivations(to="host", folder="x").conflict(make_recipe(device="cuda")))
    with pytest.raises(Conflict, match="host"):
        make_run((LoRA(rank=4), on_host), 3)
