"""What each method contributes, and how methods change each other's effect."""

from __future__ import annotations

from itertools import pairwise

from tunewise.lab.findings import Cumulative, Effect, MethodFindings, SingleEffect
from tunewise.lab.outcome import Interval
from tunewise.report import numbers
from tunewise.report.blocks import Block, Cell, Chart, Column, Group, Note, Row, Section, Table, Tone, Words, bars
from tunewise.report.charts.effects import Contribution, contributions, heat_map, main_effects, pairs_of
from tunewise.report.sections.ladder import rungs

INTERACTIONS = "interactions"
"""Under this name the study says why it excluded them."""

SAME = 0.01
"""A product that is so near to the whole is called the same; memory is measured without noise."""

TITLE_CONTRIBUTION, TITLE_INTERACTION = "What each method contributes", "How methods change each other"


def contribution_section(methods: MethodFindings) -> Section:
    """Return the section on single methods."""
    steps = ladder_steps(methods)
    time = [Contribution(each.name, each.alone_time, steps.get(each.name, (None, None))[0], each.left_out_time)
            for each in methods.single]  # fmt: skip
    memory = [Contribution(each.name, each.alone_memory, steps.get(each.name, (None, None))[1], each.left_out_memory)
              for each in methods.single]  # fmt: skip
    charts = (
        contributions("contribution-time", "Time of a step", time),
        contributions("contribution-memory", "Peak memory", memory),
    )
    drawn: tuple[Chart | Words | Note, ...] = tuple(chart for chart in charts if chart is not None)
    blocks: list[Block] = [
        Words(
            (
                "Ratios of with over without: left of the dotted line a method saves. A method that saves alone and "
                "nothing in the final recipe has been made superfluous by the others.",
            )
        )
    ]
    if not drawn:
        return Section(
            "contributions", TITLE_CONTRIBUTION, "Contributions", (Note("No method was measured with and without."),)
        )
    return Section(
        "contributions", TITLE_CONTRIBUTION, "Contributions",
        (*blocks, Group(drawn), contribution_table(methods.single, time, memory)),
    )  # fmt: skip


def ladder_steps(methods: MethodFindings) -> dict[str, tuple[Interval | None, Interval | None]]:
    """Return what each rung that adds one method multiplied time and memory by."""
    found: dict[str, tuple[Interval | None, Interval | None]] = {}
    trials = rungs(methods)
    for before, after in pairwise(trials):
        new = set(after.on) - set(before.on)
        if len(new) != 1:
            continue
        time = memory = None
        if before.step_seconds and after.step_seconds:
            time = numbers.quotient(after.step_seconds, before.step_seconds)
        if before.peak_tensor_bytes and after.peak_tensor_bytes:
            share = after.peak_tensor_bytes / before.peak_tensor_bytes
            memory = Interval(middle=share, low=share, high=share)
        found[new.pop()] = (time, memory)
    return found


def contribution_table(single: tuple[SingleEffect, ...], time: list[Contribution], memory: list[Contribution]) -> Table:
    """Return every method's changes of time, memory and loss, alone, in the ladder and left out."""
    columns = (
        Column("Method", is_number=False),
        Column("Time", "alone"),
        Column("Time", "in the ladder"),
        Column("Time", "in the final recipe"),
        Column("Memory", "alone"),
        Column("Memory", "in the ladder"),
        Column("Memory", "in the final recipe"),
        Column("Loss", "nats"),
    )
    rows = tuple(
        Row(
            (
                Cell(effect.name),
                *(_change(value) for value in (times.alone, times.ladder, times.left_out)),
                *(_change(value) for value in (sizes.alone, sizes.ladder, sizes.left_out)),
                Cell(numbers.NOTHING if effect.loss_change is None else numbers.signed(effect.loss_change, 3)),
            )
        )
        for effect, times, sizes in zip(single, time, memory, strict=True)
    )
    foot = (
        "Changes of time and peak memory, in per cent, with their intervals; grey where no change can be told "
        "from none. In the final recipe: the final recipe against the same without the method."
    )
    return Table("Alone, in the ladder, left out", columns, rows, foot)


def _change(value: Interval | None) -> Cell:
    if value is None:
        return Cell("–", tone="dim")
    tone: Tone = "dim" if value.low < 1 < value.high else ""
    return Cell.of(numbers.change(value), tone=tone)


def interaction_section(methods: MethodFindings) -> Section:
    """Return the section on interactions and the cumulative effect."""
    if len(methods.factors) < 2:
        only = methods.factors[0].name if methods.factors else "no method"
        words = f"Only {only} could be switched on and off here, and one method has nothing to interact with."
        return Section("interactions", TITLE_INTERACTION, "Interactions", (Note(words),))
    blocks: list[Block] = []
    cumulative = cumulative_table(methods)
    if cumulative is not None:
        blocks += [Words(cumulative_words(methods)), cumulative]
    main = main_effects(methods)
    if main is not None:
        blocks.append(main)
    maps = [
        heat_map("pairs-time", "Pairs: time", methods, methods.time_effects),
        heat_map("pairs-memory", "Pairs: memory", methods, methods.memory_effects),
    ]
    drawn: list[Chart | Words | Note] = [each for each in maps if each is not None]
    if drawn:
        blocks.append(Group(tuple(drawn)))
    else:
        blocks += _listed(methods)
    if main is not None or drawn:
        blocks.append(Note(_foot(methods), "dim"))
    return Section("interactions", TITLE_INTERACTION, "Interactions", tuple(blocks))


def cumulative_words(methods: MethodFindings) -> tuple[str, ...]:
    """Say what the whole is beside its parts."""
    said = []
    for what, saved, found in (
        ("time", "time", methods.cumulative_time),
        ("memory", "memory", methods.cumulative_memory),
    ):
        if found is not None:
            said.append(_whole_and_parts(what, saved, found))
    return tuple(said)


def _whole_and_parts(what: str, saved: str, found: Cumulative) -> str:
    whole = numbers.ratio(found.whole)
    product = numbers.ratio(found.product)
    head = f"Together they multiply {what} by {whole}; the product of single effects would be {product}."
    if found.whole.low <= found.product <= found.whole.high or abs(found.synergy - 1) < SAME:
        return f"{head} The two cannot be told apart: the effects simply multiply."
    more = "less" if found.synergy > 1 else "more"
    times = numbers.significant(found.synergy)
    return f"{head} The whole is {times} times the product: together they save {more} {saved} than one by one."


def cumulative_table(methods: MethodFindings) -> Table | None:
    """Return the product of single effects beside the measured whole."""
    kinds = [("time", methods.cumulative_time), ("memory", methods.cumulative_memory)]
    found = [(what, each) for what, each in kinds if each is not None]
    if not found:
        return None
    values: list[Interval | None] = []
    for _, each in found:
        values += [Interval(middle=each.product, low=each.product, high=each.product), each.whole]
    drawn = bars(values)
    rows = tuple(
        Row(
            (
                Cell(what),
                Cell.of(numbers.ratio(each.product), drawn[2 * index]),
                Cell.of(numbers.ratio(each.whole), drawn[2 * index + 1], "chosen"),
                Cell(numbers.significant(each.synergy)),
            )
        )
        for index, (what, each) in enumerate(found)
    )
    columns = (
        Column("Effect on", is_number=False),
        Column("Product of single effects"),
        Column("Measured whole", "95 %"),
        Column("Synergy", "whole over product"),
    )
    return Table("The product against the whole", columns, rows)


def _listed(methods: MethodFindings) -> list[Block]:
    rows = []
    for what, effects in (("time", methods.time_effects), ("memory", methods.memory_effects)):
        for (one, other), ratio in pairs_of(methods, effects).items():
            rows.append(
                Row((Cell(f"{one} × {other}"), Cell(what), Cell.of(numbers.ratio(ratio)), Cell(_meaning(ratio))))
            )
    if not rows:
        why = [reason for name, reason in methods.excluded if name == INTERACTIONS]
        return [Note(f"How pairs of methods change each other was not measured{': ' if why else ''}{''.join(why)}.")]
    columns = (
        Column("Pair", is_number=False),
        Column("Effect on", is_number=False),
        Column("Ratio", "95 %"),
        Column("Meaning", is_number=False),
    )
    return [Table("Pairs of methods", columns, tuple(rows))]


def _meaning(ratio: Interval) -> str:
    if numbers.holds_one(ratio):
        return "cannot be told from none"
    return "together they save less" if ratio.middle > 1 else "together they save more"


def _foot(methods: MethodFindings) -> str:
    said = "A pair's number is what both together have beyond the product of both; above ×1 they save less together."
    strong = [effect for effect in (*methods.time_effects, *methods.memory_effects) if _is_pair(methods, effect)]
    bold = sum(not numbers.holds_one(effect.ratio) for effect in strong)
    if strong:
        said += f" {bold} of {len(strong)} can be told from none (bold)."
    left = [
        f"{share:.1f} % in {what}"
        for what, share in (("time", methods.residual_time), ("memory", methods.residual_memory))
        if share is not None
    ]
    return said + (f" What the design leaves unexplained: {' and '.join(left)}." if left else "")


def _is_pair(methods: MethodFindings, effect: Effect) -> bool:
    return effect.term not in {factor.name for factor in methods.factors}
