"""Which file what is trained goes into, where several methods train at once, and how such an adapter is read.

    lora         low-rank updates, and what 'freeze' trains beside them: PEFT's LoRA format (export.adapter)
    parameters   bottleneck adapters; what 'freeze' trains beside them, or of a quantized model (export.parameters)
    peft         what the peft library put around the model: PEFT's own formats (export.adapter)

One part lies in `adapter/` itself, several in folders of these names inside it. Each folder of PEFT's loads in peft by
itself; merged (`merge_and_unload`) the first one is a base for the third.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from torch import nn

from tunewise.errors import InputError
from tunewise.export import adapter
from tunewise.export.adapter import CONFIG, load_peft
from tunewise.export.parameters import PEFT_TYPE, load_parameters
from tunewise.layers.bottleneck import bottlenecks
from tunewise.layers.head import base_model_of
from tunewise.methods.low_rank import LowRank
from tunewise.methods.method import Run
from tunewise.methods.peft import Peft
from tunewise.methods.quantization import Quantize
from tunewise.recipe import Slot

Part = Literal["lora", "parameters", "peft"]
ORDER: tuple[Part, ...] = ("lora", "parameters", "peft")
"""The order in which methods are applied, and so in which parts are read."""


def parts_of(run: Run) -> dict[Part, list[str]]:
    """Return the parts of what a run trains and the names of their parameters.

    Empty when the run trains a model: everything, or chosen parameters of a model whose weights are all there.
    """
    adds = any(method.name != "freeze" for method in run.recipe.in_slot(Slot.ADAPTER))
    if not adds and run.recipe.get(Quantize) is None:
        return {}
    inside = {id(parameter) for parameter in base_model_of(run.model).parameters()}
    of_bottlenecks = {
        id(parameter)
        for module in bottlenecks(run.model).values()
        for part in (module.adapter_down, module.adapter_up)
        for parameter in part.parameters()
    }
    has_low_rank = run.recipe.get(LowRank) is not None
    peft = run.recipe.get(Peft)
    found: dict[Part, list[str]] = {part: [] for part in ORDER}
    for name, parameter in run.trainable():
        if peft is not None and (id(parameter) not in inside or not peft.is_prompt_learning):
            found["peft"].append(name)
        elif id(parameter) in of_bottlenecks or not has_low_rank:
            found["parameters"].append(name)
        else:
            found["lora"].append(name)
    return {part: names for part, names in found.items() if names}


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put an adapter that tunewise saved into the base model it was trained on, and return the model with it.

    Args:
        model: a transformers model; it is changed.
        folder: the run's `adapter` folder.

    Raises:
        InputError: the folder holds no adapter, or one for another model.
    """
    folder = Path(folder)
    if (folder / CONFIG).is_file():
        return _load_part(model, folder)
    parts = [folder / part for part in ORDER if (folder / part / CONFIG).is_file()]
    if not parts:
        raise InputError(f"{folder} is no adapter: there is no {CONFIG} in it, nor in {', '.join(ORDER)} inside it.")
    for part in parts:
        model = _load_part(model, part)
    return model


def _load_part(model: nn.Module, folder: Path) -> nn.Module:
    try:
        kind = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{folder / CONFIG} cannot be read: {error}") from error
    if kind == "LORA":
        adapter.load_adapter(model, folder)
        return model
    if kind == PEFT_TYPE:
        load_parameters(model, folder)
        return model
    return load_peft(model, folder)
