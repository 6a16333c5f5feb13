"""Attention by batched products against masked attention over the whole row, loss and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tunewise.layers import native, products
from tunewise.layers.attention import DocumentLayout
from tunewise.layers.products import attend

pytestmark = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler")

LAYOUTS = {
    "one": ((24,),),
    "packed": ((9, 5, 8), (3, 3, 14)),
    "padded": ((7, 1), (20,), (2, 2, 2)),
    "alike": ((12, 12), (12, 11)),
}
WIDTH, SIZE = 24, 8
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def made(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rotary(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = torch.arange(rows * WIDTH)[:, None] % 13 * torch.linspace(0.1, 1.0, SIZE // 2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def turned(part_RHLD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rows = part_RHLD.shape[0]
    cos, sin = (each.view(rows, 1, WIDTH, SIZE) for each in (cos, sin))
    first, second = part_RHLD.chunk(2, dim=-1)
    return part_RHLD * cos + torch.cat([-second, first], dim=-1) * sin


def plain(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[tuple[int, ...], ...], heads: tuple[int, int],
    scale: float, window: int, angles: tuple[Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    """Masked attention over whole rows; padding positions give zeros."""
    rows = len(lengths)
    q, k, v = (
        part.view(rows, WIDTH, count, SIZE).transpose(1, 2)
        for part, count in zip((query, key, value), (heads[0], heads[1], heads[1]), strict=True)
    )
    if angles is not None:
        q, k = turned(q, *angles), turned(k, *angles)
    document = torch.full((rows, WIDTH), -1)
    for row, held in enumerate(lengths):
        document[row, : sum(held)] = torch.repeat_interleave(torch.arange(len(held)), torch.tensor(held))
    position = torch.arange(WIDTH)
    distance = position[:, None] - position[None]
    sees = (document[:, :, None] == document[:, None]) & (distance >= 0)
    if window:
        sees &= distance < window
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=sees[:, None], scale=scale, enable_gqa=True)
    real = (document >= 0)[:, None, :, None]
    return torch.where(real, output, 0.0).transpose(1, 2).reshape(rows * WIDTH, -1)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("is_turned", [False, True])
def test_equals_masked_attention(dtype: torch.dtype, name: str, heads: tuple[int, int], is_turned: bool) -> None:
    compare(dtype, LAYOUTS[name], heads, window=0, is_turned=is_turned)


@pytest.mark.parametrize("window", [1, 4, 30])
def test_windows(window: int) -> None:
    compare(torch.float32, LAYOUTS["packed"], (4, 2), window, is_turned=True)


@pytest.mark.parametrize("limit", [1, 200, 2000])
def test_long_documents_go_through_in_blocks(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SCORES", limit)
    monkeypatch.setattr(products, "FEWEST_QUERIES", 5)
    for name in LAYOUTS:
        compare(torch.float32, LAYOUTS[name], (4, 2), window=7, is_turned=True)


def compare(
    dtype: torch.dtype, lengths: tuple[tuple[int, ...], ...], heads: tuple[int, int], window: int, is_turned: bool
) -> None:
    rows = len(lengths)
    parts = [
        made(rows * WIDTH, count * SIZE, dtype=dtype, seed=seed)
        for seed, count in enumerate((heads[0], heads[1], heads[1]))
    ]
    grad = made(rows * WIDTH, heads[0] * SIZE, dtype=dtype, seed=9)
    layout = DocumentLayout(lengths)
    plan = layout.plan(parts[0], rows, WIDTH)
    angles = rotary(rows, dtype) if is_turned else None
    ours = [part.clone().requires_grad_(True) for part in parts]
    output = attend(ours[0], ours[1], ours[2], plan, (*heads, SIZE), 0.3, window, angles)
    output.backward(grad)
    truth = [part.double().requires_grad_(True) for part in parts]
    wide = None if angles is None else (angles[0].double(), angles[1].double())
    expected = plain(truth[0], truth[1], truth[2], lengths, heads, 0.3, window, wide)
    real = torch.tensor([[column < sum(held) for column in range(WIDTH)] for held in lengths]).flatten()
    expected.backward(torch.where(real[:, None], grad.double(), 0.0))
    pairs = [(output, expected), *((o.grad, t.grad) for o, t in zip(ours, truth, strict=True))]
    for mine, right in pairs:
        assert mine is not None
        assert right is not None
        assert mine.dtype == dtype
        size = float(right.detach().norm())
        if window == 1:  # who sees only himself has no gradient of scores
            size = max(size, float(expected.detach().norm()))
        error = float((mine.double() - right).detach().norm()) / size
        assert error < TOLERANCE[dtype], f"off by {error:.1e}"
