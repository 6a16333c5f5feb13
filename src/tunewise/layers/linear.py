"""What counts as a linear layer, and what its weight is, however that weight is stored.

Everything that replaces, wraps or merges linear layers reads them through the functions here, so that
nn.Linear, GPT-2's transposed Conv1D, our packed layers and bitsandbytes' layers look the same: a weight of
shape (out, in).
"""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.pytorch_utils import Conv1D


class PackedLinear(nn.Module, ABC):
    """A frozen linear layer whose stored numbers are not its weight: they must be unpacked first.

    Attributes:
        in_features: size of the input's last dimension.
        out_features: size of the output's last dimension.
        was_transposed: whether a Conv1D stood here before packing.
    """

    in_features: int
    out_features: int
    was_transposed: bool

    @abstractmethod
    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """Unpack the weight into a fresh tensor of shape (out, in)."""

    @abstractmethod
    def to_dense(self, dtype: torch.dtype) -> nn.Module:
        """Return the layer that stood here before packing (nn.Linear or Conv1D) with the unpacked weight."""

    def add_input_gradient(self, grad_TO: Tensor, grad_TI: Tensor | None) -> Tensor:
        """Return grad_TO times the weight, in the gradient's dtype; added into `grad_TI` where that is given."""
        weight_OI = self.dense_weight(grad_TO.dtype)
        return grad_TO @ weight_OI if grad_TI is None else grad_TI.addmm_(grad_TO, weight_OI)


def is_linear(module: nn.Module) -> bool:
    """Whether `module` computes x W^T + b: nn.Linear and its subclasses, Conv1D, packed layers."""
    return isinstance(module, (nn.Linear, Conv1D, PackedLinear))


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored as (in, out), as in transformers' Conv1D."""
    return isinstance(module, Conv1D)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Return (in_features, out_features) of a linear layer."""
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    assert isinstance(module, (nn.Linear, PackedLinear)), f"{type(module).__name__} is no linear layer"
    return module.in_features, module.out_features


def weight_of(layer: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """Return the layer's weight, shape (out, in), in `dtype` (None: as stored, and fp32 where it is packed).

    The result may share memory with the layer: do not write into it.
    """
    if isinstance(layer, PackedLinear):
        return layer.dense_weight(dtype or torch.float32)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, Conv1D):
        weight = weight.T
    elif _is_bitsandbytes(layer):
        weight = _bitsandbytes_weight(layer)
    return weight if dtype is None else weight.to(dtype)


def add_input_gradient(layer: nn.Module, grad_TO: Tensor, grad_TI: Tensor | None = None) -> Tensor:
    """Return what a gradient of the layer's output is of its input, (T, in), in the gradient's dtype.

    Args:
        layer: linear, of any kind.
        grad_TO: of the output.
        grad_TI: what to add it to, in place; None: a fresh tensor.
    """
    if isinstance(layer, PackedLinear):
        return layer.add_input_gradient(grad_TO, grad_TI)
    weight_OI = weight_of(layer, grad_TO.dtype)
    return grad_TO @ weight_OI if grad_TI is None else grad_TI.addmm_(grad_TO, weight_OI)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers of a language model by name, in its order, but not the head and bypassed ones."""
    head = output_head(model)
    return {
        name: module
        for name, module in model.named_modules()
        if is_linear(module) and module is not head and not is_bypassed(model, name)
    }


def is_bypassed(model: nn.Module, name: str) -> bool:
    """Whether a state-space mixer takes this layer's tensors instead of calling it.

    Its fused kernels do (Mamba and its descendants), so what is put in the layer's place would not be computed.
    """
    owner_name, _, own_name = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if not any(isinstance(child, nn.Conv1d) for child in owner.children()):
        return False
    code = inspect.getsource(type(owner))
    return re.search(rf"self\.{re.escape(own_name)}\.(weight|bias)\b", code) is not None


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the layer that turns hidden states into logits, or None when the model names none."""
    get = getattr(model, "get_output_embeddings", None)
    head = None if get is None else get()
    return head if isinstance(head, nn.Module) else None


def is_tied(model: nn.Module) -> bool:
    """Whether the output head and the token embedding are one and the same tensor."""
    head = output_head(model)
    get = getattr(model, "get_input_embeddings", None)
    embedding = None if get is None else get()
    weight = getattr(head, "weight", None)
    return weight is not None and weight is getattr(embedding, "weight", None)


def stacked_experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of mixture-of-experts layers kept as one tensor, shape (expert, out, in)."""
    return {
        f"{owner}.{name}": parameter
        for owner, module in model.named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    }


def any_tensor(layer: nn.Module) -> Tensor:
    """Return one of the layer's tensors: what is made like it lies on its device and is fake where it is."""
    tensor = next(layer.parameters(), None)
    return next(layer.buffers()) if tensor is None else tensor


def has_values(tensor: Tensor) -> bool:
    """Whether there are numbers behind the tensor: False for fake tensors (a dry run) and meta tensors."""
    return not isinstance(tensor, FakeTensor) and not tensor.is_meta


def without_view(tensor: Tensor) -> Tensor:
    """Return the same memory as a tensor that autograd does not take for a view.

    What an autograd function returns may be written into by the model (Falcon does), which torch forbids for
    a view made inside the function, and many linear layers return one. The original must not be used any
    more.
    """
    unviewed: Tensor = torch.ops.aten._unsafe_view(tensor, tensor.shape)
    return unviewed


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which a matmul with `tensor` runs: autocast's where it is on, else its own."""
    device_type = tensor.device.type
    if torch.is_autocast_enabled(device_type) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return tensor.dtype


def _is_bitsandbytes(layer: nn.Module) -> bool:
    return any(kind.__module__.startswith("bitsandbytes.") for kind in type(layer).__mro__)


def _bitsandbytes_weight(layer: nn.Module) -> Tensor:
    """Unpack the weight of bitsandbytes' Linear4bit or Linear8bitLt, shape (out, in)."""
    from bitsandbytes import functional

    weight = layer.weight
    assert isinstance(weight, Tensor)
    quant_state = getattr(weight, "quant_state", None)
    if quant_state is not None:
        dense: Tensor = functional.dequantize_4bit(weight.data, quant_state)
        return dense
    # After its first forward pass an 8-bit layer keeps the row scales in its matmul state.
    scales: Tensor | None = getattr(weight, "SCB", None)
    if scales is None:
        scales = getattr(getattr(layer, "state", None), "SCB", None)
    return weight.data if scales is None else weight.data * (scales.float() / 127.0)[:, None]
