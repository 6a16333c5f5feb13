"""Products with thin matrices: the kernels against torch's products in fp64, and where torch's own are taken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tunewise.layers import document_kernel, thin

needs_kernel = pytest.mark.skipif(document_kernel.block() == 0, reason="needs a processor with AVX-512 BF16")
SHAPES = [(1, 16, 1), (13, 32, 4), (97, 80, 16), (200, 576, 48), (300, 48, 40), (96, 1536, 64), (25, 64, 65)]
"""Tokens, features, columns; the last has more columns than the kernels take."""

IN_BOTH = pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_kernel)])


def drawn(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(found: Tensor, truth: Tensor) -> None:
    tolerance = 5e-3 if found.dtype == torch.bfloat16 else 1e-5
    assert float((found.double() - truth).norm() / truth.norm()) < tolerance


def problem(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, which lie apart, their thin side, of which a part is taken, and a factor by columns."""
    tokens, features, columns = shape
    x = drawn(tokens, features + 32, seed=0, dtype=dtype)[:, :features]
    low = drawn(tokens, columns + 7, seed=1, dtype=dtype)[:, 3 : 3 + columns]
    return x, low, drawn(features, columns, seed=2, dtype=dtype)


@IN_BOTH
@pytest.mark.parametrize("shape", SHAPES)
def test_products(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, _, factor = problem(shape, dtype)
    assert_close(thin.product(x, factor.T), x.double() @ factor.double())
    assert_close(thin.product(x, factor.T.contiguous()), x.double() @ factor.double())


@IN_BOTH
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, low, factor = problem(shape, dtype)
    truth = low.double().T @ x.double()
    assert_close(thin.gradient(x, low), truth)
    room = torch.full((len(x), low.shape[1] + 5), 7.0, dtype=dtype)
    assert_close(thin.gradient_and_product_(x, low, factor, room[:, 2:-3], 0.5), 0.5 * truth)
    assert_close(room[:, 2:-3], 0.5 * x.double() @ factor.double())
    assert (room[:, :2] == 7.0).all()  # and nothing beside it
    assert (room[:, -3:] == 7.0).all()


@IN_BOTH
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_updates(shape: tuple[int, int, int], by_columns: bool, dtype: torch.dtype) -> None:
    x, low, factor = problem(shape, dtype)
    whole = torch.full((len(x), x.shape[1] + 32), 7.0, dtype=dtype)
    out = whole[:, : x.shape[1]].copy_(x)
    thin.update_(out, low, factor.T if by_columns else factor, by_columns=by_columns, scale=0.5)
    assert_close(out, x.double() + 0.5 * low.double() @ factor.double().T)
    assert (whole[:, x.shape[1] :] == 7.0).all()


@needs_kernel
def test_what_the_kernels_take() -> None:
    rows = torch.zeros(4, 32, dtype=torch.bfloat16)
    assert thin.can_multiply(rows, thin.MOST)
    assert not thin.can_multiply(rows, thin.MOST + 1)
    assert not thin.can_multiply(rows.float(), 16)
    assert not thin.can_multiply(rows[:, :24], 16)
    assert not thin.can_multiply(rows.T, 16)
    assert not thin.can_multiply(torch.zeros(4, 33, dtype=torch.bfloat16)[:, :32], 16)
