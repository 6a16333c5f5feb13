"""The compiled kernels against plain torch, loss and gradients, in fp32 and bf16."""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tunewise.errors import Conflict
from tunewise.layers import native
from tunewise.layers.fused import FusedRMSNorm, SwiGLU, cross_entropy_, rms_norm, swiglu_backward_

pytestmark = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler")

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
DTYPES = list(TOLERANCE)


def made(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def assert_close(ours: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    assert ours.dtype == dtype
    error = float((ours.detach().double() - truth.detach().double()).norm() / truth.detach().double().norm())
    assert error < TOLERANCE[dtype], f"off by {error:.1e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 31, 64, 200])
def test_rms_norm(dtype: torch.dtype, size: int) -> None:
    x, weight = made(3, 5, size, dtype=dtype, scale=3.0), made(size, dtype=dtype, seed=1)
    grad = made(3, 5, size, dtype=dtype, seed=2)
    norm = FusedRMSNorm(torch.nn.Parameter(weight.clone()), 1e-5)
    ours = x.clone().requires_grad_(True)
    output = norm(ours)
    output.backward(grad)
    plain, plain_weight = x.double().requires_grad_(True), weight.double().requires_grad_(True)
    truth = plain_weight * plain * torch.rsqrt(plain.square().mean(-1, keepdim=True) + 1e-5)
    truth.backward(grad.double())
    assert_close(output, truth, dtype)
    assert ours.grad is not None
    assert plain.grad is not None
    # With one column nothing but eps is left of the gradient, and in fp32 less than that.
    if size > 1:
        assert_close(ours.grad, plain.grad, dtype)
    assert norm.weight.grad is not None
    assert plain_weight.grad is not None
    assert_close(norm.weight.grad, plain_weight.grad, dtype)


def test_a_norm_of_mixed_dtypes_is_computed_plainly() -> None:
    norm = FusedRMSNorm(torch.nn.Parameter(made(16)), 1e-6)
    x = made(4, 16, dtype=torch.bfloat16)
    truth = norm.weight * F.rms_norm(x.float(), (16,), eps=1e-6).to(torch.bfloat16)
    assert torch.allclose(norm(x), truth, atol=1e-2)
    assert norm(x).dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype: torch.dtype) -> None:
    gate, up, grad = (made(7, 33, dtype=dtype, scale=3.0, seed=seed) for seed in range(3))
    ours = [gate.clone().requires_grad_(True), up.clone().requires_grad_(True)]
    output = SwiGLU.apply(*ours)
    output.backward(grad)
    plain = [gate.double().requires_grad_(True), up.double().requires_grad_(True)]
    truth = F.silu(plain[0]) * plain[1]
    truth.backward(grad.double())
    assert_close(output, truth, dtype)
    for mine, right in zip(ours, plain, strict=True):
        assert mine.grad is not None
        assert right.grad is not None
        assert_close(mine.grad, right.grad, dtype)
    swiglu_backward_(grad, gate, up)
    assert ours[0].grad is not None
    assert ours[1].grad is not None
    assert torch.equal(gate, ours[0].grad)
    assert torch.equal(up, ours[1].grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("vocab", [2, 97, 1000])
def test_cross_entropy(dtype: torch.dtype, scale: float, vocab: int) -> None:
    logits, labels = made(9, vocab, dtype=dtype, scale=20.0), torch.arange(9) % vocab
    plain = logits.double().requires_grad_(True)
    truth = F.cross_entropy(plain * scale, labels, reduction="none")
    truth.sum().backward()
    loss = cross_entropy_(logits, labels, scale)
    assert torch.allclose(loss.double(), truth, rtol=1e-5, atol=1e-5)
    assert plain.grad is not None
    assert_close(logits, plain.grad, dtype)


def test_what_padding_adds_has_no_gradient_at_all() -> None:
    """Not even a tiny one: Adam divides by its size."""
    logits = made(3, 40)
    logits[:, 33:] = float("-inf")
    logits[:, 32] = -1e4
    cross_entropy_(logits, torch.tensor([1, 2, 3]), 1.0)
    assert not logits[:, 32:].any()
    assert logits[:, :32].all()


def test_what_is_not_a_number_stays_visible() -> None:
    logits = made(2, 40)
    logits[0, 3] = math.nan
    loss = cross_entropy_(logits, torch.tensor([1, 1]), 1.0)
    assert loss[0].isnan()
    assert loss[1].isfinite()


def test_a_dry_run_sees_the_results_and_nothing_else() -> None:
    with FakeTensorMode():
        x = torch.empty(6, 8, dtype=torch.bfloat16)
        y, scale = rms_norm(x, torch.empty(8, dtype=torch.bfloat16), 1e-5)
    assert y.shape == x.shape
    assert scale.shape == (6,)
    assert scale.dtype == torch.float32


def test_without_a_compiler_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(Conflict, match="no C\\+\\+ compiler"):
        native.library.__wrapped__()


def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "FLAGS", ("-no-such-flag",))
    with pytest.raises(Conflict, match="cannot compile"):
        native.library.__wrapped__()


def test_a_damaged_library_is_compiled_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loaded, compiled = [], []

    def compile_(compiler: str, place: Path) -> None:
        compiled.append(compiler)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"library {len(compiled)}")

    def load(path: str) -> str:
        loaded.append(Path(path).read_text())
        if loaded[-1] == "damaged":
            raise OSError("file too short")
        return loaded[-1]

    monkeypatch.setattr(native, "_compile", compile_)
    monkeypatch.setattr(ctypes, "CDLL", load)
    native.library.__wrapped__()
    native.library.__wrapped__()
    (made,) = (tmp_path / "tunewise" / "kernels").iterdir()
    made.write_text("damaged")
    native.library.__wrapped__()
    assert loaded == ["library 1", "library 1", "damaged", "library 2"]


def test_without_a_place_for_the_library_the_error_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tunewise").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(Conflict, match=r"cannot be kept in .*XDG_CACHE_HOME"):
        native.library.__wrapped__()


def test_a_machine_that_cannot_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.why_not() is None

    def refuse() -> None:
        raise Conflict("fused: no compiler")

    monkeypatch.setattr(native, "library", refuse)
    assert native.why_not.__wrapped__() == "fused: no compiler"


def test_processes_that_compile_at_once_all_get_a_library(tmp_path: Path) -> None:
    code = "from tunewise.layers import native; native.library(); print(native.why_not())"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate()[0].strip() for process in running] == ["None", "None"]
    assert [file.suffix for file in (tmp_path / "tunewise" / "kernels").iterdir()] == [".so"]
