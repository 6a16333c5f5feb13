"""A deep model from two shallow ones: which blocks to trace, and how to extend what was seen to the full depth.

Blocks of one kind are all alike, so at every instant of the step the bytes alive are a linear function of how many
blocks there are, and two traces fix it. The *place* of the peak is not: with few blocks the head's logits win, with
many the last block's recomputation. So each place of the step is extended by itself (places are counted from the first
block and from the last one), and the peak is taken afterwards. In between, memory is linear in the block's number too,
so it is never higher than at both ends.
"""

from __future__ import annotations

import copy
import fnmatch
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from tunewise.engine.estimate import Peak, Trace, highest
from tunewise.engine.skeleton import block_kinds
from tunewise.engine.tracking import Curve, Moment, Place
from tunewise.engine.work import Work, WorkKey
from tunewise.methods.checkpointing import Checkpointing
from tunewise.methods.freezing import Freeze
from tunewise.methods.low_rank import LowRank
from tunewise.methods.peft import Peft
from tunewise.recipe import Method, Recipe

Kept = tuple[int, ...]
"""The numbers of the blocks of the full model that a shallow one keeps, ascending."""

_NUMBERS_OF_BLOCKS = ("mlp_only_layers", "attn_layer_indices", "moe_layers")
"""Lists in configurations that name blocks by their numbers."""

_FEWEST_BLOCKS = 2
"""With a single block the first is also the last, which real models never see."""


def shallow_depths(
    config: PretrainedConfig, recipe: Recipe, apart: int = 1, fewest: int = _FEWEST_BLOCKS
) -> tuple[Kept, Kept] | None:
    """Return which blocks two shallow models keep, or None: take the whole model.

    Args:
        config, recipe: of the whole model.
        apart: how many periods the second one has more.
        fewest: blocks of the first one, at least.
    """
    signatures = block_signatures(config, recipe)
    start, end, period = _longest_periodic_run(signatures)
    rest = (end - start) % period
    small = _shorter(period, fewest) + rest
    large = small + apart * period
    if large >= end - start:
        return None
    kinds = block_kinds(config)
    if len(kinds) != len(signatures):  # blocks that are used twice, or are no blocks of transformers'
        return None
    outside = (tuple(range(start)), tuple(range(end, len(signatures))))
    # The first blocks of the run and its last `rest` ones: as a whole period is left out, the pattern goes on unbroken.
    first, second = ((*outside[0], *range(start, start + count), *outside[1]) for count in (small, large))
    is_true = all(_kinds_of(config, recipe, kept) == [kinds[number] for number in kept] for kept in (first, second))
    return (first, second) if is_true else None


def _kinds_of(config: PretrainedConfig, recipe: Recipe, kept: Kept) -> list[str]:
    """Return the kinds of a shallow model's blocks; nothing where there is no such model."""
    try:
        return list(block_kinds(shallow(config, recipe, kept)[0]))
    except Exception:  # whatever a configuration does not like about being shortened
        return []


def block_signatures(config: PretrainedConfig, recipe: Recipe) -> list[tuple[Any, ...]]:
    """Return for each block what sets it apart from others, by its modules, the configuration and the methods."""
    text = config.get_text_config()
    depth = int(text.num_hidden_layers)
    columns: list[Sequence[Any]] = [
        value for value in text.to_dict().values() if isinstance(value, list | tuple) and len(value) == depth
    ]
    kinds = block_kinds(config)
    if len(kinds) == depth:
        columns.append(kinds)
    checkpointing, low_rank, freeze = (recipe.get(kind) for kind in (Checkpointing, LowRank, Freeze))
    if isinstance(checkpointing, Checkpointing):
        columns.append([number % checkpointing.every for number in range(depth)])
    if isinstance(low_rank, LowRank) and low_rank.layers_to_transform is not None:
        columns.append([number in low_rank.layers_to_transform for number in range(depth)])
    if isinstance(freeze, Freeze):
        columns += [[_may_match(pattern, number) for number in range(depth)] for pattern in freeze.train]
    peft = recipe.get(Peft)
    if isinstance(peft, Peft):
        columns += _peft_columns(peft, depth)
    return [tuple(map(str, block)) for block in zip(*columns, strict=True)] if columns else [()] * depth


def shallow(config: PretrainedConfig, recipe: Recipe, kept: Kept) -> tuple[PretrainedConfig, Recipe]:
    """Return configuration and recipe of the model that has only the blocks `kept`."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    depth = int(text.num_hidden_layers)
    lists = {
        name: value for name, value in vars(text).items() if isinstance(value, list | tuple) and len(value) == depth
    }
    text.num_hidden_layers = len(kept)
    for name, value in lists.items():
        setattr(text, name, [value[number] for number in kept])
    dense = getattr(text, "first_k_dense_replace", None)
    if isinstance(dense, int):
        text.first_k_dense_replace = sum(number < dense for number in kept)
    for name in _NUMBERS_OF_BLOCKS:
        if numbers := getattr(text, name, None):
            setattr(text, name, [place for place, number in enumerate(kept) if number in numbers])
    methods = tuple(_shallow_method(method, kept, depth) for method in recipe.methods or ())
    return config, recipe.replace(methods=methods)


def extend(small: Trace, large: Trace, depth: int) -> tuple[dict[Moment, Peak], dict[WorkKey, Work], tuple[int, int]]:
    """Return (peaks, work, (trainable, total) parameters) of a model of `depth` blocks."""
    factor = (depth - small.num_blocks) / (large.num_blocks - small.num_blocks)
    peaks = highest(
        (place.moment, _extend_curve(small.curves[place], large.curves[counterpart], factor))
        for place in small.curves
        for counterpart in _counterparts(place, small.num_blocks, large.num_blocks)
        if counterpart in large.curves
    )
    zero = Work(0.0, 0.0, 0.0)
    keys = dict.fromkeys([*small.work, *large.work])
    work = {}
    for key in keys:
        pair = zip(small.work.get(key, zero), large.work.get(key, zero), strict=True)
        work[key] = Work(*(first + (second - first) * factor for first, second in pair))
    trainable, total = (
        round(first + (second - first) * factor)
        for first, second in (
            (small.trainable_parameters, large.trainable_parameters),
            (small.total_parameters, large.total_parameters),
        )
    )
    return peaks, work, (trainable, total)


def _counterparts(place: Place, small: int, large: int) -> tuple[Place, ...]:
    """The same place in the deeper model: as far from the first block, and as far from the last.

    The first block is like no other (the embedding's gradient), and so is the last one.
    """
    if place.block is None or place.block < 0:
        return (place,)
    from_first = (place,) if place.block < small - 1 else ()
    from_last = (place._replace(block=place.block + large - small),) if place.block > 0 else ()
    return from_first + from_last


def _extend_curve(small: Curve, large: Curve, factor: float) -> Curve:
    if len(small) != len(large):  # as many events as blocks (an optimizer's step): compare the fullest instants
        small, large = (curve[[curve.sum(axis=1).argmax()]] for curve in (small, large))
    return np.rint(small + (large - small) * factor).astype(np.int64)


def _longest_periodic_run(signatures: Sequence[tuple[Any, ...]]) -> tuple[int, int, int]:
    """Return (start, end, period) of the run that is worth most to shorten: the one with most blocks to leave out."""
    depth = len(signatures)
    best, most_left_out = (0, depth, max(depth, 1)), 0
    for period in range(1, depth // 2 + 1):
        start = 0
        while start < depth:
            end = min(start + period, depth)
            while end < depth and signatures[end] == signatures[end - period]:
                end += 1
            longer = _shorter(period) + period
            left_out = end - start - longer - (end - start) % period
            if left_out > most_left_out:
                best, most_left_out = (start, end, period), left_out
            start = max(start + 1, end - period + 1)
    return best


def _shorter(period: int, fewest: int = _FEWEST_BLOCKS) -> int:
    """Return how many blocks of a run the shallower model keeps: whole periods."""
    return period * -(-fewest // period)


def _number_part(pattern: str) -> int | None:
    """Return which part of a name's pattern is about a block's number ("2[23]" in "model.layers.2[23].*"), if any."""
    parts = enumerate(pattern.split("."))
    return next((place for place, part in parts if re.fullmatch(r"(\d|\[[^]]*\]|\?)+\*?", part)), None)


def _may_match(pattern: str, number: int) -> bool:
    place = _number_part(pattern)
    return place is None or fnmatch.fnmatchcase(str(number), pattern.split(".")[place])


def _peft_columns(peft: Peft, depth: int) -> list[list[Any]]:
    """What the options of a kind of peft's say about blocks.

    Where they name blocks in a way of their own, or tie layers by their number in the model, every block is unlike any
    other.
    """
    options, columns = peft.options, list[list[Any]]()
    chosen = _chosen_blocks(peft)
    if chosen is not None:
        columns.append([number in chosen for number in range(depth)])
    if isinstance(options.get("adapter_layers"), int):
        columns.append([number >= depth - options["adapter_layers"] for number in range(depth)])
    if isinstance(options.get("stride_A"), int) and options["stride_A"] > 0:
        columns.append([number % options["stride_A"] for number in range(depth)])
    names = str([value for option, value in options.items() if "module" in option or option.endswith("_pattern")])
    if re.search(r"\.\W*\d", names) or options.get("weight_tying") or options.get("num_layers"):
        columns.append(list(range(depth)))
    return columns


def _chosen_blocks(peft: Peft) -> tuple[int, ...] | None:
    blocks = peft.options.get("layers_to_transform")
    return (blocks,) if isinstance(blocks, int) else tuple(blocks) if isinstance(blocks, list | tuple) else None


def _shallow_peft(peft: Peft, kept: Kept, depth: int) -> Peft:
    options, chosen = dict(peft.options), _chosen_blocks(peft)
    if chosen is not None:
        options["layers_to_transform"] = [place for place, number in enumerate(kept) if number in chosen]
    if isinstance(options.get("adapter_layers"), int):
        options["adapter_layers"] = sum(number >= depth - options["adapter_layers"] for number in kept)
    return peft.model_copy(update={"options": options})


def _shallow_method(method: Method, kept: Kept, depth: int) -> Method:
    if isinstance(method, Peft):
        return _shallow_peft(method, kept, depth)
    if isinstance(method, LowRank) and method.layers_to_transform is not None:
        wanted = tuple(place for place, number in enumerate(kept) if number in method.layers_to_transform)
        return method.model_copy(update={"layers_to_transform": wanted})
    if isinstance(method, Freeze):
        train = tuple(name for pattern in method.train for name in _shallow_patterns(pattern, kept))
        return method.model_copy(update={"train": tuple(dict.fromkeys(train))})
    return method


def _shallow_patterns(pattern: str, kept: Kept) -> list[str]:
    """Patterns for the shallow model's names, which match what `pattern` matches in the full one."""
    place, parts = _number_part(pattern), pattern.split(".")
    if place is None:
        return [pattern]
    return [
        ".".join([*parts[:place], str(new), *parts[place + 1 :]])
        for new, number in enumerate(kept)
        if fnmatch.fnmatchcase(str(number), parts[place])
    ]
