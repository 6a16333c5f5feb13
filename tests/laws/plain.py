"""The learning problem as its formula says: the library's model, weights put together from the trained numbers by the
textbook, one document after the other, and autograd. None of our layers computes anything here.

Shape suffixes: L positions, V vocabulary, O outputs, I inputs, R rank, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from transformers import LlamaConfig

from tunewise.layers.bottleneck import Bottleneck
from tunewise.layers.dora import DoRALinear
from tunewise.layers.dylora import DyLoRALinear
from tunewise.layers.linear import PackedLinear
from tunewise.layers.lora import LoRALinear
from tunewise.layers.lora_fa import LoRAFALinear
from tunewise.layers.qalora import QALoRALinear
from tunewise.methods.method import Run
from tunewise.workload.corpus import Corpus
from tunewise.workload.model import random_model

Leaves = Mapping[str, Tensor]


def plain_loss_and_gradients(run: Run, config: LlamaConfig, corpus: Corpus) -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients of what `run` trains, computed without it."""
    model = random_model(config, torch.float32, seed=0)
    model.set_attn_implementation("eager")
    leaves = {name: parameter.detach().float().requires_grad_() for name, parameter in run.trainable()}
    weights = {name: value.detach() for name, value in model.state_dict().items()}
    weights |= {name: value for name, value in leaves.items() if name in weights}
    for name, module in run.model.named_modules():
        formula = next((found for kind, found in FORMULAS.items() if type(module) is kind), None)
        if formula is not None:
            key = f"{name}.weight".replace(".base_layer", "")
            weights[key] = formula(module, _base(module, weights[key]), _own(leaves, name))
        elif isinstance(module, PackedLinear) and not name.endswith("base_layer"):
            weights[f"{name}.weight"] = module.dense_weight(torch.float32).detach()
    weights |= _ia3(leaves, weights)
    with _bottlenecks(model, run, leaves):
        total = sum(int(corpus.document(index)[1][1:].sum()) for index in range(len(corpus)))
        loss = torch.zeros(())
        for index in range(len(corpus)):
            ids, marks = corpus.document(index)
            ids_1L = torch.tensor(ids, dtype=torch.int64)[None]
            logits_LV = functional_call(model, weights, (ids_1L,), {"use_cache": False}).logits[0]
            losses_L = functional.cross_entropy(logits_LV[:-1], ids_1L[0, 1:], reduction="none")
            loss = loss + losses_L[torch.tensor(marks[1:])].sum() / total
    found = torch.autograd.grad(loss, list(leaves.values()))
    return float(loss.detach()), dict(zip(leaves, found, strict=True))


def _own(leaves: Leaves, layer: str) -> dict[str, Tensor]:
    """Return a layer's trained numbers by their names in it."""
    return {name.removeprefix(f"{layer}."): value for name, value in leaves.items() if name.startswith(f"{layer}.")}


def _base(module: nn.Module, dense_OI: Tensor) -> Tensor:
    base = module.base_layer
    return base.dense_weight(torch.float32).detach() if isinstance(base, PackedLinear) else dense_OI


def _lora(layer: LoRALinear, base_OI: Tensor, own: Leaves) -> Tensor:
    """W + s B A."""
    a_RI = own.get("lora_A.weight", layer.lora_A.weight.detach())
    return base_OI + layer.scale * own["lora_B.weight"] @ a_RI


def _dora(layer: DoRALinear, base_OI: Tensor, own: Leaves) -> Tensor:
    """m (W + s B A) / |W + s B A| by rows, the norm a constant."""
    adapted_OI = _lora(layer, base_OI, own)
    norm_O1 = adapted_OI.detach().norm(dim=1, keepdim=True)
    weight_OI: Tensor = own["lora_magnitude_vector"][:, None] * adapted_OI / norm_O1
    return weight_OI


def _dylora(layer: DyLoRALinear, base_OI: Tensor, own: Leaves) -> Tensor:
    """W + (alpha / b) B[:, :b] A[:b]."""
    rank = layer.active_rank
    return base_OI + layer.alpha / rank * own["lora_B.weight"][:, :rank] @ own["lora_A.weight"][:rank]


def _qalora(layer: QALoRALinear, base_OI: Tensor, own: Leaves) -> Tensor:
    """W + s (I / L^2) B A P, where P repeats a group's number for each of its inputs."""
    size, num_inputs = layer.base_layer.group_size, base_OI.shape[1]
    update_OG = own["lora_B.weight"] @ own["lora_A.weight"]
    update_OI = update_OG.repeat_interleave(size, dim=1)[:, :num_inputs]
    return base_OI + layer.scale * num_inputs / size**2 * update_OI


FORMULAS: dict[type[nn.Module], Callable[..., Tensor]] = {
    LoRALinear: _lora,
    DoRALinear: _dora,
    LoRAFALinear: _lora,
    DyLoRALinear: _dylora,
    QALoRALinear: _qalora,
}


def _ia3(leaves: Leaves, weights: Leaves) -> dict[str, Tensor]:
    """IA3 of the peft library: keys, values and the feed-forward part's inputs times a vector, l W or W l."""
    ending = ".ia3_l.default"
    names = {name: name.removeprefix("base_model.model.").removesuffix(ending) for name in leaves if ending in name}
    return {f"{layer}.weight": weights[f"{layer}.weight"] * leaves[name] for name, layer in names.items()}


@contextmanager
def _bottlenecks(model: nn.Module, run: Run, leaves: Leaves) -> Iterator[None]:
    """Let the plain model's layers give h + s U f(D h + d) + u instead of h."""
    hooks = []
    for name, module in run.model.named_modules():
        if isinstance(module, Bottleneck):
            own, scale = _own(leaves, name), module.scale

            def behind(layer: nn.Module, inputs: object, h: Tensor, own: Leaves = own, scale: float = scale) -> Tensor:
                del layer, inputs
                narrow = functional.gelu(h @ own["adapter_down.weight"].T + own["adapter_down.bias"])
                return h + scale * (narrow @ own["adapter_up.weight"].T + own["adapter_up.bias"])

            hooks.append(model.get_submodule(name).register_forward_hook(behind))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
