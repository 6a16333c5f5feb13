"""Attention inside documents against plain causal attention of each document alone, in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tunewise.errors import Conflict
from tunewise.layers.attention import DocumentLayout, per_document_attention

ROWS = ((9, 30, 3), (20, 21, 1), (7,), (12, 12, 12, 11))
WIDTH = 47


def queries(heads: int, groups: int, dtype: torch.dtype = torch.float64, size: int = 8) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(heads, size), (heads // groups, size), (heads // groups, size)]
    return [torch.randn(len(ROWS), h, WIDTH, d, dtype=dtype, requires_grad=True) for h, d in shapes]


def reference(parts: list[Tensor], scaling: float, window: int | None, softcap: float | None) -> list[Tensor]:
    """One matrix of scores for each document, (H, L, D) each."""
    outputs = []
    for row, lengths in enumerate(ROWS):
        start = 0
        for length in lengths:
            query, key, value = (part[row, :, start : start + length] for part in parts)
            groups = query.shape[0] // key.shape[0]
            key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
            scores = query @ key.transpose(1, 2) * scaling
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            ahead = torch.arange(length)[None, :] - torch.arange(length)[:, None]
            hidden = ahead > 0 if window is None else (ahead > 0) | (ahead <= -window)
            outputs.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value)
            start += length
    return outputs


def documents_of(output_RLHD: Tensor) -> list[Tensor]:
    found = []
    for row, lengths in enumerate(ROWS):
        start = 0
        for length in lengths:
            found.append(output_RLHD[row, start : start + length].transpose(0, 1))
            start += length
    return found


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 5, 12])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_packed_documents_match_each_alone(groups: int, window: int | None, softcap: float | None) -> None:
    parts = queries(4, groups)
    attend = per_document_attention(DocumentLayout(lengths=ROWS))
    output, weights = attend(nn.Module(), *parts, None, scaling=0.3, sliding_window=window, softcap=softcap)
    assert weights is None
    assert output.shape == (len(ROWS), WIDTH, 4, 8)
    expected = reference(parts, 0.3, window, softcap)
    # The softmax of softcapped scores is fp32 on purpose, like in transformers.
    tolerance = 1e-10 if softcap is None else 1e-5
    for ours, theirs in zip(documents_of(output), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    weight = torch.randn(4, WIDTH, 8, dtype=torch.float64)

    def gradients(documents: list[Tensor]) -> tuple[Tensor, ...]:
        weighted = torch.stack([(document * weight[:, : document.shape[1]]).sum() for document in documents])
        return torch.autograd.grad(weighted.sum(), parts)

    for our_gradient, their_gradient in zip(gradients(documents_of(output)), gradients(expected), strict=True):
        torch.testing.assert_close(our_gradient, their_gradient, rtol=tolerance, atol=tolerance)


def test_padding_is_zero_and_has_no_gradient() -> None:
    parts = queries(4, 1)
    output, _ = per_document_attention(DocumentLayout(lengths=ROWS))(nn.Module(), *parts, None)
    for row, lengths in enumerate(ROWS):
        assert output[row, sum(lengths) :].abs().sum() == 0
    output.square().sum().backward()
    for part in parts:
        assert part.grad is not None
        assert torch.isfinite(part.grad).all()
        assert part.grad[2, :, 7:].abs().sum() == 0


def test_one_document_a_row_is_one_causal_attention() -> None:
    parts = queries(4, 2)
    query, key, value = parts
    whole = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    expected = whole.transpose(1, 2)
    for lengths in (None, ((47,), (20,), (1,), (33,))):
        output, _ = per_document_attention(DocumentLayout(lengths=lengths))(nn.Module(), *parts, None)
        assert torch.equal(output, expected)


def test_plan_follows_the_micro_batch() -> None:
    layout = DocumentLayout(lengths=((20, 27),))
    attend = per_document_attention(layout)
    parts = [part[:1] for part in queries(2, 1)]
    first, _ = attend(nn.Module(), *parts, None)
    layout.lengths = ((10, 37),)
    second, _ = attend(nn.Module(), *parts, None)
    layout.lengths = ((20, 27),)
    third, _ = attend(nn.Module(), *parts, None)
    assert torch.equal(first, third)
    assert not torch.allclose(first[:, 10:20], second[:, 10:20])


def test_dropout_drops() -> None:
    parts = queries(2, 1)
    attend = per_document_attention(DocumentLayout(lengths=ROWS))
    plain, _ = attend(nn.Module(), *parts, None)
    draws = torch.stack([attend(nn.Module(), *parts, None, dropout=0.2)[0] for _ in range(300)])
    assert not torch.equal(draws[0], draws[1])
    assert (draws.mean(0) - plain).abs().max() < 0.35


def test_what_it_cannot_compute_is_refused() -> None:
    parts = queries(2, 1)
    attend = per_document_attention(DocumentLayout(lengths=ROWS))
    with pytest.raises(Conflict, match="'s_aux'"):
        attend(nn.Module(), *parts, None, s_aux=torch.zeros(2))
    with pytest.raises(Conflict, match="neither a mask nor a cache"):
        attend(nn.Module(), *parts, torch.zeros(4, 1, WIDTH, WIDTH))
    with pytest.raises(Conflict, match="neither a mask nor a cache"):
        attend(nn.Module(), parts[0][:, :, :1], *parts[1:], None)
    with pytest.raises(Conflict, match="is causal"):
        attend(nn.Module(), *parts, None, is_causal=False)
    with pytest.raises(ValueError, match="4 rows"):
        attend(nn.Module(), *(part[:2] for part in parts), None)
    attend(nn.Module(), *parts, None, s_aux=None, position_ids=torch.zeros(4, WIDTH), use_cache=False)


@pytest.mark.parametrize(("use_varlen", "window"), [(False, None), (False, 5), (True, None), (True, 5)])
def test_dry_run_has_the_same_shapes(use_varlen: bool, window: int | None) -> None:
    with FakeTensorMode():
        parts = queries(4, 2, torch.bfloat16)
        attend = per_document_attention(DocumentLayout(lengths=ROWS), use_varlen)
        output, _ = attend(nn.Module(), *parts, None, sliding_window=window)
        assert output.shape == (len(ROWS), WIDTH, 4, 8)
        output.float().sum().backward()
        for part in parts:
            assert part.grad is not None
            assert part.grad.shape == part.shape


def test_mask_for_models_that_make_none() -> None:
    ids = torch.zeros(2, 6, dtype=torch.long)
    assert DocumentLayout(lengths=((2, 3), (6,))).mask(ids) is None
    assert DocumentLayout(lengths=((2,), (6,)), mask_dtype=torch.bool).mask(ids) is None
    mask = DocumentLayout(lengths=((2, 3), (6,)), mask_dtype=torch.bool).mask(ids)
    assert mask is not None
    assert mask[1, 0].equal(torch.ones(6, 6, dtype=torch.bool).tril())
    expected = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3), torch.ones(1, 1)).tril().bool()
    assert mask[0, 0].equal(expected)
    added = DocumentLayout(lengths=((2, 3), (6,)), mask_dtype=torch.float32).mask(ids)
    assert added is not None
    assert added.eq(0).equal(mask)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 5])
def test_varlen_kernel_matches_buckets(window: int | None) -> None:
    parts = [part.detach().cuda().bfloat16().requires_grad_() for part in queries(4, 2, torch.float32, size=64)]
    results = []
    for use_varlen in (True, False):
        attend = per_document_attention(DocumentLayout(lengths=ROWS), use_varlen)
        output, _ = attend(nn.Module(), *parts, None, sliding_window=window)
        loss = torch.stack([part.float().square().sum() for part in documents_of(output)]).sum()
        results.append((documents_of(output), torch.autograd.grad(loss, parts)))
    for ours, theirs in zip(*(documents for documents, _ in results), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    for ours, theirs in zip(*(gradients for _, gradients in results), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=5e-2)
