"""The methods of a study as factors that are off or on, and the recipe that a set of them makes.

A factor is one axis of the planner's space with two of its options. What the user's recipe says itself (the rank of
LoRA, the length of packed rows, the optimizer) is what "on" and "off" mean. "Accumulation" is no method but a size of
the micro-batch: off passes the whole step through the machine at once.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from tunewise.lab.findings import Factor
from tunewise.layers import native
from tunewise.machine.machine import Machine
from tunewise.methods import (
    Attention,
    Checkpointing,
    Fused,
    KLToBase,
    LoRA,
    Packing,
    Precision,
    Quantize,
    SupervisedLoss,
    WholeLoss,
)
from tunewise.methods.attention import default_attention_kind
from tunewise.methods.compatibility import conflicts
from tunewise.methods.defaults import DEFAULT_MICRO_BATCH_SIZE, default_kernels
from tunewise.planner.predict import Predictor
from tunewise.planner.space import (
    BF16,
    FP16,
    FP32,
    FULL,
    FUSED_LABEL,
    KEPT,
    PADDED,
    PLAIN_KERNELS,
    WHOLE,
    Axis,
    Choice,
    Option,
    narrow_products,
)
from tunewise.recipe import Fidelity, Method, Recipe, Slot

ACCUMULATION = "accumulation"

FULL_RATE_SHARE = 0.1
"""Of an adapter's learning rate, what full fine-tuning takes ("LoRA Without Regret", Schulman et al. 2025)."""

On = frozenset[str]
"""Names of the factors that are on."""


@dataclass(frozen=True)
class Switch:
    """A factor and what its two states are in the planner's space; `requires` names factors that must be on too."""

    factor: Factor
    axis: Axis | None
    off: Option | None
    on: Option | None
    requires: tuple[str, ...] = ()


@dataclass(frozen=True)
class FactorSpace:
    """The factors of one recipe on one machine.

    Attributes:
        base: the complete recipe; its batch, data and training stay as they are.
        config: the model's.
        switches: what can be switched, in the order of the ladder.
        fixed: options of the axes that nobody switches.
        predictor: of the same recipe.
        held: names of switches that stay on.
        narrow: what would make the products in 8 bits on this machine; None where nothing does, or the recipe says
            how its base is stored. It is no switch: it learns over a coarser base.
    """

    base: Recipe
    config: PretrainedConfig
    switches: tuple[Switch, ...]
    fixed: tuple[tuple[Axis, Option], ...]
    predictor: Predictor
    held: On = frozenset()
    narrow: Quantize | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the factors that can be switched, in the order of the ladder."""
        return tuple(factor.name for factor in self.factors)

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The factors that can be switched, in the order of the ladder."""
        return tuple(switch.factor for switch in self.switches if switch.factor.name not in self.held)

    def factor(self, name: str) -> Factor:
        """Return a factor by its name."""
        return next(factor for factor in self.factors if factor.name == name)

    def without(self, names: Iterable[str]) -> FactorSpace:
        """Return the space without some factors, which are then off."""
        gone = set(names)
        off = [
            (s.axis, s.off)
            for s in self.switches
            if s.factor.name in gone and s.axis is not None and s.off is not None and not s.requires
        ]
        kept = tuple(switch for switch in self.switches if switch.factor.name not in gone)
        return replace(self, switches=kept, fixed=(*self.fixed, *off))

    def holding(self, names: Iterable[str]) -> FactorSpace:
        """Return the space with some factors always on."""
        return replace(self, held=self.held | frozenset(names))

    def choice(self, on: On) -> Choice:
        """Return the combination as the planner speaks of it."""
        options = dict(self.fixed)
        for switch in self.switches:
            if switch.axis is None:
                continue
            option = switch.on if switch.factor.name in on | self.held else switch.off
            if option is not None:
                options[switch.axis] = option
        return Choice(tuple(options.items()))

    def micro_batch_size(self, on: On) -> int:
        """Return the rows at once: the whole step's, or as many as the user's recipe takes at once."""
        choice = self.choice(on)
        whole = self.predictor.rows(choice, 1).rows_per_step
        if ACCUMULATION in self.names and ACCUMULATION not in on:
            return whole
        size = self.base.batch.micro_batch_size or 1
        if "packing" not in on | self.held and self.base.get(Packing) is not None:
            size = max(size, DEFAULT_MICRO_BATCH_SIZE)  # a row of the user's holds several documents
        return min(whole, size)

    def recipe(self, on: On) -> Recipe:
        """Return the complete recipe of a set of factors.

        Full fine-tuning takes a tenth of an adapter's learning rate (`methods.defaults`); all else stays as it is.
        """
        recipe = self.choice(on).recipe(self.base, self.micro_batch_size(on))
        rate = self.base.training.learning_rate
        if "lora" in self.names and "lora" not in on and rate is not None:
            training = recipe.training.model_copy(update={"learning_rate": rate * FULL_RATE_SHARE})
            recipe = recipe.replace(training=training)
        return recipe

    def refusal(self, on: On) -> str | None:
        """Say why a set of factors is no recipe, or return None."""
        for switch in self.switches:
            missing = [name for name in switch.requires if name not in on | self.held]
            if switch.factor.name in on and missing:
                return f"{switch.factor.on} needs {missing[0]}"
        found = conflicts(self.recipe(on))
        return found[0] if found else None

    def label(self, on: On) -> str:
        """Return a set of factors in words."""
        return " + ".join(name for name in self.names if name in on) or "baseline"

    def of_base(self) -> On:
        """Return the factors that the user's recipe has on."""
        names = {method.name for method in self.base.methods or ()}
        precision = self.base.get(Precision)
        is_on = {
            "bf16": precision is not None and precision.compute == "bf16",
            "fp16": precision is not None and precision.compute == "fp16",
            "packing": "packing" in names,
            "supervised loss": "supervised_loss" in names,
            "attention": (a := self.base.get(Attention)) is not None and a.kind not in ("sdpa", "eager"),
            "checkpointing": "checkpointing" in names,
            "fused": "fused" in names,
            "lora": "lora" in names,
            ACCUMULATION: True,
        }
        return frozenset(name for name in self.names if is_on.get(name, "quantize" in names))


def factor_space(base: Recipe, config: PretrainedConfig, machine: Machine, predictor: Predictor) -> FactorSpace:
    """Return everything that can be switched in `base` on this machine, in the order of the ladder.

    First what is faster at the same mathematics, then what only saves memory, then what changes what is learnt.
    """
    switches = [
        *_precision(base, machine),
        *_packing(base, predictor),
        *_loss(base),
        *_attention(base, config),
        *_kernels(base, config, machine),
        *_accumulation(base, predictor),
        *_checkpointing(base),
        *_tuning(base),
    ]
    axes = {switch.axis for switch in switches}
    fixed = [(axis, option) for axis, option in _present(base).items() if axis not in axes]
    has_adapter = base.get(LoRA) is not None and base.get(Quantize) is None
    narrow = narrow_products(config, machine, base) if has_adapter else None
    space = FactorSpace(base, config, tuple(switches), tuple(fixed), predictor, narrow=narrow)
    refused = [name for name in space.names if space.refusal(frozenset({name, *_required(space, name)}))]
    return space.without(refused)


def _required(space: FactorSpace, name: str) -> tuple[str, ...]:
    return next(switch.requires for switch in space.switches if switch.factor.name == name)


def _present(base: Recipe) -> dict[Axis, Option]:
    """The user's recipe as options, for the axes that nothing switches."""
    slots: dict[Axis, tuple[Slot, ...]] = {
        "tuning": (Slot.WEIGHTS, Slot.ADAPTER),
        "precision": (Slot.PRECISION,),
        "checkpointing": (Slot.ACTIVATIONS,),
        "optimizer": (Slot.OPTIMIZER,),
        "loss": (Slot.LOSS,),
        "rows": (Slot.DATA,),
        "attention": (Slot.ATTENTION,),
    }
    plain = {"tuning": FULL, "checkpointing": KEPT, "rows": PADDED}
    found: dict[Axis, Option] = {}
    for axis, places in slots.items():
        methods = tuple(method for slot in places for method in base.in_slot(slot))
        label = ", ".join(method.name for method in methods)
        found[axis] = Option(f"{label} as given", methods) if methods else plain[axis]
    return found


def _switch(
    name: str,
    axis: Axis | None,
    off: Option | None,
    on: Option | None,
    words: tuple[str, str],
    fidelity: Fidelity,
    *,
    saves_memory_only: bool = False,
    requires: tuple[str, ...] = (),
) -> Switch:
    factor = Factor(name=name, off=words[0], on=words[1], fidelity=fidelity.value, saves_memory_only=saves_memory_only)
    return Switch(factor, axis, off, on, requires)


def _precision(base: Recipe, machine: Machine) -> list[Switch]:
    plain = machine.achievable_flops("fp32")
    for name, option in (("bf16", BF16), ("fp16", FP16)):
        dtype = "bf16" if name == "bf16" else "fp16"
        if dtype in machine.flops_per_second and machine.achievable_flops(dtype) > plain:
            own = base.get(Precision)
            on = Option(option.label, (own,)) if own is not None and own.compute == name else option
            return [_switch(name, "precision", FP32, on, ("fp32", on.label), Fidelity.ROUNDING)]
    return []


def _packing(base: Recipe, predictor: Predictor) -> list[Switch]:
    own = base.get(Packing) or Packing(row_tokens=max(base.data.max_length or 0, 2048))
    on = Option("packed", (own,), fidelity=Fidelity.ROUNDING)
    if predictor.load.laid_out(own, 1).documents_per_row <= 1 or _has_prompts(base):
        return []
    return [_switch("packing", "rows", PADDED, on, ("padded", "packed"), Fidelity.ROUNDING)]


def _has_prompts(base: Recipe) -> bool:
    return any(getattr(method, "is_prompt_learning", False) for method in base.methods or ())


def _loss(base: Recipe) -> list[Switch]:
    if _has_prompts(base) or base.get(KLToBase) is not None:  # its divergence is a part of what is learnt
        return []
    on = Option("supervised loss", (base.get(SupervisedLoss) or SupervisedLoss(),))
    whole = base.get(WholeLoss)
    off = WHOLE if whole is None else Option(WHOLE.label, (whole,))
    words = ("whole logits", "logits of supervised tokens, in chunks")
    return [_switch("supervised loss", "loss", off, on, words, Fidelity.ROUNDING)]


def _attention(base: Recipe, config: PretrainedConfig) -> list[Switch]:
    kind = default_attention_kind(AutoModelForCausalLM._model_mapping[type(config)])
    if kind != "per_document" or _has_prompts(base):
        return []
    off, on = (Option(f"attention {name}", (Attention(kind=name),)) for name in ("sdpa", "per_document"))
    words = ("over the row, with a mask", "per document")
    return [_switch("attention", "attention", off, on, words, Fidelity.ROUNDING)]


def _kernels(base: Recipe, config: PretrainedConfig, machine: Machine) -> list[Switch]:
    """The compiled kernels, where the recipe has them or this machine and model can have them."""
    fused = base.get(Fused)
    if fused is None:
        fused = default_kernels(base.methods or (), config, torch.device(machine.kind))
        if fused is None or native.why_not() is not None:
            return []
    on = Option(FUSED_LABEL, (fused,), fidelity=Fidelity.ROUNDING)
    words = (PLAIN_KERNELS.label, "compiled, in fewer passes")
    return [_switch("fused", "kernels", PLAIN_KERNELS, on, words, Fidelity.ROUNDING)]


def _accumulation(base: Recipe, predictor: Predictor) -> list[Switch]:
    packed = base.get(Packing)
    if predictor.load.laid_out(packed, 1).rows_per_step < 2 and packed is not None:
        return []
    words = ("the whole step at once", "in micro-batches")
    return [_switch(ACCUMULATION, None, None, None, words, Fidelity.ROUNDING, saves_memory_only=True)]


def _checkpointing(base: Recipe) -> list[Switch]:
    own = base.get(Checkpointing) or Checkpointing()
    on = Option("checkpointed", (own,), KEPT.label)
    words = ("activations kept", "recomputed in backward")
    return [_switch("checkpointing", "checkpointing", KEPT, on, words, Fidelity.EXACT, saves_memory_only=True)]


def _tuning(base: Recipe) -> list[Switch]:
    """LoRA over full fine-tuning, NF4 over LoRA; a recipe without LoRA is not turned into one with it."""
    lora = base.get(LoRA)
    if lora is None or base.objective == "pretrain" or base.get(KLToBase) is not None:  # whose base LoRA holds
        return []
    adapters: tuple[Method, ...] = tuple(method for method in base.in_slot(Slot.ADAPTER))
    on = Option("LoRA", adapters, fidelity=Fidelity.LEARNING)
    words = ("every weight trained", f"LoRA of rank {lora.rank}")
    switches = [_switch("lora", "tuning", FULL, on, words, Fidelity.LEARNING)]
    quantize = base.get(Quantize) or Quantize()
    if quantize.compute == "int8":
        packed = Option("LoRA, products in 8 bits", (*adapters, quantize), "", Fidelity.LEARNING, True)
        words = ("products in the precision of computation", "base in int8, products in 8 bits")
        requires = ("lora", "supervised loss") if quantize.head_compute == "int8" else ("lora",)
        switches.append(_switch("8-bit products", "tuning", None, packed, words, Fidelity.LEARNING, requires=requires))
    elif importlib.util.find_spec("bitsandbytes") is not None:
        packed = Option(f"LoRA over {quantize.kind}", (*adapters, quantize), "LoRA", Fidelity.LEARNING, True)
        words = ("base weights as computed", f"base weights in {quantize.kind}")
        switches.append(
            _switch(
                quantize.kind,
                "tuning", None, packed, words, Fidelity.LEARNING, saves_memory_only=True, requires=("lora",),
            )
        )  # fmt: skip
    return switches
