"""What each combination needs: bytes, seconds, cost and energy, composed from as few traces as possible.

What differs is traced, what does not is reused. Traced by themselves are tuning, precision, checkpointing and
attention with AdamW and the supervised loss. Packed weights are traced without checkpointing, which is seen over plain
weights. Another loss changes the head, another optimizer the state and the update: these are traced once for a kind of
tuning, and their difference is added place by place. Rows packed or padded and the size of a micro-batch change the
number of positions only. A composed prediction ranks; what is recommended is confirmed by a dry run of its own
(`confirm`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
from transformers import PretrainedConfig

from tunewise.engine.device_profile import CUDA_HOPPER, PROFILES, DeviceProfile
from tunewise.engine.dry_run import BatchShape, TraceAll, dry_run, one_by_one
from tunewise.engine.estimate import Estimate
from tunewise.engine.tracking import Kind, Moment
from tunewise.errors import InputError
from tunewise.machine.machine import Machine
from tunewise.methods import AdamW, Attention, KLToBase, Packing, Precision, SupervisedLoss
from tunewise.planner import cache
from tunewise.planner.calibration import Correction, correction
from tunewise.planner.footprint import Bytes, Footprint, footprint, num_parameters
from tunewise.planner.load import Load, Rows
from tunewise.planner.places import bytes_at, difference, moment_of
from tunewise.planner.plain import estimate_from_plain, estimate_to_plain
from tunewise.planner.roofline import Seconds, seconds_of
from tunewise.planner.space import ALL_BLOCKS, FULL, KEPT, LORA, PADDED, SUPERVISED, Choice, Option
from tunewise.planner.time_line import TimeLine
from tunewise.recipe import Recipe, Slot

SMALL_TOKENS = 64
"""Enough to see an optimizer's state and update, which do not depend on the batch."""

_BLOCKS = ("forward", "backward")


@dataclass(frozen=True)
class Interval:
    """A predicted quantity with its interval."""

    middle: float
    low: float
    high: float

    def times(self, factor: float) -> Interval:
        """Return this quantity in another unit."""
        return Interval(self.middle * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Prediction:
    """One combination with one size of micro-batch.

    Attributes:
        kinds: bytes of tensors at the fullest instant, by kind.
        peak_place: where that is.
        peak_bytes: these and the libraries' workspace: what torch's allocator will hold.
        roofline_seconds: of a global step, before any correction.
        step_seconds: corrected, with its interval.
        tokens_per_second: real tokens, no padding.
        is_confirmed: whether the bytes are from a dry run of this very recipe.
    """

    choice: Choice
    rows: Rows
    kinds: dict[Kind, int]
    peak_place: str
    peak_bytes: int
    roofline_seconds: float
    step_seconds: Interval
    tokens_per_second: Interval
    reason_of_interval: str
    is_confirmed: bool = False

    @property
    def micro_batch_size(self) -> int:
        """Rows at once."""
        return self.rows.micro_batch_size


def kind_of(recipe: Recipe) -> str:
    """Return the kind of work a recipe is, for the calibration file: "lora bf16 packed"."""
    tuning = " ".join(method.name for slot in (Slot.WEIGHTS, Slot.ADAPTER) for method in recipe.in_slot(slot)) or "full"
    precision = recipe.get(Precision)
    rows = "packed" if recipe.get(Packing) is not None else "padded"
    return f"{tuning} {precision.compute if precision else 'fp32'} {rows}"


def profile_of(machine: Machine) -> DeviceProfile:
    """Return what the device adds to its tensors.

    Raises:
        InputError: nobody knows what this kind of device adds.
    """
    if machine.kind == "mps":
        raise InputError(
            f"{machine.name}: what Metal's kernels allocate is not known, so memory cannot be planned for Apple GPUs. "
            "Name an NVIDIA or AMD machine, or 'cpu'."
        )
    is_hopper = machine.kind == "cuda" and machine.name.upper().startswith(("H100", "H200", "H20", "GH200"))
    return CUDA_HOPPER if is_hopper else PROFILES[machine.kind]


@dataclass
class Predictor:
    """Predicts combinations of one model, load and machine; remembers what was traced.

    Attributes:
        base: a complete recipe; a combination changes its methods, its micro-batch and what in-backward updates need.
        trace_all: runs traces that do not depend on each other.
    """

    base: Recipe
    config: PretrainedConfig
    machine: Machine
    load: Load
    trace_all: TraceAll = one_by_one
    num_traced: int = 0
    _num_parameters: int | None = None
    _footprints: dict[tuple[str, bool], Footprint] = field(default_factory=dict)
    _seconds: dict[tuple[str, bool], tuple[Seconds, Seconds]] = field(default_factory=dict)
    _rows: dict[tuple[bool, int], Rows] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.profile = profile_of(self.machine)

    def rows(self, choice: Choice, micro_batch_size: int) -> Rows:
        """Return how a step lies in rows."""
        packing = next((method for method in choice.methods if isinstance(method, Packing)), None)
        key = (packing is not None, micro_batch_size)
        if key not in self._rows:
            self._rows[key] = self.load.laid_out(packing, micro_batch_size)
        return self._rows[key]

    def micro_batch_sizes(self, choice: Choice) -> list[int]:
        """Return the sizes that come into question, the smallest first: powers of two up to the whole step."""
        most = self.rows(choice, 1).rows_per_step
        if choice.updates_in_backward:
            return [most]
        return sorted({min(most, 2**power) for power in range(most.bit_length() + 1)})

    def lower_bound(self, choice: Choice) -> tuple[float, str]:
        """Return bytes that a combination needs whatever else it does, and what they are; costs no trace."""
        parameters = self.num_parameters()
        precision = next(method for method in choice.methods if isinstance(method, Precision))
        if choice["tuning"].names & {"quantize"}:
            return 0.0, ""
        size = (precision.trainable_dtype if choice["tuning"] is FULL else precision.storage_dtype).itemsize
        bytes_of_weights = float(parameters * size)
        if choice["tuning"] is not FULL or choice.updates_in_backward:
            return bytes_of_weights, "the weights alone"
        return 2 * bytes_of_weights, "weights and gradients alone"

    def num_parameters(self) -> int:
        """Return the base model's number of parameters."""
        if self._num_parameters is None:
            self._num_parameters = num_parameters(self.config, self.base)
        return self._num_parameters

    def state_bytes(self, choice: Choice) -> float:
        """Return what weights, gradients, state and update need at least; traced at a few tokens."""
        choice = choice.replaced("checkpointing", ALL_BLOCKS).replaced("loss", SUPERVISED)
        small = self._footprint(choice, is_small=True)
        return max(float(lines.at(0).sum()) for name, lines in small.places.items() if moment_of(name) != Moment.SAVE)

    def least_seconds(self, choice: Choice) -> float:
        """Return what a step takes at least: with all activations kept, whatever its optimizer and its micro-batch."""
        kept = choice.replaced("checkpointing", KEPT)
        traced = self._traced_choice(kept)
        line = self._line(kept.replaced("optimizer", traced["optimizer"])).without_update()
        seconds = (line.step(self.rows(choice, size), self.machine) for size in self.micro_batch_sizes(choice))
        return min(seconds) * self._correction(choice).factor

    def predict(self, choice: Choice, micro_batch_size: int) -> Prediction:
        """Return what `choice` needs with `micro_batch_size` rows at once.

        Raises:
            Conflict: the methods contradict this model.
        """
        rows = self.rows(choice, micro_batch_size)
        place, by_kind = self._peak(choice, rows)
        fix = self._correction(choice)
        roofline_seconds = self._line(choice).step(rows, self.machine)
        seconds = _corrected(roofline_seconds, fix)
        tokens = self.load.tokens_per_step
        return Prediction(
            choice=choice,
            rows=rows,
            kinds={kind: round(by_kind[kind]) for kind in Kind},
            peak_place=place,
            peak_bytes=round(float(by_kind.sum())) + self.profile.workspace_bytes,
            roofline_seconds=roofline_seconds,
            step_seconds=seconds,
            tokens_per_second=Interval(tokens / seconds.middle, tokens / seconds.high, tokens / seconds.low),
            reason_of_interval=fix.reason,
        )

    def confirm(self, prediction: Prediction) -> tuple[Prediction, Estimate]:
        """Return the prediction with the bytes of a dry run of this very recipe, and the dry run."""
        estimate = self.estimate(prediction.choice, prediction.rows)
        moment, peak = estimate.peak_moment, estimate.peak
        confirmed = replace(
            prediction,
            kinds=dict(peak.kinds),
            peak_place=str(moment),
            peak_bytes=peak.total_bytes + self.profile.workspace_bytes,
            is_confirmed=True,
        )
        return confirmed, estimate

    def estimate(self, choice: Choice, rows: Rows) -> Estimate:
        """Dry-run the fullest step of a combination, or take up what was run dry before."""
        recipe = choice.recipe(self.base, rows.micro_batch_size)
        shape = rows.shape()
        shapes = [shape] * (2 if rows.micro_batches_per_step > 1 else 1)
        key = cache.key_of(
            {"config": self.config.to_dict(), "recipe": recipe.to_mapping(), "profile": vars(self.profile)}
            | {"shapes": [vars(each) for each in shapes], "what": "estimate"}
        )
        known = cache.read(key)
        if known is not None:
            return estimate_from_plain(known)
        made = dry_run(
            recipe, self.config, self.profile.kind, shapes,
            evaluation=shape, profile=self.profile, trace_all=self.trace_all,
        )  # fmt: skip
        cache.write(key, estimate_to_plain(made))
        return made

    def _peak(self, choice: Choice, rows: Rows) -> tuple[str, Bytes]:
        """Return the fullest place and its bytes by kind."""
        tokens = float(rows.largest_micro_batch)
        base_choice = self._traced_choice(choice)
        base = self._footprint(base_choice)
        accumulates = rows.micro_batches_per_step > 1 and not choice.updates_in_backward
        gradients = float(bytes_at(base, "update head", tokens)[Kind.GRADIENTS]) if accumulates else None
        changes = self._changes(choice, base_choice)
        best_name, best = "", np.zeros(len(Kind))
        places = dict(base.places)
        if base_choice["checkpointing"] != KEPT:  # evaluation keeps no activations, so it is traced once for all
            other = self._footprint(base_choice.replaced("checkpointing", KEPT))
            places |= {name: lines for name, lines in other.places.items() if moment_of(name) == Moment.EVALUATION}
        for name, lines in places.items():
            moment = moment_of(name)
            if moment == Moment.SAVE and self.profile.kind != "cpu":
                continue  # what is saved is copied to the host
            inside = gradients if moment in _BLOCKS else None
            by_kind = lines.at(tokens, inside)
            for new, old in changes:
                by_kind = by_kind + difference(new, old, name, tokens, inside)
            factor = self._logits_factor(choice, rows, moment)
            if factor is not None:
                by_kind[Kind.LOGITS] = lines.at(base.tokens[0])[Kind.LOGITS] * factor
            if by_kind.sum() > best.sum():
                best_name, best = name, by_kind
        return best_name, best

    def _logits_factor(self, choice: Choice, rows: Rows, moment: str) -> float | None:
        """Return the logits of this micro-batch over those of the smaller one that was traced; None for a whole loss.

        They are those of a chunk, however many tokens there are. In training two chunks are alive at once from the
        second one on: the loop's variables hold the one before.
        """
        loss = next((method for method in choice.methods if isinstance(method, SupervisedLoss | KLToBase)), None)
        if loss is None:
            return None

        most = loss.chunk_tokens * (1 if moment == Moment.EVALUATION else 2)
        now, traced = rows.shape().num_supervised, self._shapes(choice)[0].num_supervised
        return min(now, most) / min(traced, most)

    def _changes(self, choice: Choice, base: Choice) -> list[tuple[Footprint, Footprint]]:
        """Return the pairs (with, without) whose differences lead from what was traced to what was asked for."""
        changes = [(self._footprint(new), self._footprint(old)) for new, old in _checkpointing_change(choice, base)]
        reference = self._reference(base)
        if choice["loss"] != base["loss"]:
            changes.append((self._footprint(reference.replaced("loss", choice["loss"])), self._footprint(reference)))
        if choice["optimizer"] != base["optimizer"]:
            small = reference.replaced("checkpointing", ALL_BLOCKS)
            other = small.replaced("optimizer", choice["optimizer"])
            changes.append((self._footprint(other, is_small=True), self._footprint(small, is_small=True)))
        return changes

    def _correction(self, choice: Choice) -> Correction:
        """Return what the roofline's seconds of such a recipe are multiplied by."""
        kind = kind_of(choice.recipe(self.base, 1))
        return correction(self.machine.name, kind, is_measured=bool(self.machine.readings))

    def _line(self, choice: Choice) -> TimeLine:
        """Return the roofline's seconds of a combination, uncorrected."""
        base_choice = self._traced_choice(choice)
        reference = self._reference(base_choice)
        line = self._time_line(base_choice)
        for new, old in _checkpointing_change(choice, base_choice):
            line = line + self._time_line(new) - self._time_line(old)
        if choice["loss"] != base_choice["loss"]:
            line = line + self._time_line(reference.replaced("loss", choice["loss"])) - self._time_line(reference)
        if choice["optimizer"] != base_choice["optimizer"]:
            small = reference.replaced("checkpointing", ALL_BLOCKS)
            other = small.replaced("optimizer", choice["optimizer"])
            line = line + (self._time_line(other, is_small=True) - self._time_line(small, is_small=True)).only_update()
        return line

    def _time_line(self, choice: Choice, *, is_small: bool = False) -> TimeLine:
        print_ = self._footprint(choice, is_small=is_small)
        key = (choice.label, is_small)
        if key not in self._seconds:
            precision = next(method for method in choice.methods if isinstance(method, Precision))
            tf32 = precision.compute == "tf32"
            first, second = (seconds_of(work, self.machine, tf32=tf32) for work in print_.work)
            self._seconds[key] = (first, second)
        first, second = self._seconds[key]
        return TimeLine.through(print_, first, second)

    def _traced_choice(self, choice: Choice) -> Choice:
        """Return the combination that is traced for `choice`: plain loss and optimizer, rows where they matter."""
        traced = choice.replaced("loss", SUPERVISED if _supervised_is_possible(choice) else choice["loss"])
        inside = choice.updates_in_backward
        optimizer = AdamW(in_backward=inside)
        traced = traced.replaced("optimizer", Option("adamw in backward" if inside else "adamw", (optimizer,)))
        if self._rows_do_not_matter(choice):
            traced = traced.replaced("rows", PADDED)
        if "quantize" in choice["tuning"].names:
            traced = traced.replaced("checkpointing", KEPT)
        return traced

    def _rows_do_not_matter(self, choice: Choice) -> bool:
        """Say whether packed rows cost what padded ones of the same size do: the variable-length kernel sees to it.

        Not in autocast, which hands the two attentions copies of different tensors.
        """
        precision = next(method for method in choice.methods if isinstance(method, Precision))
        is_16_bit = precision.storage_dtype.itemsize == 2
        autocasts = choice["tuning"] is FULL and precision.trainable == "fp32"
        per_document = any(isinstance(method, Attention) and method.kind == "per_document" for method in choice.methods)
        return per_document and is_16_bit and not autocasts and self.profile.kind == "cuda"

    def _reference(self, traced: Choice) -> Choice:
        """Return the combination on which losses and optimizers are compared: without what changes blocks only."""
        reference = traced.replaced("checkpointing", KEPT)
        return reference.replaced("tuning", LORA) if "lora" in traced["tuning"].names else reference

    def _footprint(self, choice: Choice, *, is_small: bool = False) -> Footprint:
        key = (choice.label, is_small)
        if key not in self._footprints:
            shapes = (BatchShape.uniform(1, SMALL_TOKENS),) if is_small else self._shapes(choice)
            recipe = choice.recipe(self.base, self.load.documents_per_step if choice.updates_in_backward else 1)
            evaluates = choice["checkpointing"] is KEPT and not is_small
            self._footprints[key] = footprint(
                recipe, self.config, self.profile, shapes,
                evaluates=evaluates, only_update=is_small and not choice.updates_in_backward, trace_all=self.trace_all,
            )  # fmt: skip
            self.num_traced += 1
        return self._footprints[key]

    def _shapes(self, choice: Choice) -> tuple[BatchShape, BatchShape]:
        """Two sizes of micro-batch that both fill two chunks of the supervised loss, if a step does."""
        loss = next((method for method in choice.methods if isinstance(method, SupervisedLoss | KLToBase)), None)
        rows = self.rows(choice, 1)
        chunks = 2 * loss.chunk_tokens if loss else 1
        learnt = min(chunks, max(1, round(rows.rows_per_step * rows.width * rows.supervised_share)))
        in_a_row = max(1.0, (rows.width - rows.documents_per_row) * rows.supervised_share)
        count = max(1, math.ceil(learnt / in_a_row))
        return rows.shape(count), rows.shape(2 * count)


def _checkpointing_change(choice: Choice, traced: Choice) -> list[tuple[Choice, Choice]]:
    """Return the pair that shows what checkpointing changes where the weights are packed: seen over plain weights."""
    if choice["checkpointing"] == traced["checkpointing"]:
        return []
    kept = traced.replaced("tuning", LORA)
    return [(kept.replaced("checkpointing", choice["checkpointing"]), kept)]


def _supervised_is_possible(choice: Choice) -> bool:
    return not any(getattr(method, "is_prompt_learning", False) for method in choice.methods)


def _corrected(seconds: float, fix: Correction) -> Interval:
    return Interval(seconds * fix.factor, seconds * fix.low, seconds * fix.high)
