"""Attention by batched products against masked attention over the whole row, loss and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tunewise.layers import document_kernel, native, products
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
MANY = ((50, 1, 7, 2), (33, 27), (60,), (58, 1))
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def made(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rotary(rows: int, width: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = torch.arange(rows * width)[:, None] % 13 * torch.linspace(0.1, 1.0, size // 2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def turned(part_RHLD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rows, _, width, size = part_RHLD.shape
    cos, sin = (each.view(rows, 1, width, size) for each in (cos, sin))
    first, second = part_RHLD.chunk(2, dim=-1)
    return part_RHLD * cos + torch.cat([-second, first], dim=-1) * sin


def plain(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[tuple[int, ...], ...], heads: tuple[int, int],
    scale: float, window: int, angles: tuple[Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    """Masked attention over whole rows; padding positions give zeros."""
    rows = len(lengths)
    width = len(query) // rows
    q, k, v = (
        part.view(rows, width, count, -1).transpose(1, 2)
        for part, count in zip((query, key, value), (heads[0], heads[1], heads[1]), strict=True)
    )
    if angles is not None:
        q, k = turned(q, *angles), turned(k, *angles)
    document = torch.full((rows, width), -1)
    for row, held in enumerate(lengths):
        document[row, : sum(held)] = torch.repeat_interleave(torch.arange(len(held)), torch.tensor(held))
    position = torch.arange(width)
    distance = position[:, None] - position[None]
    sees = (document[:, :, None] == document[:, None]) & (distance >= 0)
    if window:
        sees &= distance < window
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=sees[:, None], scale=scale, enable_gqa=True)
    real = (document >= 0)[:, None, :, None]
    return torch.where(real, output, 0.0).transpose(1, 2).reshape(rows * width, -1)


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


needs_kernel = pytest.mark.skipif(document_kernel.block() == 0, reason="needs a processor with AVX-512 BF16")


@needs_kernel
@pytest.mark.parametrize("size", [16, 48, 64, 80])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("window", [0, 1, 9, 200])
def test_the_kernel_equals_masked_attention(size: int, heads: tuple[int, int], window: int) -> None:
    compare(torch.bfloat16, MANY, heads, window, is_turned=window == 9, width=60, size=size)


@needs_kernel
@pytest.mark.parametrize("lengths", [((1100, 513, 40),), ((512, 1), (1024, 601))])
@pytest.mark.parametrize("heads", [(4, 2), (3, 1)])
@pytest.mark.parametrize("window", [0, 1, 40, 513, 700])
def test_documents_of_several_blocks(lengths: tuple[tuple[int, ...], ...], heads: tuple[int, int], window: int) -> None:
    compare(torch.bfloat16, lengths, heads, window, is_turned=window == 40, width=1660, size=32)


@needs_kernel
def test_the_kernel_gives_the_same_bits_again() -> None:
    """Threads share documents out in any order, but nothing is added up in it."""
    parts = [made(1500, count * 64, dtype=torch.bfloat16, seed=seed) for seed, count in enumerate((4, 2, 2))]
    plan = DocumentLayout(((1300, 200),)).plan(parts[0], 1, 1500)
    found = []
    for _ in range(4):
        own = [part.clone().requires_grad_(True) for part in parts]
        output = attend(own[0], own[1], own[2], plan, (4, 2, 64), 0.125, 0)
        output.backward(parts[0])
        found.append([output.detach(), *(part.grad for part in own)])
    for again in found[1:]:
        for one, other in zip(found[0], again, strict=True):
            assert one is not None
            assert other is not None
            assert torch.equal(one, other)


@needs_kernel
@pytest.mark.parametrize("lengths", [((200, 100, 1), (301,)), ((700,),)])
def test_the_kernel_and_the_products_are_twins(
    lengths: tuple[tuple[int, ...], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel keeps scores in fp32, so it is the nearer one to the truth; both round what they give back to bf16."""
    rows, width = len(lengths), sum(lengths[0])
    parts = [made(rows * width, count * 64, dtype=torch.bfloat16, seed=seed) for seed, count in enumerate((6, 2, 2))]
    grad = made(rows * width, 6 * 64, dtype=torch.bfloat16, seed=9)
    plan = DocumentLayout(lengths).plan(parts[0], rows, width)
    found = {}
    for name in ("kernel", "products"):
        if name == "products":
            monkeypatch.setattr(document_kernel, "can_attend", lambda size, dtype: False)
        own = [part.clone().requires_grad_(True) for part in parts]
        output = attend(own[0], own[1], own[2], plan, (6, 2, 64), 0.125, 0)
        output.backward(grad)
        found[name] = [output.detach().double(), *(part.grad.double() for part in own if part.grad is not None)]
    truth = [part.double().requires_grad_(True) for part in parts]
    plain(truth[0], truth[1], truth[2], lengths, (6, 2), 0.125, 0, None).backward(grad.double())
    for kernel, product in zip(found["kernel"], found["products"], strict=True):
        assert float((kernel - product).norm() / product.norm()) < 0.01
    for number, part in enumerate(truth, start=1):
        assert part.grad is not None
        errors = {name: float((parts[number] - part.grad).norm()) for name, parts in found.items()}
        assert errors["kernel"] < errors["products"]


def test_pairs_that_see_each_other() -> None:
    for length, window in ((1, 0), (7, 0), (7, 1), (7, 3), (7, 7), (7, 50)):
        seen = sum(min(query + 1, window or length) for query in range(length))
        assert document_kernel.pairs_of([2, 1], [length, 3], window) == 2 * seen + sum(
            min(query + 1, window or 3) for query in range(3)
        )


@needs_kernel
def test_what_is_not_a_number_is_not_hidden() -> None:
    parts = [made(20, 2 * 16, dtype=torch.bfloat16, seed=seed) for seed in range(3)]
    parts[0][3, 1] = torch.nan
    plan = DocumentLayout(((20,),)).plan(parts[0], 1, 20)
    output = attend(parts[0], parts[1], parts[2], plan, (2, 2, 16), 0.25, 0)
    is_none = output.isnan().any(dim=1)
    assert is_none.nonzero().flatten().tolist() == [3]


def compare(
    dtype: torch.dtype,
    lengths: tuple[tuple[int, ...], ...],
    heads: tuple[int, int],
    window: int,
    is_turned: bool,
    width: int = WIDTH,
    size: int = SIZE,
) -> None:
    rows = len(lengths)
    parts = [
        made(rows * width, count * size, dtype=dtype, seed=seed)
        for seed, count in enumerate((heads[0], heads[1], heads[1]))
    ]
    grad = made(rows * width, heads[0] * size, dtype=dtype, seed=9)
    layout = DocumentLayout(lengths)
    plan = layout.plan(parts[0], rows, width)
    angles = rotary(rows, width, size, dtype) if is_turned else None
    ours = [part.clone().requires_grad_(True) for part in parts]
    output = attend(ours[0], ours[1], ours[2], plan, (*heads, size), 0.3, window, angles)
    output.backward(grad)
    truth = [part.double().requires_grad_(True) for part in parts]
    wide = None if angles is None else (angles[0].double(), angles[1].double())
    expected = plain(truth[0], truth[1], truth[2], lengths, heads, 0.3, window, wide)
    real = torch.tensor([[column < sum(held) for column in range(width)] for held in lengths]).flatten()
    expected.backward(torch.where(real[:, None], grad.double(), 0.0))
    pairs = [(output, expected), *((o.grad, t.grad) for o, t in zip(ours, truth, strict=True))]
    for mine, right in pairs:
        assert mine is not None
        assert right is not None
        assert mine.dtype == dtype
        norm = float(right.detach().norm())
        if window == 1:  # who sees only himself has no gradient of scores
            norm = max(norm, float(expected.detach().norm()))
        error = float((mine.double() - right).detach().norm()) / norm
        assert error < TOLERANCE[dtype], f"off by {error:.1e}"
