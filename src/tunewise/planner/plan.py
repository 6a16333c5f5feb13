"""`tunewise.plan(...)`: model, data and machine in; the best recipe, its needs and everything rejected out."""

from __future__ import annotations

import time as clock
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PretrainedConfig

from tunewise.engine.estimate import Estimate
from tunewise.engine.tracking import Kind, Moment
from tunewise.machine.machine import Machine
from tunewise.machine.shapes import LayerShapes, advice
from tunewise.methods import Precision
from tunewise.planner.calibration import Foretold, note_prediction
from tunewise.planner.case import HERE, Case, Question, settle
from tunewise.planner.choose import Selection
from tunewise.planner.explain import Explanation, explain
from tunewise.planner.predict import Interval, Prediction, kind_of
from tunewise.planner.processes import Processes
from tunewise.planner.reasons import reasons
from tunewise.planner.rehearsal import rehearsed
from tunewise.planner.roofline import limits_of
from tunewise.planner.search import nothing_fits, search
from tunewise.planner.space import Refused
from tunewise.recipe import Fidelity, Recipe


@dataclass(frozen=True)
class Row:
    """One plan: what it is and what it needs.

    Attributes:
        recipe: complete, ready to train.
        label: its methods in words.
        peak_bytes: what torch's allocator holds at the fullest instant.
        kinds: the bytes of tensors at that instant by what they are there for.
        peak_moment: where that is.
        micro_batch_size, row_width: rows at once and the positions of the widest.
        step_seconds, tokens_per_second: with intervals; tokens are real ones, without padding.
        run_seconds, cost, energy_kwh: of the whole run, or of a million tokens when nobody said how long it is;
            cost and energy None without a price or a power limit.
        fidelity: the weakest promise among its methods.
        num_approximations: methods that learn with coarser numbers.
        is_confirmed: whether its bytes are from a dry run of this very recipe, not composed from others'.
    """

    recipe: Recipe
    label: str
    peak_bytes: int
    kinds: dict[str, int]
    peak_moment: str
    micro_batch_size: int
    row_width: int
    step_seconds: Interval
    tokens_per_second: Interval
    run_seconds: Interval
    cost: Interval | None
    energy_kwh: Interval | None
    fidelity: Fidelity
    num_approximations: int
    is_confirmed: bool


@dataclass(frozen=True)
class Plan:
    """What should be done, and why.

    Attributes:
        best: the recommendation.
        moments: its fullest instant in each part of the run: device bytes by kind, and "host" for copies in the host's
            memory (saving from a GPU).
        speed_limits: the share of its step that waits for each: "matrix products", "attention", "memory traffic",
            "launching".
        front: plans that no other beats in memory, time and quality at once, the best first.
        rejected: every other combination with its reason.
        reasons: why the recommendation is the best, in words.
        advice: what the rules of matrix shapes say about this model.
        usable_bytes, limit_bytes: what tensors can have, and this less the safety margin.
        run: what times and costs are of ("2 epochs of ..." or "a million tokens").
        interval: where the intervals are from.
        num_combinations, num_traced: how many were judged, from how many traced ones.
        planning_seconds: how long planning took.
    """

    best: Row
    moments: dict[str, dict[str, int]]
    speed_limits: dict[str, float]
    front: tuple[Row, ...]
    rejected: tuple[Refused, ...]
    reasons: tuple[str, ...]
    advice: tuple[str, ...]
    machine: Machine
    usable_bytes: int
    limit_bytes: int
    run: str
    interval: str
    num_combinations: int
    num_traced: int
    planning_seconds: float

    @property
    def recipe(self) -> Recipe:
        """The recommended recipe."""
        return self.best.recipe


def plan(
    model: str,
    data: str | None = None,
    *,
    length: int | None = None,
    machine: str | Machine = HERE,
    memory: str | int | None = None,
    time: str | float | None = None,
    cost: float | None = None,
    price: float | None = None,
    wanted: Sequence[str] = (),
    unwanted: Sequence[str] = (),
    quality: Literal["exact", "rounding", "learning"] = "learning",
    num_documents: int | None = None,
    settings: Sequence[str] = (),
    measure: bool = False,
) -> Plan:
    """Return the best recipe for this model, data and machine, without weights and without the machine.

    Args:
        model: hub id, folder, `config.json` or "embedded".
        data: as for training; or give `length`.
        length: plan for documents of so many tokens, all of them learnt.
        machine: a name of the catalogue, the path of a machine's YAML file, "here" (measured), or a Machine.
        memory: use no more than this ("24GB").
        time, cost: limits of the whole run ("2h"; in the currency of `price`).
        price: of the machine per hour.
        wanted, unwanted: names of methods that must or must not be in the recipe.
        quality: how far the recipe may go from the plain run, which has what is `wanted`.
        num_documents: how many documents of `length` there are, so that time and cost of a run are known.
        settings: changes of the recipe, "batch.documents=32".
        measure: also time the recommended step on this machine, on shallow copies of the model with random weights.

    Raises:
        InputError: an argument, the model or the data are wrong.
        NothingFits: no combination keeps to the limits; carries the nearest recipe that does.
    """
    return answer(
        Question(
            model, data, length, machine, memory, time, cost, price, tuple(wanted), tuple(unwanted), quality,
            num_documents, tuple(settings), measure,
        )
    )  # fmt: skip


def answer(question: Question) -> Plan:
    """Do the work of `plan`."""
    started = clock.perf_counter()
    with Processes() as processes:
        case = settle(question)
        predictor = case.predictor(processes.trace_all)
        selection = search(case, predictor)
        if question.measures:
            selection = rehearsed(case, predictor, selection)
        if selection.best is None:
            raise nothing_fits(case, selection, predictor)
    rows = [row_of(each, case) for each in selection.front]
    best = row_of(selection.best, case)
    note_prediction(
        best.recipe.id,
        Foretold(
            machine=case.machine.name,
            kind=kind_of(best.recipe),
            seconds_per_token=selection.best.roofline_seconds / case.load.tokens_per_step,
        ),
    )
    return Plan(
        best=best,
        moments=moments_of(selection.dry_run),
        speed_limits=_speed_limits(selection, case.machine),
        front=tuple(rows),
        rejected=selection.rejected,
        reasons=tuple(reasons(selection, case.limits)),
        advice=tuple(shape_advice(case, selection.best)),
        machine=case.machine,
        usable_bytes=case.limits.usable_bytes,
        limit_bytes=case.limits.peak_bytes,
        run=case.run,
        interval=selection.best.reason_of_interval,
        num_combinations=selection.num_combinations,
        num_traced=predictor.num_traced,
        planning_seconds=clock.perf_counter() - started,
    )


def explain_method(question: Question, method: str) -> Explanation:
    """Return what `method` changes in the recipe that would be recommended.

    Raises:
        InputError, Conflict: see `explain.explain`.
        NothingFits: there is no recommendation to explain it in.
    """
    with Processes() as processes:
        case = settle(question)
        predictor = case.predictor(processes.trace_all)
        selection = search(case, predictor)
        if selection.best is None:
            raise nothing_fits(case, selection, predictor)
        return explain(method, case, predictor, selection.best)


def row_of(prediction: Prediction, case: Case) -> Row:
    """Return a prediction as a row of the plan."""
    seconds = prediction.step_seconds.times(case.num_runs)
    price, watts = case.machine.price_per_hour, case.machine.power_watts
    choice = prediction.choice
    return Row(
        recipe=case.recipe(prediction),
        label=choice.label,
        peak_bytes=prediction.peak_bytes,
        kinds={kind.name.lower(): prediction.kinds[kind] for kind in Kind},
        peak_moment=prediction.peak_place,
        micro_batch_size=prediction.micro_batch_size,
        row_width=prediction.rows.width,
        step_seconds=prediction.step_seconds,
        tokens_per_second=prediction.tokens_per_second,
        run_seconds=seconds,
        cost=None if price is None else seconds.times(price / 3600),
        energy_kwh=None if watts is None else seconds.times(watts / 3.6e6),
        fidelity=choice.fidelity,
        num_approximations=choice.num_approximations,
        is_confirmed=prediction.is_confirmed,
    )


def moments_of(estimate: Estimate | None) -> dict[str, dict[str, int]]:
    """Return the peak of each part of the run, in the order of the run: bytes by kind, and those on the host."""
    if estimate is None:
        return {}
    peaks = {moment: estimate.moments[moment] for moment in Moment if moment in estimate.moments}
    return {
        str(moment): {kind.name.lower(): size for kind, size in peak.kinds.items()} | {"host": peak.host_bytes}
        for moment, peak in peaks.items()
    }


def _speed_limits(selection: Selection, machine: Machine) -> dict[str, float]:
    if selection.dry_run is None or selection.best is None:
        return {}
    precision = next(method for method in selection.best.choice.methods if isinstance(method, Precision))
    return limits_of(selection.dry_run.work, machine, tf32=precision.compute == "tf32")


def shape_advice(case: Case, best: Prediction) -> list[str]:
    """Return what the rules of shapes say about the model at the plan's micro-batch."""
    shapes = layer_shapes(case.config)
    precision = next(method for method in best.choice.methods if isinstance(method, Precision))
    if shapes is None or precision.compute not in case.machine.flops_per_second:
        return []
    positions = best.rows.positions_per_step / max(best.rows.micro_batches_per_step, 1e-9)
    return [each.sentence for each in advice(shapes, case.machine, precision.compute, max(1, round(positions)))]


def layer_shapes(config: PretrainedConfig) -> LayerShapes | None:
    """Return the dimensions of a configuration's matrix products; None where it does not name them as others do."""
    text = config.get_text_config()
    hidden, heads = getattr(text, "hidden_size", None), getattr(text, "num_attention_heads", None)
    if not isinstance(hidden, int) or not isinstance(heads, int):
        return None
    inner = next(
        (value for name in ("moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner")
         if isinstance(value := getattr(text, name, None), int) and value > 0),
        4 * hidden,
    )  # fmt: skip
    key_heads, width = getattr(text, "num_key_value_heads", None), getattr(text, "head_dim", None)
    return LayerShapes(
        hidden_size=hidden,
        intermediate_size=inner,
        vocab_size=text.vocab_size,
        num_attention_heads=heads,
        num_key_value_heads=key_heads if isinstance(key_heads, int) else None,
        head_dim=width if isinstance(width, int) else None,
    )
