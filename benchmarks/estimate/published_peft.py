"""Rows of the peft library's methods: from a kind's published name to a method of ours with its options."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from pathlib import PurePosixPath
from typing import Any, ClassVar

import peft
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig

from tunewise.layers.lora import LoRALinear
from tunewise.layers.loss import whole_loss
from tunewise.methods import Peft, Precision
from tunewise.methods.method import Run
from tunewise.recipe import Fidelity, Method, Recipe, Slot
from tunewise.workload.batches import IGNORED, MicroBatch

KINDS = {str(kind.value): make for kind, make in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
"""The library's kinds and their configuration classes."""

SIZES = ("r", "num_virtual_tokens", "adapter_len")
"""Which option the column adapter_rank means: the first one that the kind has."""

IN_BASE_DTYPE = ("ADAPTION_PROMPT", "LN_TUNING")
"""Kinds whose numbers the library leaves in the base model's dtype; those of all others it makes fp32."""

EXPERIMENTS: dict[str, dict[str, Any]] = {
    "adalora--llama-3.2-3B-rank32": {"init_r": 64, "target_r": 32, "total_step": 5000, "tinit": 200, "tfinal": 500},
    "c3a--llama-3.2-3B-default": {"block_size": 64},
    "deft--llama-3.2-3B-rank32-para": {"decomposition_method": "qr", "para": True},
    "fourierft--llama-3.2-3B-n_frequency-5000": {"n_frequency": 5000},
    "glora--llama-3.2-3B-vector-paths": {"config_A_B": "vector", "config_C": "vector"},
    "ia3--llama-3.2-3B-all-attn-5k-lr0.005": {"feedforward_modules": ["down_proj", "gate_proj", "up_proj"]},
    "lily--llama-3.2-3B-rank140-mlp-a2-b2-s8.0": {"stride_A": 14, "num_B": 2},
    "lily--llama-3.2-3B-rank896-a2-b2-s2.0": {"stride_A": 14, "num_B": 2},
    "lokr--llama-3.2-3B-rank32-factor4-lr0.003": {"decompose_factor": 4},
    "miss--llama-3.2-3B-bat": {"init_weights": "bat"},
    "miss--llama-3.2-3B-mini": {"init_weights": "mini", "mini_r": 64},
    "oft--llama-3.2-3B-rank32": {"oft_block_size": 0},
    "osf--llama-3.2-3B-rank128": {
        "rank_pattern": {
            **dict.fromkeys(("q_proj", "o_proj", "gate_proj", "down_proj", "up_proj"), 2944),
            **dict.fromkeys(("k_proj", "v_proj"), 896),
        }
    },
    "psoft--llama-3.2-3B-fast": {"psoft_svd": "lowrank", "use_cayley_neumann": True},
    "road--llama-3.2-3B-lr_0.001": {"variant": "road_2"},
    "tinylora--llama-3.2-3B-weight-tying": {"weight_tying": 1.0},
    "trainable_tokens--llama-3.2-3B-sos+eos": {"token_indices": [128000, 128001]},
    "waveft--llama-3.2-3B-n_frequency-5000": {"n_frequency": 5000},
}
"""Options that a table has no column for, by the result file's name: what the experiment's adapter_config.json beside
it sets otherwise than the library's defaults (huggingface/peft, method_comparison/MetaMathQA/experiments)."""


REWRITTEN = {"OSF": (0, 21)}
"""Kinds that keep something else since a release: OSF holds the small half of a decomposition, no longer the large."""


def is_rewritten(kind: str | None, conditions: str) -> bool:
    """Say whether the installed library computes a kind otherwise than the version that a row states did."""
    stated = re.search(r"\bpeft (\d+)\.(\d+)", conditions)
    since = REWRITTEN.get(kind or "")
    installed = tuple(int(part) for part in peft.__version__.split(".")[:2])
    return stated is not None and since is not None and tuple(map(int, stated.groups())) < since <= installed


def kind_of(method: str) -> str | None:
    """Return which of the library's kinds a published name means, if any."""
    kind = re.sub(r"[\s-]+", "_", method.strip()).upper()
    return kind if kind in KINDS and kind != "LORA" else None


def peft_method(kind: str, rank: int | None, targets: list[str], path: str, config: PretrainedConfig) -> Peft:
    """Return the method.

    Args:
        kind: one of `KINDS`.
        rank: the column adapter_rank, if stated.
        targets: the modules in the column adapter_targets.
        path: the result file, which names the experiment.
        config: the base model's configuration.
    """
    fields = {field.name for field in dataclasses.fields(KINDS[kind])}
    options: dict[str, Any] = {}
    size = next((name for name in SIZES if name in fields), None)
    if rank is not None and size is not None:
        options[size] = rank
    if kind == "ADAPTION_PROMPT":  # names the attention's module, which it knows, and how many blocks get a prompt
        options["adapter_layers"] = config.num_hidden_layers
    elif "target_modules" in fields and targets:
        options["target_modules"] = targets
    return Peft(kind=kind, options=options | EXPERIMENTS.get(PurePosixPath(path).stem, {}))


class LibraryLoRA(Peft):
    """A variant of LoRA as the library computes it; the method `peft` leaves LoRA to ours."""

    def conflict(self, recipe: Recipe) -> str | None:
        """Allow what `peft` refuses for being built in."""
        del recipe
        return None


def library_dora(rank: int, dropout: float, targets: list[str] | str) -> LibraryLoRA:
    """Return DoRA of the layers called `targets`, or of all ("all-linear")."""
    return LibraryLoRA(
        kind="LORA", options={"r": rank, "lora_dropout": dropout, "use_dora": True, "target_modules": targets}
    )


class LibraryAdapters(Method):
    """Adapters as the library computes them: inputs are cast into their dtype, with or without autocast around.

    Attributes:
        autocasts: whether the script trains in an autocast region. Without, inputs in fp32 are kept for backward.
    """

    name: ClassVar[str] = "library_adapters"
    slot: ClassVar[Slot] = Slot.KERNELS
    fidelity: ClassVar[Fidelity] = Fidelity.ROUNDING

    autocasts: bool

    def apply(self, run: Run) -> None:
        """Let our LoRA layers compute as peft's do; peft's other layers are its own anyway."""
        precision = run.recipe.get(Precision)
        is_mixed = precision is not None and precision.trainable_dtype != precision.storage_dtype
        run.autocast_dtype = run.storage_dtype if self.autocasts and is_mixed else None
        for module in run.model.modules():
            if isinstance(module, LoRALinear):
                module.forward = partial(_lora, module)  # type: ignore[method-assign]


def _lora(layer: LoRALinear, input: Tensor) -> Tensor:
    output: Tensor = layer.base_layer(input)
    factor_a, factor_b = layer.lora_A.weight, layer.lora_B.weight
    dropped = F.dropout(input.to(factor_a.dtype), layer.dropout, layer.training and layer.dropout > 0)
    update = F.linear(F.linear(dropped, factor_a), factor_b)
    return (output + update * layer.scale).to(output.dtype)


class LossOfAllPositions(Method):
    """What transformers computes when it is given labels: fp32 logits of virtual tokens too, which are not learnt."""

    name: ClassVar[str] = "loss_of_all_positions"
    slot: ClassVar[Slot] = Slot.LOSS
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    def apply(self, run: Run) -> None:
        """Set the loss."""

        def loss(run: Run, batch: MicroBatch) -> Tensor:
            logits: Tensor = run.model(input_ids=batch.input_ids_RL, use_cache=False).logits
            labels = batch.labels_RL.new_full(logits.shape[:2], IGNORED)
            labels[:, -batch.labels_RL.shape[1] :] = batch.labels_RL
            return whole_loss(logits, labels)

        run.loss = loss
