"""A sketch keeps norms and differences of gradients, whoever makes it."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from tunewise.engine import sketch as module
from tunewise.engine.sketch import relative_error, sketch

SHAPES = {"layers.0.lora_A": (16, 1000), "layers.1.lora_A": (16, 1000), "norm": (1000,), "head": (27, 1000)}
HASHES = range(40)


def parameters(gradients: dict[str, Tensor]) -> list[tuple[str, nn.Parameter]]:
    named = []
    for name, gradient in gradients.items():
        parameter = nn.Parameter(torch.zeros_like(gradient))
        parameter.grad = gradient
        named.append((name, parameter))
    return named


def drawn(seed: int) -> dict[str, Tensor]:
    """Gradients that are not alike in size, as layers' are not."""
    chance = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=chance) for name, shape in SHAPES.items()}
    return {name: gradient * (1 + index) ** 2 for index, (name, gradient) in enumerate(drawn.items())}


def squared_norm(gradients: dict[str, Tensor]) -> float:
    return sum(float(gradient.double().square().sum()) for gradient in gradients.values())


def test_the_squared_norm_is_unbiased() -> None:
    gradients = drawn(0)
    found = [math.fsum(x * x for x in sketch(parameters(gradients), seed=seed)) for seed in HASHES]
    ratios = [each / squared_norm(gradients) for each in found]
    assert sum(ratios) / len(ratios) == pytest.approx(1.0, abs=3 * math.sqrt(2 / 4096 / len(HASHES)))
    assert all(abs(ratio - 1) < 0.1 for ratio in ratios)


@pytest.mark.parametrize("size", [1e-5, 0.03, 2.0])
def test_the_error_is_known_within_5_percent(size: float) -> None:
    one, change = drawn(0), drawn(1)
    other = {name: one[name].double() + size * change[name].double() for name in one}
    true = size * math.sqrt(squared_norm(change) / squared_norm(one))
    exact = {name: gradient.double() for name, gradient in one.items()}
    for seed in HASHES:
        found = relative_error(sketch(parameters(other), seed=seed), sketch(parameters(exact), seed=seed))
        assert found == pytest.approx(true, rel=0.05)


def test_is_linear() -> None:
    one, other = drawn(0), drawn(1)
    whole = sketch(parameters({name: 2 * one[name] + other[name] for name in one}))
    parts = [2 * a + b for a, b in zip(sketch(parameters(one)), sketch(parameters(other)), strict=True)]
    assert whole == pytest.approx(parts, rel=1e-4, abs=1e-3)


def test_order_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    named = parameters(drawn(0))
    plain = sketch(named)
    assert sketch(reversed(named)) == pytest.approx(plain, rel=1e-9, abs=1e-9)
    monkeypatch.setattr(module, "CHUNK", 1000)
    assert sketch(named) == pytest.approx(plain, rel=1e-9, abs=1e-9)


def test_processes_agree() -> None:
    code = (
        "import torch; from torch import nn; from tunewise.engine.sketch import sketch\n"
        "p = nn.Parameter(torch.zeros(5000)); p.grad = torch.arange(5000.0); print(sketch([('a', p)], width=8, seed=3))"
    )
    ours = sketch(parameters({"a": torch.arange(5000.0)}), width=8, seed=3)
    theirs = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert theirs.stdout.strip() == str(ours)
    assert ours != sketch(parameters({"b": torch.arange(5000.0)}), width=8, seed=3)
    assert ours != sketch(parameters({"a": torch.arange(5000.0)}), width=8, seed=4)


def test_what_has_no_gradient_is_zero() -> None:
    frozen = ("frozen", nn.Parameter(torch.zeros(3)))
    assert sketch([frozen], width=8) == [0.0] * 8
    named = parameters(drawn(0))
    assert sketch([*named, frozen]) == sketch(named)


def test_special_errors() -> None:
    assert relative_error([0.0, 0.0], [0.0, 0.0]) == 0.0
    assert relative_error([1.0, 0.0], [0.0, 0.0]) == math.inf
    assert math.isnan(relative_error([math.nan, 0.0], [1.0, 0.0]))
    with pytest.raises(ValueError, match="different widths"):
        relative_error([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="power of two"):
        sketch([], width=1000)
