"""Each initialization against its formula, and that only linear layers of random models get it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.unit.architectures import tiny_model
from tests.unit.built import make_recipe, make_run
from tunewise.layers.initialization import InitKind, initialize
from tunewise.layers.linear import linear_layers, weight_of
from tunewise.methods.bottleneck import BottleneckAdapter
from tunewise.methods.freezing import Freeze
from tunewise.methods.initialization import Initialize
from tunewise.methods.lora import LoRA
from tunewise.methods.quantization import Quantize
from tunewise.recipe import ModelSpec

OUTPUTS, INPUTS = 300, 200


def drawn(kind: InitKind, gain: float = 1.0, std: float = 0.02) -> Tensor:
    weight = torch.full((OUTPUTS, INPUTS), torch.nan)
    initialize(weight, kind, torch.Generator().manual_seed(0), gain=gain, std=std, num_nonzero=15)
    return weight


@pytest.mark.parametrize(
    ("kind", "variance"),
    [
        ("normal", 0.02**2),
        ("he", 2 / INPUTS),
        ("uniform", 1 / INPUTS / 3),
        ("glorot", 2 / (INPUTS + OUTPUTS)),
        ("orthogonal", 1 / OUTPUTS),
        ("sparse", 1 / INPUTS),
    ],
)
def test_variance(kind: InitKind, variance: float) -> None:
    assert float(drawn(kind).var()) == pytest.approx(variance, rel=0.03)
    assert float(drawn(kind, gain=2.0).var()) == pytest.approx(4 * variance, rel=0.03)
    assert abs(float(drawn(kind).mean())) < 4 * math.sqrt(variance / OUTPUTS / INPUTS)


def test_bounds() -> None:
    assert float(drawn("uniform").abs().max()) == pytest.approx(INPUTS**-0.5, rel=1e-3)
    assert float(drawn("glorot").abs().max()) == pytest.approx(math.sqrt(6 / (INPUTS + OUTPUTS)), rel=1e-3)


def test_glorot_and_he_are_torchs() -> None:
    ours, theirs = drawn("glorot"), torch.empty(OUTPUTS, INPUTS)
    torch.nn.init.xavier_uniform_(theirs, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours, theirs)
    torch.nn.init.kaiming_normal_(theirs, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn("he"), theirs)


def test_orthogonal_keeps_lengths() -> None:
    weight = drawn("orthogonal")
    torch.testing.assert_close(weight.T @ weight, torch.eye(INPUTS), rtol=0.0, atol=1e-5)


def test_sparse_has_so_many_weights_an_output() -> None:
    assert torch.equal((drawn("sparse") != 0).sum(dim=1), torch.full((OUTPUTS,), 15))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_all_linear_layers_and_nothing_else(architecture: str) -> None:
    model = tiny_model(architecture)
    layers = linear_layers(model)
    weights = {id(layer.weight) for layer in layers.values()}
    biases = {id(layer.bias) for layer in layers.values() if isinstance(layer.bias, Tensor)}
    before = {id(parameter): parameter.detach().clone() for parameter in model.parameters()}
    make_run(model, Initialize(kind="orthogonal"))
    for parameter in model.parameters():
        if id(parameter) in biases:
            assert not bool(parameter.any())
        else:
            assert torch.equal(parameter, before[id(parameter)]) == (id(parameter) not in weights)
    for layer in layers.values():
        weight = weight_of(layer).detach()
        small = weight if weight.shape[0] <= weight.shape[1] else weight.T
        torch.testing.assert_close(small @ small.T, torch.eye(len(small)), rtol=0.0, atol=1e-5)


def test_pretrained_weights_are_not_destroyed() -> None:
    assert "random" in str(Initialize().conflict(make_recipe()))
    scratch = make_recipe().replace(model=ModelSpec(name="tiny", weights="random"))
    assert Initialize().conflict(scratch) is None


def test_an_adapter_would_be_saved_without_the_base_that_was_drawn() -> None:
    recipe = make_recipe().replace(model=ModelSpec(name="tiny", weights="random"))
    for adapter in (LoRA(), BottleneckAdapter(), Quantize()):
        problem = Initialize().conflict(recipe.replace(methods=(Initialize(), adapter)))
        assert problem is not None
        assert adapter.name in problem
    assert Initialize().conflict(recipe.replace(methods=(Initialize(), Freeze(train=("*norm*",))))) is None
