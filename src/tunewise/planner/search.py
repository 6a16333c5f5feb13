"""From a case to a choice: the space, the search, the confirmation, and the nearest way out when nothing fits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from tunewise.engine.tracking import Kind
from tunewise.errors import Conflict
from tunewise.machine.catalogue import CATALOGUE
from tunewise.methods import Packing
from tunewise.planner.case import Case
from tunewise.planner.choose import SAFETY_MARGIN, NothingFits, Selection, ranked, select
from tunewise.planner.load import Load
from tunewise.planner.predict import Prediction, Predictor
from tunewise.planner.space import Refused, Wishes, axes, enumerate_space
from tunewise.recipe import Fidelity
from tunewise.units import format_bytes, format_seconds

SHORTEST = 128
"""Documents are not cut to fewer tokens than this to find something that fits."""

MOST_REASONS = 4
"""So many groups of rejected combinations are named where not one could be predicted."""

_WHATEVER_THE_BATCH = (Kind.WEIGHTS, Kind.ADAPTER, Kind.OPTIMIZER)


def search(case: Case, predictor: Predictor) -> Selection:
    """Judge the whole space; the recommendation is confirmed by a dry run of its own."""
    options = axes(case.config, case.machine, case.base, case.wishes)
    packing = next(method for option in options["rows"] for method in option.methods if isinstance(method, Packing))
    kept, refused = enumerate_space(
        options,
        case.base,
        case.wishes,
        case.load.documents_per_step,
        rows_hold_one=case.load.laid_out(packing, 1).documents_per_row == 1,
    )
    selection = select(predictor, kept, case.limits)
    selection = replace(selection, rejected=(*selection.rejected, *refused), num_combinations=len(kept) + len(refused))
    return _confirmed(selection, case, predictor)


def _confirmed(selection: Selection, case: Case, predictor: Predictor) -> Selection:
    """Put the first candidate in front whose own dry run fits, in a smaller micro-batch if need be."""
    limit = case.limits.peak_bytes
    failed: list[Refused] = []
    for candidate in selection.candidates:
        sizes = [n for n in predictor.micro_batch_sizes(candidate.choice) if n <= candidate.micro_batch_size]
        for size in reversed(sizes):
            try:
                confirmed, estimate = predictor.confirm(predictor.predict(candidate.choice, size))
            except Conflict as conflict:
                failed.append(Refused(candidate.choice, str(conflict)))
                break
            if confirmed.peak_bytes <= limit:
                rest = [each for each in selection.candidates if each.choice not in _choices(failed, confirmed)]
                front = [confirmed, *(each for each in selection.front if each in rest)]
                return replace(
                    selection,
                    best=confirmed,
                    dry_run=estimate,
                    candidates=(confirmed, *rest),
                    front=tuple(ranked(front)),
                    rejected=(*selection.rejected, *failed),
                )
        else:
            need = format_bytes(confirmed.peak_bytes)
            failed.append(Refused(candidate.choice, f"its own dry run needs {need} of {format_bytes(limit)}"))
    return replace(selection, best=None, candidates=(), front=(), rejected=(*selection.rejected, *failed))


def _choices(failed: list[Refused], confirmed: Prediction) -> list[object]:
    return [confirmed.choice, *(each.choice for each in failed)]


def nothing_fits(case: Case, selection: Selection, predictor: Predictor) -> NothingFits:
    """Return the error that says what is missing, and the nearest recipe that fits."""
    limit = format_bytes(case.limits.peak_bytes)
    lines = [f"No combination of {selection.num_combinations} keeps to the limits on {case.machine.name} ({limit})."]
    smallest = selection.smallest
    if smallest is not None:
        need = format_bytes(smallest.peak_bytes)
        time = f" and {_times(case, smallest)}" if _times(case, smallest) else ""
        lines.append(f"The smallest, '{smallest.choice.label}', needs {need} with {smallest.rows.words}{time}.")
    else:
        groups = Counter(each.reason for each in selection.rejected).most_common(MOST_REASONS)
        lines.append("None comes into question: " + "; ".join(f"{count} {reason}" for reason, count in groups) + ".")
    fixed = 0 if smallest is None else sum(smallest.kinds[kind] for kind in _WHATEVER_THE_BATCH)
    for changed, give_up in _ways_out(case, can_be_shorter=fixed < case.limits.peak_bytes):
        is_same_work = changed.base is case.base and changed.load is case.load  # what was traced serves again
        found = search(changed, predictor if is_same_work else changed.predictor(predictor.trace_all))
        if found.best is not None:
            best = found.best
            needs = ", ".join(filter(None, (format_bytes(best.peak_bytes), _times(changed, best))))
            lines.append(f"What fits, if you {give_up}: {best.choice.label} ({needs}).")
            recipe = changed.recipe(best)
            return NothingFits("\n  ".join(lines), recipe, give_up)
    if smallest is not None:
        lines.append(_larger_machine(smallest.peak_bytes))
    return NothingFits("\n  ".join(lines), None, "use a larger machine")


def _times(case: Case, prediction: Prediction) -> str:
    """Say what a plan takes and costs, where somebody said how long the run is."""
    if case.limits.run_steps is None:
        return ""
    seconds = prediction.step_seconds.middle * case.limits.run_steps
    price = case.limits.price_per_hour
    return format_seconds(seconds) + ("" if price is None else f" at a price of {price * seconds / 3600:.2f}")


def _ways_out(case: Case, *, can_be_shorter: bool) -> Iterator[tuple[Case, str]]:
    """Yield changed cases, the smallest sacrifice first, each with what is given up."""
    wishes, limits = case.wishes, case.limits
    if limits.time_seconds is not None or limits.cost is not None:
        yield replace(case, limits=replace(limits, time_seconds=None, cost=None)), "drop the limits of time and cost"
    if wishes.quality != Fidelity.LEARNING:
        yield replace(case, wishes=replace(wishes, quality=Fidelity.LEARNING)), f"give up quality '{wishes.quality}'"
    if wishes.unwanted:
        yield replace(case, wishes=replace(wishes, unwanted=())), f"allow {' and '.join(wishes.unwanted)}"
    if wishes.wanted:
        yield replace(case, wishes=replace(wishes, wanted=())), f"go without {' and '.join(wishes.wanted)}"
    if wishes != Wishes():
        case = replace(case, wishes=Wishes())
        yield case, "give up all wishes"
    length = case.load.longest // 2
    while can_be_shorter and length >= SHORTEST:
        data = case.base.data.model_copy(update={"max_length": length})
        base = case.base.replace(data=data)
        load = Load.of_corpus(case.load.cut(length), base, case.load.num_steps, case.load.description)
        yield replace(case, base=base, load=load), f"cut documents to {length} tokens"
        length //= 2


def _larger_machine(num_bytes: int) -> str:
    needed = num_bytes / (1 - SAFETY_MARGIN)
    large = [machine for machine in CATALOGUE if machine.usable_memory_bytes >= needed and machine.kind == "cuda"]
    if not large:
        return "No single machine of the catalogue is large enough."
    machine = min(large, key=lambda each: each.usable_memory_bytes)
    usable = format_bytes(machine.usable_memory_bytes)
    return f"The smallest machine of the catalogue that holds it is {machine.name} ({usable} usable)."
