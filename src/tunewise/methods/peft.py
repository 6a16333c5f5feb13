"""Every parameter-efficient method of the peft library other than LoRA, by name: IA3, VERA, OFT,
PREFIX_TUNING, ...

The library builds the layers, saves them and loads them; see https://huggingface.co/docs/peft for the
methods' papers and options. Importing it takes seconds, so nothing here does before `apply`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from tunewise.errors import Conflict, InputError, MissingBackend, did_you_mean
from tunewise.methods import full_masks
from tunewise.methods.adalora import RankBudget
from tunewise.methods.freezing import Freeze
from tunewise.methods.low_rank import LowRank, derived_seed
from tunewise.methods.method import Run
from tunewise.methods.precision import Precision
from tunewise.methods.quantization import Quantize
from tunewise.recipe import Fidelity, Method, Recipe, Slot
from tunewise.units import format_count

PROMPT_LEARNING = frozenset(
    ("CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING")
)
"""Kinds that put virtual tokens before every row (a test compares this with the library's own flags)."""

REFUSED = {
    "LORA": "is built in: use the method 'lora'",
    "CPT": "weighs the loss of its context tokens itself, which our step does not",
    "MULTITASK_PROMPT_TUNING": "needs the number of a task with every row, which the data do not have",
    "POLY": "needs the number of a task with every row, which the data do not have",
    "SHADOW": "adds the loss of its shadow path, which our step does not",
    "XLORA": "mixes LoRA adapters that were trained before",
}
"""Kinds whose mathematics would silently be another one here, and why."""

NOT_DRY = {
    "ADAMSS": "groups the rows of the weights by their values",
    "FROD": "reads sizes out of its tensors",
    "SHIRA": "computes with sparse tensors, which torch 2.13 cannot fake",
}
"""Kinds that need values where a dry run has none."""

AS_CACHE = frozenset(("CARTRIDGE", "PREFIX_TUNING"))
"""Kinds whose virtual tokens reach the blocks as cached keys and values."""

OURS = ("peft_type", "task_type", "inference_mode", "base_model_name_or_path")
"""Options that are not the user's: they follow from training a causal language model."""


class Peft(Method):
    """One method of the peft library.

    Formula: that of the chosen kind, in the peft library's own layers.

    Source: Mangrulkar et al. 2022, the library `peft`; each kind's paper stands in its documentation. When to use:
    a kind that only peft has (IA3, prompts, VeRA, BOFT, AdaLoRA, LLaMA-Adapter, ...). When not: `lora`, `dora` and
    `lora_fa` do: they are the same adapters in faster layers.

    Attributes:
        kind: a name of peft.PeftType, such as "IA3"; case does not matter.
        options: fields of the kind's configuration class.
    """

    name: ClassVar[str] = "peft"
    slot: ClassVar[Slot] = Slot.ADAPTER
    place: ClassVar[int] = 3
    fidelity: ClassVar[Fidelity] = Fidelity.LEARNING

    kind: str
    options: dict[str, Any] = Field(default_factory=dict)

    @field_validator("kind")
    @classmethod
    def _upper_case(cls, kind: str) -> str:
        return kind.upper()

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the kind puts virtual tokens before every row.

        Then the documents of a packed row cannot be kept apart, and the logits may begin with positions of
        virtual
        tokens: those that count are the last ones.
        """
        return self.kind in PROMPT_LEARNING

    def conflict(self, recipe: Recipe) -> str | None:
        """Kinds that the step cannot compute; a second adapter; weights that the library cannot reach."""
        if self.kind in REFUSED:
            return f"peft's {self.kind} {REFUSED[self.kind]}"
        inside = next((method.name for method in recipe.methods or () if getattr(method, "in_backward", False)), None)
        if self.kind == "ADALORA" and inside is not None:
            return f"peft's ADALORA looks at all gradients after an update; switch {inside}.in_backward off"
        if self.kind == "ADALORA" and any(method.name == "fp8_lm" for method in recipe.methods or ()):
            return "peft's ADALORA looks at the gradients, which fp8_lm keeps in 8 bits; use another optimizer"
        if self.kind in AS_CACHE and any(method.name == "checkpointing" for method in recipe.methods or ()):
            return (
                f"peft's {self.kind} hands its tokens to the blocks as a cache, which transformers (5.23) takes from "
                "blocks that are checkpointed; leave 'checkpointing' out, or use PROMPT_TUNING"
            )
        if self.is_prompt_learning:  # beside the model, so it goes with everything inside it
            return None
        low_rank = recipe.get(LowRank)
        if low_rank is not None:
            return f"'peft' and '{low_rank.name}' are two adapters for the same model; leave one out"
        if recipe.get(Freeze) is not None:
            return "what 'freeze' trains would not be in peft's files; use its option modules_to_save instead"
        if recipe.get(Quantize) is not None and self.kind != "LN_TUNING":
            return f"peft's {self.kind} cannot wrap quantized layers; leave 'quantize' out, or use 'lora'"
        return None

    def apply(self, run: Run) -> None:
        """Let the library wrap the model.

        Raises:
            Conflict: a dry run of a kind, or of an option, that needs the weights' values.
            MissingBackend: the library is not installed.
            InputError: an unknown kind, an unknown option, or one that the library refuses.
        """
        if run.is_dry and self.kind in NOT_DRY:
            raise self._not_dry(NOT_DRY[self.kind])
        try:
            import peft
        except ImportError:
            raise MissingBackend("peft", f"the method 'peft' with kind {self.kind}", "peft") from None
        config = self._config(peft)
        before = {id(parameter): name for name, parameter in run.trainable()}
        has_full_masks = run.is_dry and self.kind in full_masks.KINDS
        with torch.random.fork_rng(), full_masks.FullMasks() if has_full_masks else nullcontext():
            torch.manual_seed(derived_seed(run.recipe.seed, f"peft:{self.kind}"))
            try:
                model = peft.get_peft_model(run.model, config)
            except (DynamicOutputShapeException, DataDependentOutputException) as error:
                raise self._not_dry(f"with these options reads values ({error})") from error
            except (ValueError, TypeError, NotImplementedError, ImportError) as error:
                raise InputError(f"peft: {self.kind} does not fit this model: {error}") from error
        assert isinstance(model, nn.Module)
        self._restore_others(run, model, before)
        _cast_buffers(model, run.recipe.get(Precision))
        if has_full_masks:
            full_masks.answer_in_forward(model)
        run.model = model
        if self.kind == "ADALORA":
            budget = RankBudget(model, self.options.get("total_step"), _has_scaled_loss(run.recipe))
            run.companions[self.name] = budget
            run.penalties.append(budget.penalty)
        trainable = sum(parameter.numel() for _, parameter in run.trainable())
        run.say(f"peft's {self.kind}: {format_count(trainable)} trainable parameters")

    @staticmethod
    def _restore_others(run: Run, model: nn.Module, before: dict[int, str]) -> None:
        """Let go on learning what other methods train: the library freezes the model, and its wrapper renames it."""
        for name, parameter in model.named_parameters():
            if id(parameter) in before:
                parameter.requires_grad_(True)
                factor = run.learning_rate_factors.pop(before[id(parameter)], None)
                if factor is not None:
                    run.learning_rate_factors[name] = factor

    def _not_dry(self, reason: str) -> Conflict:
        return Conflict(f"peft's {self.kind} {reason}, so there is no dry run of it; measure it instead.")

    def _config(self, peft: Any) -> Any:
        """Make the library's configuration of this kind from the options, all names checked."""
        classes = {str(kind.value): make for kind, make in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        if self.kind not in classes:
            known = classes.keys() - REFUSED.keys()
            raise InputError(f"peft: there is no kind '{self.kind}'.{did_you_mean(self.kind, known)}")
        make = classes[self.kind]
        fields = {field.name for field in dataclasses.fields(make) if field.init} - set(OURS)
        for option in self.options:
            if option not in fields:
                hint = did_you_mean(option, fields)
                raise InputError(f"peft: {self.kind} has no option '{option}'.{hint}")
        if self.options.get("use_asa"):
            raise InputError("peft: 'use_asa' reallocates ranks after every step, which our step does not.")
        # The library wants to know how long training is before anybody does; `RankBudget` tells it when it begins.
        length = {"total_step": sys.maxsize} if self.kind == "ADALORA" and not self.options.get("total_step") else {}
        try:
            return make(task_type="CAUSAL_LM", **{**self.options, **length})
        except (ValueError, TypeError, ImportError) as error:
            raise InputError(f"peft: the options of {self.kind} are not valid: {error}") from error


def _has_scaled_loss(recipe: Recipe) -> bool:
    precision = recipe.get(Precision)
    return precision is not None and precision.compute == "fp16"


def _cast_buffers(model: nn.Module, precision: Precision | None) -> None:
    """Give frozen projections that the library keeps as buffers (VeRA's) the dtype of what is trained beside them.

    It makes them in fp32 and multiplies them with inputs in the dtype of the trained vectors.
    """
    if precision is None or precision.trainable_dtype.itemsize >= 4:
        return
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if type(module).__name__ == "BufferDict":
            for name, buffer in module.items():
                if buffer.is_floating_point():  # others are indices
                    module[name] = buffer.to(precision.trainable_dtype)
