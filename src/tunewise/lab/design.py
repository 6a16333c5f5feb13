"""Two-level designs: which combinations of k factors to measure so that their effects can be told apart.

Up to four factors all 2^k combinations; then regular fractions of resolution IV, 16 runs for 5 to 8 factors and 32 for
9 to 16: main effects are free of two-way interactions, which are aliased with each other (Box, Hunter and Hunter 2005,
Statistics for Experimenters, chapter 6). Signs are such that the combination with everything off is among the runs.

Where some combinations are not allowed, the fraction has holes. It is then replaced by as many allowed runs that tell
most, for main effects that can be anything and interactions that are small before they are seen (Bayesian D-optimality:
DuMouchel and Jones 1994, Technometrics 36), found by exchanging one run at a time (Fedorov 1972) from the allowed runs
of the regular fraction on. Nothing is random, so equal questions have equal designs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tunewise.errors import InputError

On = frozenset[str]
"""Names of the factors that are on."""

Numbers = NDArray[np.float64]

FULL_UP_TO = 4
"""Factors of which all combinations are measured."""

MOST_FACTORS = 16
MOST_CANDIDATES = 1024
"""Of more allowed combinations than this, an even sample is considered."""

_MAIN_PRIOR, _PAIR_PRIOR = 1e-4, 1.0
"""Precisions, in units of the error's: nothing is known of main effects; interactions are of the error's size."""

_WORDS = {
    5: ("ABCD",),
    6: ("ABC", "BCD"),
    7: ("ABC", "BCD", "ACD"),
    8: ("ABC", "BCD", "ACD", "ABD"),
    9: ("BCDE", "ACDE", "ABDE", "ABCE"),
    10: ("BCDE", "ACDE", "ABDE", "ABCE", "ABCD"),
}
"""Generators by the number of factors; from 11 on odd words of five letters' factors in their order."""


@dataclass(frozen=True)
class Design:
    """What to measure.

    Attributes:
        names: the factors.
        runs: combinations, each the set of factors that are on, the fewest first.
        generators: how the fraction was made ("e = a x b x c"); empty without one.
        resolution: 4 for a regular fraction (5 for five factors), None for all combinations and for irregular designs.
        aliases: interactions that cannot be told apart ("a x b + c x d").
        not_told: factors whose main effect cannot be told from others or from the mean, whatever is measured.
        dropped: how many combinations of the regular design are not allowed.
    """

    names: tuple[str, ...]
    runs: tuple[On, ...]
    generators: tuple[str, ...]
    resolution: int | None
    aliases: tuple[str, ...]
    not_told: tuple[str, ...]
    dropped: int


def two_level(names: Sequence[str], is_allowed: Callable[[On], bool] = lambda on: True) -> Design:
    """Return the design for `names`.

    Args:
        names: of the factors, in an order that is kept.
        is_allowed: whether a combination can be measured at all.

    Raises:
        InputError: there are more than 16 factors.
    """
    count = len(names)
    if count > MOST_FACTORS:
        raise InputError(f"A study of methods takes up to {MOST_FACTORS} factors, not {count}: switch fewer of them.")
    words = _words(count)
    regular = _fraction(names, words)
    allowed = [on for on in regular if is_allowed(on)]
    is_whole = len(allowed) == len(regular)
    if is_whole or count <= FULL_UP_TO:
        runs = allowed
    else:
        runs = _exchanged(names, allowed, _candidates(names, allowed, is_allowed), len(regular))
    return Design(
        names=tuple(names),
        runs=tuple(_in_order(names, runs)),
        generators=tuple(_generator(names, number, word) for number, word in enumerate(words)) if is_whole else (),
        resolution=(5 if count == 5 else 4) if words and is_whole else None,
        aliases=tuple(term for term, pairs in pair_terms(names, runs) if len(pairs) > 1),
        not_told=_not_told(names, runs),
        dropped=len(regular) - len(allowed),
    )


def signs(names: Sequence[str], runs: Sequence[On]) -> Numbers:
    """Return +1 for on and -1 for off, (runs, factors)."""
    return np.array([[1.0 if name in on else -1.0 for name in names] for on in runs]).reshape(len(runs), len(names))


def pair_terms(names: Sequence[str], runs: Sequence[On]) -> list[tuple[str, list[tuple[int, int, float]]]]:
    """Return the interactions that these runs can see, those of equal columns together.

    Each is (its name, its pairs as (first factor, second factor, sign)). A pair whose column is a combination of the
    main effects' and the mean's is left out: where int8 is never on without lora, there is no interaction to speak of.
    """
    levels = signs(names, runs)
    main = np.column_stack([np.ones(len(runs)), levels])
    inverse = np.linalg.pinv(main)
    groups: list[tuple[Numbers, list[tuple[int, int, float]]]] = []
    for one, other in itertools.combinations(range(len(names)), 2):
        column = levels[:, one] * levels[:, other]
        if np.allclose(main @ (inverse @ column), column, atol=1e-8):
            continue
        for first, pairs in groups:
            if abs(float(first @ column)) == len(runs):
                pairs.append((one, other, float(np.sign(first @ column))))
                break
        else:
            groups.append((column, [(one, other, 1.0)]))
    return [(_term(names, pairs), pairs) for _, pairs in groups]


def _term(names: Sequence[str], pairs: Sequence[tuple[int, int, float]]) -> str:
    words = [(f"{names[one]} x {names[other]}", sign) for one, other, sign in pairs]
    return words[0][0] + "".join(f" {'+' if sign > 0 else '-'} {word}" for word, sign in words[1:])


def _words(count: int) -> tuple[str, ...]:
    if count <= FULL_UP_TO:
        return ()
    odd = ["".join(word) for size in (3, 5) for word in itertools.combinations("ABCDE", size)]
    return _WORDS.get(count) or tuple(odd[: count - 5])


def _fraction(names: Sequence[str], words: Sequence[str]) -> list[On]:
    """The first factors in full, one for each word from the product of the word's letters."""
    basic = len(names) - len(words)
    runs = []
    for levels in itertools.product((-1, 1), repeat=basic):
        products = [_sign(word) * math.prod(levels["ABCDE".index(letter)] for letter in word) for word in words]
        row = (*levels, *products)
        runs.append(frozenset(name for name, level in zip(names, row, strict=True) if level > 0))
    return runs


def _sign(word: str) -> int:
    """Minus for words of even length, so that all off gives off."""
    return 1 if len(word) % 2 else -1


def _generator(names: Sequence[str], number: int, word: str) -> str:
    basic = len(names) - len(_words(len(names)))
    product = " x ".join(names["ABCDE".index(letter)] for letter in word)
    return f"{names[basic + number]} = {'' if _sign(word) > 0 else '- '}{product}"


def _in_order(names: Sequence[str], runs: Iterable[On]) -> list[On]:
    return sorted(runs, key=lambda on: (len(on), [name not in on for name in names]))


def _not_told(names: Sequence[str], runs: Sequence[On]) -> tuple[str, ...]:
    """Factors that are no row's combination: unit vectors outside the row space of mean and main effects."""
    if not runs:
        return tuple(names)
    main = np.column_stack([np.ones(len(runs)), signs(names, runs)])
    seen = np.linalg.pinv(main) @ main
    return tuple(name for number, name in enumerate(names, 1) if seen[number, number] < 1 - 1e-6)


def _candidates(names: Sequence[str], known: Sequence[On], is_allowed: Callable[[On], bool]) -> list[On]:
    """The allowed combinations, `known` first; of many an even sample."""
    total = 2 ** len(names)
    numbers = range(0, total, _odd(total / (4 * MOST_CANDIDATES)))
    every = (frozenset(name for bit, name in enumerate(names) if number >> bit & 1) for number in numbers)
    found = [on for on in every if on not in set(known) and is_allowed(on)]
    return [*known, *found[:: _odd(len(found) / MOST_CANDIDATES)]]


def _odd(share: float) -> int:
    """An odd step of at least `share`: it meets both levels of every factor, where an even one misses the first's."""
    return max(1, math.ceil(share)) | 1 if share > 1 else 1


def _exchanged(names: Sequence[str], start: Sequence[On], candidates: Sequence[On], size: int) -> list[On]:
    """The runs that tell most: `start` filled up greedily, then exchanged one by one as long as that helps.

    Everything off stays, where it is allowed: what is compared is compared with it.
    """
    rows = _model(names, candidates)
    prior = np.diag([_MAIN_PRIOR] * (1 + len(names)) + [_PAIR_PRIOR] * (rows.shape[1] - 1 - len(names)))
    inside = [number for number, on in enumerate(candidates) if on in set(start)]
    while len(inside) < min(size, len(candidates)):
        inside.append(_most_telling(rows, prior, inside)[0])
    for _ in range(20):
        before = sorted(inside)
        for number in list(inside):
            if not candidates[number]:
                continue
            rest = [each for each in inside if each != number]
            best, gains = _most_telling(rows, prior, rest)
            if gains[best] > gains[number] * (1 + 1e-9):
                inside = [*rest, best]
        if sorted(inside) == before:
            break
    return [candidates[number] for number in inside]


def _most_telling(rows: Numbers, prior: Numbers, inside: Sequence[int]) -> tuple[int, Numbers]:
    """The candidate that adds most to the determinant of the information of `inside`, and what each would add."""
    information = rows[list(inside)].T @ rows[list(inside)] + prior
    gains: Numbers = np.einsum("ij,ij->i", rows @ np.linalg.inv(information), rows)
    outside = gains.copy()
    outside[list(inside)] = -1.0
    return int(outside.argmax()), gains


def _model(names: Sequence[str], runs: Sequence[On]) -> Numbers:
    """Columns of the mean, the main effects and all pairs."""
    levels = signs(names, runs)
    pairs = [levels[:, one] * levels[:, other] for one, other in itertools.combinations(range(len(names)), 2)]
    matrix: Numbers = np.column_stack([np.ones(len(runs)), levels, *pairs])
    return matrix
