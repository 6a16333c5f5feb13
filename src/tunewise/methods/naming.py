"""Which modules a user means: the words of `target_modules` and the like, matched against a model's names.

The rules are PEFT's, so that a list written for PEFT means the same here: a tuple holds names that a module's
full name equals or ends with ("q_proj" means every "....q_proj"), a single text is a regular expression for
the full name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from tunewise.errors import InputError, did_you_mean


def select(names: Iterable[str], wanted: str | tuple[str, ...], field: str) -> list[str]:
    """Return the names that `wanted` means, in their own order.

    Raises:
        InputError: a word (or the expression) means none of the names; `field` says in which option it
            stands.
    """
    names = list(names)
    if isinstance(wanted, str):
        found = [name for name in names if _compiled(wanted, field).fullmatch(name)]
        if not found:
            raise InputError(f"{field}: the expression '{wanted}' matches no name.{_nearest(wanted, names)}")
        return found
    for word in wanted:
        if not any(ends_with(name, word) for name in names):
            raise InputError(f"{field}: there is no '{word}' in this model.{_nearest(word, names)}")
    return [name for name in names if any(ends_with(name, word) for word in wanted)]


def ends_with(name: str, word: str) -> bool:
    """Whether a full name is `word` or ends with the whole components of `word`."""
    return name == word or name.endswith("." + word)


def layer_number(name: str) -> int | None:
    """Return the number of the decoder layer in a name such as "model.layers.3.mlp.up_proj"."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _compiled(expression: str, field: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise InputError(f"{field}: '{expression}' is not a regular expression: {error}.") from None


def _nearest(word: str, names: Collection[str]) -> str:
    """Name the nearest known name: without layer numbers, so that a list of all stays short."""
    if word in names or not names:
        return ""
    depth = word.count(".") + 1
    tails = {".".join(name.split(".")[-depth:]) for name in names}
    return did_you_mean(word, tails)
