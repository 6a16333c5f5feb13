"""Which combinations of methods there are: the options of each axis, their product as recipes, and what is refused.

An option is what stands in one place of a recipe ("LoRA over nf4", "every 2nd block checkpointed"). What options cost
and save is not written here: it is predicted (`predict`). Said here is only what an option *is*: whether it exists to
save memory, so that a plan that fits without it does not get it, and whether it approximates what is learnt.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import AutoModelForCausalLM, PretrainedConfig

from tunewise.errors import InputError, did_you_mean
from tunewise.machine.machine import Dtype, Machine
from tunewise.methods import (
    BY_NAME,
    Adafactor,
    AdamW,
    AdamW8bit,
    Attention,
    Checkpointing,
    Fused,
    Lion,
    LoRA,
    Packing,
    Precision,
    Quantize,
    SupervisedLoss,
    WholeLoss,
)
from tunewise.methods.attention import AttentionKind, default_attention_kind
from tunewise.methods.compatibility import conflicts
from tunewise.methods.optimizers import Optimizer
from tunewise.recipe import Fidelity, Method, Recipe, Slot, TrainingSpec

Axis = Literal["tuning", "precision", "checkpointing", "optimizer", "loss", "rows", "attention", "kernels"]


@dataclass(frozen=True)
class Option:
    """What one axis may be.

    Attributes:
        label: as people say it.
        methods: what it puts into the recipe.
        instead_of: the label of the option from which it differs only to save memory; "" for options with merits of
            their own.
        fidelity: what it promises, seen from the plain run (full fine-tuning in fp32 with AdamW, whole logits, a
            document a row).
        is_approximation: it learns with coarser numbers, or by a coarser rule, than the plain option of its axis.
    """

    label: str
    methods: tuple[Method, ...] = ()
    instead_of: str = ""
    fidelity: Fidelity = Fidelity.EXACT
    is_approximation: bool = False

    @property
    def names(self) -> frozenset[str]:
        """The names of its methods."""
        return frozenset(method.name for method in self.methods)


FULL = Option("full")
LORA = Option("LoRA", (LoRA(),), fidelity=Fidelity.LEARNING)
LORA_NF4 = Option("LoRA over nf4", (LoRA(), Quantize()), "LoRA", Fidelity.LEARNING, True)
LORA_INT8 = Option("LoRA over int8", (LoRA(), Quantize(kind="int8")), "LoRA", Fidelity.LEARNING, True)

FP32 = Option("fp32", (Precision(compute="fp32"),))
BF16 = Option("bf16 mixed", (Precision(compute="bf16"),), fidelity=Fidelity.ROUNDING)
FP16 = Option("fp16 mixed", (Precision(compute="fp16"),), fidelity=Fidelity.ROUNDING)
PURE = Option("bf16 pure", (Precision(compute="bf16", trainable="same"),), "bf16 mixed", Fidelity.LEARNING, True)

KEPT = Option("activations kept")
SELECTIVE = Option("selective checkpointing", (Checkpointing(policy="selective"),), KEPT.label)
EVERY_2ND = Option("every 2nd block checkpointed", (Checkpointing(every=2),), KEPT.label)
ALL_BLOCKS = Option("all blocks checkpointed", (Checkpointing(),), KEPT.label)

ADAMW = Option("adamw", (AdamW(),))

WHOLE = Option("whole loss", (WholeLoss(),))
SUPERVISED = Option("supervised loss", (SupervisedLoss(),), fidelity=Fidelity.ROUNDING)

PADDED = Option("padded")

PLAIN_KERNELS = Option("torch's own kernels")
FUSED_LABEL = "fused kernels"


@dataclass(frozen=True)
class Choice:
    """One option of each axis: a combination, up to the size of its micro-batch."""

    options: tuple[tuple[Axis, Option], ...]

    def __getitem__(self, axis: Axis) -> Option:
        return next(option for name, option in self.options if name == axis)

    def replaced(self, axis: Axis, option: Option) -> Choice:
        """Return this combination with another option on one axis."""
        return Choice(tuple((name, option if name == axis else old) for name, old in self.options))

    @property
    def label(self) -> str:
        """As people say it."""
        return ", ".join(option.label for _, option in self.options)

    @property
    def methods(self) -> tuple[Method, ...]:
        """Everything that the options put into a recipe."""
        return tuple(method for _, option in self.options for method in option.methods)

    @property
    def fidelity(self) -> Fidelity:
        """The weakest promise of all options."""
        return max((option.fidelity for _, option in self.options), key=list(Fidelity).index)

    @property
    def num_approximations(self) -> int:
        """How many options learn with coarser numbers."""
        return sum(option.is_approximation for _, option in self.options)

    @property
    def memory_methods(self) -> frozenset[str]:
        """The labels of the options that exist to save memory."""
        return frozenset(option.label for _, option in self.options if option.instead_of)

    @property
    def without_memory_methods(self) -> tuple[str, ...]:
        """The labels of this combination with nothing in it that only saves memory."""
        return tuple(option.instead_of or option.label for _, option in self.options)

    @property
    def updates_in_backward(self) -> bool:
        """Whether parameters are updated inside backward, which needs the whole step in one micro-batch."""
        return any(isinstance(method, Optimizer) and method.in_backward for method in self.methods)

    def recipe(self, base: Recipe, micro_batch_size: int) -> Recipe:
        """Return `base` (a complete recipe) with these methods and `micro_batch_size` rows at once.

        What no axis is about stays: a regularizer is part of what the user wants to learn.
        """
        training = base.training
        if self.updates_in_backward and training.max_grad_norm is not None:
            training = TrainingSpec(**{**training.model_dump(), "max_grad_norm": None})
        batch = base.batch.model_copy(update={"micro_batch_size": micro_batch_size})
        methods = (*self.methods, *base.in_slot(Slot.REGULARIZER))
        return base.replace(methods=methods, training=training, batch=batch)


@dataclass(frozen=True)
class Wishes:
    """What the user wants in or out of the recipe, and how far from the plain run with these methods it may go."""

    wanted: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()
    quality: Fidelity = Fidelity.LEARNING

    def __post_init__(self) -> None:
        for name in (*self.wanted, *self.unwanted):
            if name not in BY_NAME:
                raise InputError(f"There is no method '{name}'.{did_you_mean(name, BY_NAME)}")
        both = sorted(set(self.wanted) & set(self.unwanted))
        if both:
            raise InputError(f"'{both[0]}' is wanted and not wanted; say one of both.")

    def refuse(self, choice: Choice) -> str | None:
        """Say why the wishes exclude a combination, or return None."""
        names = {method.name for method in choice.methods}
        absent = [name for name in self.wanted if name not in names]
        if absent:
            return f"without {absent[0]}, which was asked for"
        present = [name for name in self.unwanted if name in names]
        if present:
            return f"with {present[0]}, which was not wanted"
        order = list(Fidelity)
        # What was asked for by name is what the plan shall do exactly, not a departure from it.
        own = [option for _, option in choice.options if not option.names or not option.names <= set(self.wanted)]
        reasons = [option.label for option in own if order.index(option.fidelity) > order.index(self.quality)]
        if reasons:
            return f"quality '{self.quality}' was asked for, and {', '.join(reasons)} promises less"
        return None


def axes(config: PretrainedConfig, machine: Machine, base: Recipe, wishes: Wishes) -> dict[Axis, tuple[Option, ...]]:
    """Return the options of every axis for this model and machine; what the user wants by name is among them.

    Args:
        config: decides which attention its code can take.
        machine: decides about 16-bit dtypes.
        base: a complete recipe; packing takes its row length, and pre-training has no adapters.
        wishes: an option that the space does not have by itself ("sgd", "freeze") joins it when it is wanted.
    """
    half = _half_precision(machine)
    pure = [PURE] if half == [BF16] else []
    row_tokens = max(base.data.max_length or 0, 2048)
    kind = default_attention_kind(AutoModelForCausalLM._model_mapping[type(config)], config)
    kinds: tuple[AttentionKind, ...] = (kind, "sdpa") if kind == "per_document" else (kind,)
    found: dict[Axis, list[Option]] = {
        "tuning": _tunings(config, machine, base),
        "precision": [*half, *pure, FP32],
        "checkpointing": [KEPT, SELECTIVE, EVERY_2ND, ALL_BLOCKS],
        "optimizer": _optimizers(),
        "loss": [SUPERVISED, WHOLE],
        "rows": [PADDED, Option("packed", (Packing(row_tokens=row_tokens),), fidelity=Fidelity.ROUNDING)],
        "attention": [_attention(each) for each in kinds],
    }
    fused = base.get(Fused)
    if fused is not None:
        found["kernels"] = [Option(FUSED_LABEL, (fused,), fidelity=Fidelity.ROUNDING), PLAIN_KERNELS]
    known = {name for options in found.values() for option in options for name in option.names}
    for name in wishes.wanted:
        if name not in known:
            _join(found, BY_NAME[name]())
    return {axis: tuple(options) for axis, options in found.items()}


def narrow_products(config: PretrainedConfig, machine: Machine, base: Recipe) -> Quantize | None:
    """Return the frozen weights in 8 bits whose products this machine makes faster than those in 16, if any.

    int8 on a CPU, with the compiled kernels of `base`, where that rate was measured, and the output head's products too
    unless the model caps its logits; FP8 on a CUDA device of NVIDIA's.
    """
    kind: Literal["int8", "fp8"] = "int8" if machine.kind == "cpu" else "fp8"
    can_have = base.get(Fused) is not None if machine.kind == "cpu" else machine.kind == "cuda" and not machine.is_amd
    if not can_have or kind not in machine.flops_per_second:
        return None
    wider = max(machine.achievable_flops(dtype) for dtype in machine.flops_per_second if dtype not in ("int8", "fp8"))
    if machine.achievable_flops(kind) <= wider:
        return None
    caps = getattr(config.get_text_config(), "final_logit_softcapping", None) is not None
    return Quantize(kind=kind, compute=kind, head_compute="int8" if kind == "int8" and not caps else "dense")


def _tunings(config: PretrainedConfig, machine: Machine, base: Recipe) -> list[Option]:
    if base.objective == "pretrain":
        return [FULL]
    options = [FULL, LORA, LORA_NF4, LORA_INT8]
    quantize = narrow_products(config, machine, base)
    if quantize is not None:  # not instead of LoRA to save memory: it is there to be faster
        label = "LoRA, products in int8" if quantize.compute == "int8" else "LoRA, products in FP8"
        methods = (LoRA(), quantize)
        options.append(Option(label, methods, fidelity=Fidelity.LEARNING, is_approximation=True))
    return options


def _is_int8_product(method: Method) -> bool:
    return isinstance(method, Quantize) and method.compute == "int8"


def _half_precision(machine: Machine) -> list[Option]:
    """Return mixed precision in the 16-bit dtype that this machine multiplies faster than fp32, if any."""
    halves: tuple[tuple[Dtype, Option], ...] = (("bf16", BF16), ("fp16", FP16))
    plain = machine.achievable_flops("fp32")
    for dtype, option in halves:
        if dtype in machine.flops_per_second and machine.achievable_flops(dtype) > plain:
            return [option]
    return []


def _attention(kind: AttentionKind) -> Option:
    fidelity = Fidelity.EXACT if kind in ("sdpa", "eager") else Fidelity.ROUNDING
    return Option(f"attention {kind}", (Attention(kind=kind),), fidelity=fidelity)


def _optimizers() -> list[Option]:
    plain: tuple[Optimizer, ...] = (AdamW(), AdamW8bit(), Adafactor(), Lion())
    options = [ADAMW]
    for method in plain:
        if method.name != ADAMW.label:
            options.append(Option(method.name, (method,), ADAMW.label, Fidelity.LEARNING, True))
        inside = method.model_copy(update={"in_backward": True})
        # Without all gradients at hand their norm cannot be clipped, so another thing is learnt.
        options.append(Option(f"{method.name} in backward", (inside,), ADAMW.label, Fidelity.LEARNING, True))
    return options


_AXIS_OF_SLOT: dict[Slot, Axis] = {
    Slot.DATA: "rows",
    Slot.WEIGHTS: "tuning",
    Slot.ADAPTER: "tuning",
    Slot.PRECISION: "precision",
    Slot.ATTENTION: "attention",
    Slot.ACTIVATIONS: "checkpointing",
    Slot.LOSS: "loss",
    Slot.OPTIMIZER: "optimizer",
    Slot.KERNELS: "kernels",
}


def _join(found: dict[Axis, list[Option]], method: Method) -> None:
    """Put a wanted method, with its default options, on the axis of its slot."""
    axis = _AXIS_OF_SLOT.get(method.slot)
    if axis is None:
        raise InputError(f"The planner cannot place '{method.name}'; it knows no axis for {method.slot.name.lower()}.")
    found.setdefault(axis, []).append(Option(method.name, (method,), fidelity=method.fidelity))


@dataclass(frozen=True)
class Refused:
    """A combination that is not considered, and why."""

    choice: Choice
    reason: str


def product(options: dict[Axis, tuple[Option, ...]]) -> Iterator[Choice]:
    """Yield every combination."""
    for chosen in itertools.product(*options.values()):
        yield Choice(tuple(zip(options, chosen, strict=True)))


def enumerate_space(
    options: dict[Axis, tuple[Option, ...]],
    base: Recipe,
    wishes: Wishes,
    documents_per_step: int,
    *,
    rows_hold_one: bool = False,
) -> tuple[list[Choice], list[Refused]]:
    """Return (combinations to predict, combinations that wishes, rules or contradictions exclude).

    Args:
        options: of each axis.
        base: a complete recipe.
        wishes: the user's.
        documents_per_step: what updates inside backward must take at once.
        rows_hold_one: whether packing would find no two documents for one row.
    """
    kept: list[Choice] = []
    refused: list[Refused] = []
    for choice in product(options):
        micro_batch_size = documents_per_step if choice.updates_in_backward else 1
        reason = wishes.refuse(choice) or _pointless(choice, wishes, options)
        if reason is None and rows_hold_one and "packing" in choice["rows"].names:
            reason = "no row has room for a second document, so there is nothing to pack"
        problems: Sequence[str] = () if reason else conflicts(choice.recipe(base, micro_batch_size))
        if reason or problems:
            refused.append(Refused(choice, reason or problems[0]))
        else:
            kept.append(choice)
    return kept, refused


def _pointless(choice: Choice, wishes: Wishes, options: dict[Axis, tuple[Option, ...]]) -> str | None:
    """Combinations that nothing forbids and that never help."""
    if choice["attention"] is not options["attention"][0] and wishes.quality != Fidelity.EXACT:
        return f"{options['attention'][0].label} runs the same kernels without a mask over the row"
    if PLAIN_KERNELS in dict(choice.options).values() and _can_be_fused(choice, wishes):
        return "fused kernels compute the same in fewer passes over memory"
    if PLAIN_KERNELS in dict(choice.options).values() and any(_is_int8_product(method) for method in choice.methods):
        return "products in int8 are faster with the compiled kernels only"
    if choice["tuning"].names & {"lora", "peft"}:
        if choice.updates_in_backward:
            return "an adapter's gradients are too small for updates inside backward to save anything"
        if choice["precision"] is PURE:
            return "an adapter is too small for 16-bit masters to save anything"
        is_exact = wishes.quality == Fidelity.EXACT
        if choice["precision"] is FP32 and options["precision"][0] is not FP32 and not is_exact:
            return f"a frozen base gains nothing from fp32; {options['precision'][0].label} keeps the adapter in fp32"
    return None


def _can_be_fused(choice: Choice, wishes: Wishes) -> bool:
    """Say whether nothing speaks against the compiled kernels: no wish, and no method that shuns them."""
    shuns_them = any(method.name == "stream" for method in choice.methods)
    return wishes.quality != Fidelity.EXACT and "fused" not in wishes.unwanted and not shuns_them
