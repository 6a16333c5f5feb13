"""Tensors without values, made so that whole libraries can build, move and copy their modules out of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorConverter, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

DEVICE = torch.ops.prim.device.default
"""Asked several times for each operator, and only of fake tensors: they know without going down all modes."""


class FakeTensors(FakeTensorMode):
    """torch's fake tensors, whose modules can also be moved (`module.to`) and copied (`copy.deepcopy`).

    Real tensors may take part: the generator's state in a checkpoint is one.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.fake_tensor_converter = _Forgetful()

    def __deepcopy__(self, memo: dict[int, Any]) -> FakeTensors:
        """Return this very mode: a fake tensor's copy carries a copy of its attributes, and the mode is one of them."""
        return self


class _Forgetful(FakeTensorConverter):
    """Remembers no tensor that it has made.

    torch 2.13 keeps weak references to them to find them again by the meta tensors inside; and `module.to` swaps fake
    parameters, which it refuses to do with anything that has a weak reference ("Cannot swap t1 because ...").
    """

    def set_tensor_memo(self, t: Tensor, v: FakeTensor) -> None:
        """Forget `v`."""


class Answers(TorchDispatchMode):
    """What fake tensors cannot answer by themselves.

    - A number read out of a tensor is 1: Adafactor reads norms, optimizers count their steps.
    - A truth is yes (a random number is above a rate of dropout), but whether *any* of many is so is answered with no:
      libraries ask that about what should not be, such as infinities.
    - A grouped product (mixture of experts) has the size that its operands say in any dtype; torch 2.13's own rule
      knows bf16 only.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is DEVICE:
            return args[0].fake_device
        if func is aten._local_scalar_dense.default:
            return _number(args[0])
        if func is aten._grouped_mm.default:
            left, right, offsets = (*args, *(kwargs or {}).values())[:3]
            groups = (offsets.shape[0],) if left.ndim == right.ndim == 2 else ()
            return left.new_empty((*groups, left.shape[-2], right.shape[-1]))
        output = func(*args, **(kwargs or {}))
        if func is aten.any.default:
            output.is_about_any = True
        return output


def _number(tensor: Tensor) -> float | int | bool:
    if tensor.dtype == torch.bool:
        return not getattr(tensor, "is_about_any", False)
    return 1.0 if tensor.is_floating_point() else 1
