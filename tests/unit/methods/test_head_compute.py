"""The output head's products in 8 bits: near the dense ones in loss and gradients, in every way to run a step."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tests.laws.test_same_gradients import corpus, loss_and_gradients, make_run
from tests.unit.architectures import tiny_model
from tests.unit.methods import adapted
from tests.unit.methods.test_fused import FAST
from tunewise.errors import Conflict
from tunewise.layers import native
from tunewise.methods import Freeze, KLToBase, LoRA, Pad, Precision, Quantize, SupervisedLoss, WholeLoss
from tunewise.methods.compatibility import conflicts
from tunewise.recipe import Method

DENSE, NARROW = (Quantize(kind="int8", compute="int8", head_compute=each) for each in ("dense", "int8"))
WAYS: dict[str, tuple[Method, ...]] = {
    "torch's operations": (SupervisedLoss(),),
    "chunks": (SupervisedLoss(chunk_tokens=5),),
    "bf16": (SupervisedLoss(), Precision(compute="bf16")),
    "kernels": FAST,
    "kernels in bf16": (*FAST, Precision(compute="bf16")),
    "kernels, padded rank": (*FAST, Pad(vocabulary=None, rank=8)),
}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    apart = sum(float((found[name].float() - expected[name].float()).square().sum()) for name in expected)
    return float((apart / sum(float(gradient.float().square().sum()) for gradient in expected.values())) ** 0.5)


@pytest.mark.parametrize("way", WAYS)
def test_loss_and_gradients_stay_near_the_dense_head(way: str) -> None:
    if "kernels" in way and native.compiler() is None:
        pytest.skip("no C++ compiler")
    methods = (LoRA(rank=4), *WAYS[way])
    dense = loss_and_gradients(make_run((DENSE, *methods), micro_batch_size=3))
    run = make_run((NARROW, *methods), micro_batch_size=3)
    assert any("output head multiplied in 8 bits" in note for note in run.notes)
    narrow = loss_and_gradients(run)
    assert narrow[0] == pytest.approx(dense[0], rel=5e-3)
    assert 1e-4 < distance(narrow[1], dense[1]) < 0.05
    again = loss_and_gradients(make_run((NARROW, *methods), micro_batch_size=3))
    assert again[0] == narrow[0]
    assert distance(again[1], narrow[1]) == 0.0, "what is rounded at random is the same in every run"


def test_a_loss_that_is_only_measured_is_the_dense_head_s() -> None:
    losses = []
    for quantize in (DENSE, NARROW):
        run = make_run((quantize, LoRA(rank=4), SupervisedLoss()), micro_batch_size=7)
        rows = next(iter(run.layout.micro_batches(range(7), corpus().lengths)))
        with torch.no_grad():
            losses.append(float(run.loss(run, run.layout.build(rows, corpus()))))
    assert losses[0] == losses[1]


def test_options_that_do_not_go_together() -> None:
    with pytest.raises(ValidationError, match="goes with compute: int8"):
        Quantize(kind="int8", head_compute="int8")
    with pytest.raises(ValidationError, match="leave 'lm_head' in skip_modules"):
        Quantize(kind="int8", compute="int8", head_compute="int8", skip_modules=())


@pytest.mark.parametrize("other", [WholeLoss(), KLToBase()], ids=lambda method: method.name)
def test_another_loss_is_refused(other: Method) -> None:
    recipe = adapted.make_recipe(LoRA(rank=4), NARROW, other)
    assert conflicts(recipe) == [
        f"quantize.head_compute: int8 is for supervised_loss, and this recipe has {other.name}; leave it out"
    ]


def test_a_padded_vocabulary_is_refused() -> None:
    (found,) = conflicts(adapted.make_recipe(LoRA(rank=4), NARROW, Pad(vocabulary=64)))
    assert "set pad.vocabulary to null" in found


def test_heads_that_cannot_be_multiplied_so_are_refused() -> None:
    with pytest.raises(Conflict, match="with logits that nothing caps"):
        adapted.make_run(tiny_model("gemma2"), LoRA(rank=4), NARROW, SupervisedLoss())
    with pytest.raises(Conflict, match="not trained"):
        adapted.make_run(
            tiny_model("llama", tie_word_embeddings=False), LoRA(rank=4), NARROW, Freeze(train=("lm_head.weight",)),
            SupervisedLoss(),
        )  # fmt: skip
