"""A model whose weights stay in its files: mapped into memory page by page, so that loading needs no memory of its own.

What transformers loads is a copy of every weight. A base that is larger than memory (method `stream`) must never be
copied whole, so here the modules are made without memory and get the files' own pages as weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from tunewise.recipe import ModelSpec
from tunewise.workload.model import locate

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""safetensors' names of what weights are stored in."""


def load_mapped(spec: ModelSpec, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel | str:
    """Return the model with its files' pages as weights, or in words why these files cannot be used as they are."""
    folder = Path(locate(spec.name))
    if spec.weights != "pretrained" or not folder.is_dir():
        return "the weights do not lie in a folder of this machine"
    tensors: dict[str, Tensor] = {}
    try:
        for file in sorted(folder.glob("*.safetensors")):
            tensors |= _mapped_tensors(file)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        return f"the files cannot be mapped ({error})"
    others = sorted({str(tensor.dtype) for tensor in tensors.values() if tensor.dtype != dtype})
    if others:
        return f"the files hold {', '.join(others)}, and {dtype} is wanted"
    with torch.device("meta"):
        model = cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, dtype=dtype))
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear) and head.weight.is_meta and config.get_text_config().tie_word_embeddings:
        head.weight = model.get_input_embeddings().weight  # not by transformers 5.23 when all weights are assigned
    for module in list(model.modules()):
        _make_buffers(module, config)
    absent = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if absent:
        return f"{absent[0]} and {len(absent) - 1} others are called differently in the files"
    return model.eval()


def _mapped_tensors(file: Path) -> dict[str, Tensor]:
    """Return views of a safetensors file's pages (safetensors' own reading copies); writing to them changes no file."""
    with safe_open(file, framework="pt"):
        pass  # opening compares the header with the file's size
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_bytes))
    pages = torch.from_numpy(np.memmap(file, dtype=np.uint8, mode="c"))
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = (8 + header_bytes + offset for offset in entry["data_offsets"])
            found[name] = pages[first:last].view(_DTYPES[entry["dtype"]]).view(entry["shape"])
    return found


def _make_buffers(module: nn.Module, config: PretrainedConfig) -> None:
    """Compute the buffers that no file holds (rotary frequencies) by making their module again, with memory."""
    missing = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
    if not missing:
        return
    try:
        fresh = type(module)(config.get_text_config())
    except (TypeError, ValueError, AttributeError):
        return  # its buffers stay absent, and that is said
    for name in missing:
        module._buffers[name] = fresh._buffers.get(name, module._buffers[name])
    for name, value in vars(module).items():  # plain attributes that share a buffer's memory
        if isinstance(value, Tensor) and value.is_meta:
            setattr(module, name, getattr(fresh, name))
