"""The LoRA layer: the fast path equals the composed one, it keeps only its input, and it holds any base
layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from tunewise.errors import InputError
from tunewise.layers.linear import weight_of
from tunewise.layers.lora import LoRALinear, lora_linear_reference, merge_lora
from tunewise.layers.quantized import Int8Linear, quantize_linear

IN, OUT, RANK = 24, 40, 4
BASES = ("linear", "linear without bias", "conv1d", "nf4", "int8", "bnb4", "bnb8")


def make_base(kind: str) -> nn.Module:
    base: nn.Module
    if kind == "conv1d":
        base = Conv1D(OUT, IN)
        base.load_state_dict({"weight": torch.randn(IN, OUT), "bias": torch.randn(OUT)})
    elif kind in ("bnb4", "bnb8"):
        return make_bitsandbytes(kind)
    else:
        base = nn.Linear(IN, OUT, bias=kind != "linear without bias")
    if kind == "nf4":
        base = quantize_linear(base, "nf4")
    if kind == "int8":
        base = quantize_linear(base, "int8")
    return base.requires_grad_(False)


def make_bitsandbytes(kind: str) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    # Rows of whole blocks: with shorter ones bitsandbytes 0.50.2 itself unpacks wrongly on the CPU.
    dense = nn.Linear(64, OUT)
    if kind == "bnb4":
        layer = bnb.nn.Linear4bit(64, OUT, quant_type="nf4", compute_dtype=torch.float32)
    else:
        layer = bnb.nn.Linear8bitLt(64, OUT, has_fp16_weights=False)
    layer.load_state_dict(dense.state_dict())
    module: nn.Module = layer.to("cpu")
    return module.requires_grad_(False)


def make_layer(kind: str, dtype: torch.dtype = torch.float32, dropout: float = 0.0, seed: int = 0) -> LoRALinear:
    torch.manual_seed(seed)
    layer = LoRALinear(make_base(kind), RANK, scale=1.5, dropout=dropout)
    layer.initialize("kaiming", torch.Generator().manual_seed(1))
    nn.init.normal_(layer.lora_B.weight)
    return layer if dtype == torch.float32 else layer.to(dtype)


def run_both(layer: LoRALinear, input: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return (fast, reference): output and gradients of one weighted sum of the outputs."""
    results = []
    for call in (layer, composed(layer)):
        x = input.detach().clone().requires_grad_(True)
        output = call(x)
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        grads = torch.autograd.grad((output * weights).sum(), [x, layer.lora_A.weight, layer.lora_B.weight])
        results.append(dict(zip(("output", "input", "A", "B"), (output.detach(), *grads), strict=True)))
    return results[0], results[1]


def composed(layer: LoRALinear) -> Any:
    return lambda x: lora_linear_reference(x, layer.base_layer, layer.lora_A.weight, layer.lora_B.weight, layer.scale)


def relative(ours: Tensor, truth: Tensor) -> float:
    ours, truth = ours.detach().double(), truth.detach().double()
    return float((ours - truth).norm() / truth.norm())


@pytest.mark.parametrize("kind", BASES)
def test_fast_path_equals_reference_in_fp32(kind: str) -> None:
    layer = make_layer(kind)
    fast, truth = run_both(layer, torch.randn(2, 5, layer.in_features))
    for name in truth:
        assert fast[name].dtype == truth[name].dtype
        assert relative(fast[name], truth[name]) < 1e-5, name


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_fast_path_equals_reference_in_fp64(kind: str) -> None:
    fast, truth = run_both(make_layer(kind, torch.float64), torch.randn(7, IN, dtype=torch.float64))
    for name in truth:
        assert relative(fast[name], truth[name]) < 1e-10, name


@pytest.mark.parametrize("kind", ["linear", "conv1d", "nf4", "int8"])
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
def test_fast_path_is_as_near_the_truth_as_the_reference_in_bf16(kind: str, factor_dtype: torch.dtype) -> None:
    layer = make_layer(kind)
    exact, _ = run_both(layer, torch.randn(64, IN, generator=torch.Generator().manual_seed(2)))
    if kind in ("linear", "conv1d"):
        layer.base_layer.to(torch.bfloat16)
    layer.lora_A.to(factor_dtype)
    layer.lora_B.to(factor_dtype)
    fast, _ = run_both(layer, torch.randn(64, IN, generator=torch.Generator().manual_seed(2)).bfloat16())
    for name in exact:
        # Four roundings to 8 bits of mantissa, 2^-9 each; cancellation in sums lifts that to 1.5 %.
        assert relative(fast[name], exact[name]) < 1.5e-2, name
    assert fast["output"].dtype == fast["input"].dtype == torch.bfloat16
    assert fast["A"].dtype == fast["B"].dtype == factor_dtype


def test_gradients_are_right_by_finite_differences() -> None:
    layer = make_layer("linear", torch.float64)
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)

    def output(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(layer, {"lora_A.weight": a, "lora_B.weight": b}, (x,))
        return result

    assert torch.autograd.gradcheck(output, (x, layer.lora_A.weight, layer.lora_B.weight))


@pytest.mark.parametrize("kind", BASES)
def test_zero_b_gives_the_base_bit_for_bit(kind: str) -> None:
    layer = make_layer(kind)
    nn.init.zeros_(layer.lora_B.weight)
    x = torch.randn(3, 4, layer.in_features)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("kind", ["linear", "conv1d", "nf4", "int8"])
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_parameters(kind: str) -> None:
    layer = make_layer(kind)
    x = torch.randn(6, IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
        truth = composed(layer)(x)
    assert output.dtype == truth.dtype == torch.bfloat16
    assert relative(output, truth) < 1e-2
    output.float().sum().backward()
    assert x.grad is not None
    assert {x.grad.dtype, layer.lora_A.weight.grad.dtype} == {torch.float32}  # type: ignore[union-attr]


@contextlib.contextmanager
def saved_sizes(sizes: list[int]) -> Iterator[None]:
    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


@pytest.mark.parametrize("kind", ["linear", "conv1d", "nf4", "int8"])
def test_keeps_only_the_input_besides_the_factors(kind: str) -> None:
    layer = make_layer(kind)
    x = torch.randn(50, IN, requires_grad=True)
    sizes: list[int] = []
    with saved_sizes(sizes):
        layer(x)
    assert sorted(sizes) == sorted([50 * IN, RANK * IN, OUT * RANK])


class CountingLinear(Int8Linear):
    """A base layer that counts how often its weight is asked for."""

    asked = 0

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        self.asked += 1
        return super().dense_weight(dtype)


@pytest.mark.parametrize(("needs_input_grad", "asked"), [(False, 1), (True, 2)])
def test_reads_the_weight_in_backward_only_for_an_input_that_needs_it(needs_input_grad: bool, asked: int) -> None:
    base = CountingLinear(nn.Linear(IN, OUT))
    layer = LoRALinear(base.requires_grad_(False), RANK, 1.0)
    layer(torch.randn(5, IN, requires_grad=needs_input_grad)).sum().backward()
    assert base.asked == asked
    assert layer.lora_B.weight.grad is not None


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("shape", [(3,), (2, 3), (3, 0)])
@pytest.mark.parametrize("in_place", [True, False])
def test_the_output_may_be_written_into(kind: str, shape: tuple[int, ...], in_place: bool) -> None:
    """As Falcon does."""
    layer = make_layer(kind)
    layer.in_place = in_place
    input = torch.randn(*shape, layer.in_features, requires_grad=True)
    output = layer(input)
    output += 1.0
    output.sum().backward()
    assert output.shape == (*shape, layer.out_features)
    assert layer.lora_A.weight.grad is not None


def test_frozen_factor_gets_no_gradient() -> None:
    layer = make_layer("linear")
    layer.lora_A.requires_grad_(False)
    layer(torch.randn(5, IN)).sum().backward()
    assert layer.lora_A.weight.grad is None
    assert layer.lora_B.weight.grad is not None


@pytest.mark.parametrize("kind", ["linear", "nf4"])
def test_gradient_checkpointing_gives_the_same_bits(kind: str) -> None:
    layer = make_layer(kind)
    x = torch.randn(5, IN, requires_grad=True)
    parameters = [x, layer.lora_A.weight, layer.lora_B.weight]
    plain = torch.autograd.grad(layer(x).square().sum(), parameters)
    again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), parameters)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("kind", ["linear", "conv1d", "nf4", "int8"])
def test_runs_on_fake_tensors(kind: str) -> None:
    with FakeTensorMode():
        layer = LoRALinear(make_base(kind), RANK, scale=2.0)
        layer.initialize("kaiming", torch.Generator())
        x = torch.randn(5, IN, requires_grad=True)
        output = layer(x)
        output.sum().backward()
    assert output.shape == (5, OUT)
    assert layer.lora_B.weight.grad is not None
    assert layer.lora_B.weight.grad.shape == (OUT, RANK)


def test_a_trained_base_weight_gets_its_gradient() -> None:
    layer = make_layer("linear")
    layer.base_layer.requires_grad_(True)
    x = torch.randn(5, IN)
    layer(x).sum().backward()
    assert torch.allclose(layer.base_layer.bias.grad, torch.full((OUT,), 5.0))  # type: ignore[arg-type]
    assert torch.allclose(layer.base_layer.weight.grad[0], x.sum(0), atol=1e-5)  # type: ignore[index]


def test_dropout_acts_on_the_update_only_and_only_in_training() -> None:
    layer = make_layer("linear", dropout=0.5)
    x = torch.ones(2000, IN)
    layer.eval()
    exact = layer(x)
    assert torch.equal(exact, make_layer("linear")(x))
    layer.train()
    mean = layer(x).mean(0)
    assert not torch.equal(layer(x), layer(x))
    assert relative(mean, exact[0]) < 0.05
    nn.init.zeros_(layer.lora_B.weight)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("kind", BASES[:-1])
def test_merged_equals_unmerged(kind: str) -> None:
    layer = make_layer(kind)
    model = nn.Sequential(layer)
    x = torch.randn(4, layer.in_features)
    before = model(x)
    assert torch.allclose(x @ (layer.merged_weight().T) + base_bias(layer), before, rtol=1e-5, atol=1e-5)
    if kind == "bnb4":
        return
    merge_lora(model)
    assert type(model[0]) is (Conv1D if kind == "conv1d" else nn.Linear)
    assert torch.allclose(model(x), before, rtol=1e-5, atol=1e-5)


def base_bias(layer: LoRALinear) -> Tensor | float:
    bias = layer.base_layer.bias
    assert bias is None or isinstance(bias, Tensor)
    return 0.0 if bias is None else bias


def test_kaiming_and_gaussian_have_pefts_distributions_and_depend_on_the_generator_only() -> None:
    layer = LoRALinear(nn.Linear(1000, 8), 16, 1.0)
    layer.initialize("kaiming", torch.Generator().manual_seed(3))
    a = layer.lora_A.weight.detach().clone()
    assert a.abs().max() <= 1000**-0.5
    assert abs(float(a.std()) * (3 * 1000) ** 0.5 - 1) < 0.02
    layer.initialize("kaiming", torch.Generator().manual_seed(3))
    assert torch.equal(a, layer.lora_A.weight)
    layer.initialize("gaussian", torch.Generator().manual_seed(3))
    assert abs(float(layer.lora_A.weight.detach().std()) * 16 - 1) < 0.02
    assert not layer.lora_B.weight.any()


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_pissa_keeps_the_function_and_takes_the_largest_singular_values(kind: str) -> None:
    torch.manual_seed(0)
    base = make_base(kind)
    original = weight_of(base).clone()
    x = torch.randn(4, IN)
    truth = base(x)
    layer = LoRALinear(base, RANK, scale=2.0)
    layer.initialize("pissa")
    assert torch.allclose(layer(x), truth, atol=1e-5)
    singular = torch.linalg.svdvals(original)
    rest = torch.linalg.svdvals(weight_of(layer.base_layer))
    assert torch.allclose(rest[: IN - RANK], singular[RANK:], atol=1e-5)
    with torch.no_grad():
        layer.lora_A.weight.add_(0.1)
        layer.lora_B.weight.mul_(1.1)
    a, b = layer.update_factors()
    assert a.shape == (2 * RANK, IN)
    assert torch.allclose(original + layer.scale * b @ a, layer.merged_weight(), atol=1e-5)


def test_pissa_refuses_what_it_cannot_change() -> None:
    with pytest.raises(InputError, match="quantized"):
        LoRALinear(make_base("int8"), RANK, 1.0).initialize("pissa")
    with pytest.raises(InputError, match="at most 24"):
        LoRALinear(make_base("linear"), 30, 1.0).initialize("pissa")


def test_compiles_without_graph_breaks() -> None:
    layer = make_layer("linear")
    x = torch.randn(5, IN, requires_grad=True)
    compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), layer(x), atol=1e-6)
    parameters = [x, layer.lora_A.weight, layer.lora_B.weight]
    eager = torch.autograd.grad(layer(x).square().sum(), parameters)
    fast = torch.autograd.grad(compiled(x).square().sum(), parameters)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(eager, fast, strict=True))
