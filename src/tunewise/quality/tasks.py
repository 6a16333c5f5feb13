"""Is an answer right: one function a measure, from what was said and what would have been right to a number.

Most are the field's own: exact match and F1 as SQuAD has them (Rajpurkar et al. 2016), the last number as GSM8K has it
(Cobbe et al. 2021), ROUGE-1, ROUGE-2 and ROUGE-L as F measures (Lin 2004).
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from tunewise.errors import InputError
from tunewise.workload.matching import normalised

Score = Callable[[str, Sequence[str]], float]
"""From an answer and the right ones to 0 ... 1, the best over these."""

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
_FENCE = re.compile(r"```[a-zA-Z]*\s*\n(.*?)```", re.DOTALL)


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Return the harmonic mean of precision and recall of words, the best over the right answers."""
    return max((_f1(normalised(answer).split(), normalised(each).split()) for each in references), default=0.0)


def numeric_match(answer: str, references: Sequence[str]) -> float:
    """Return 1 when the answer's number is a right one's: what follows "####", or else the last number."""
    said = last_number(answer)
    return float(said is not None and any(said == last_number(reference) for reference in references))


def last_number(text: str) -> float | None:
    """Return the number that a text comes to, or None."""
    marked = text.rpartition("####")[2] if "####" in text else text
    found = _NUMBER.findall(marked)
    if not found:
        return None
    wanted = found[0] if "####" in text else found[-1]
    return float(wanted.replace(",", ""))


def rouge_1(answer: str, references: Sequence[str]) -> float:
    """Return ROUGE-1, F measure of words."""
    return _rouge_n(answer, references, 1)


def rouge_2(answer: str, references: Sequence[str]) -> float:
    """Return ROUGE-2, F measure of pairs of words."""
    return _rouge_n(answer, references, 2)


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """Return ROUGE-L, F measure of the longest common subsequence of words."""
    said = _words(answer)
    return max((_f_of(_common_length(said, wanted := _words(each)), said, wanted) for each in references), default=0.0)


def json_valid(answer: str, references: Sequence[str] = ()) -> float:
    """Return 1 when the answer, or what stands in its first code fence, is JSON."""
    del references
    return float(json_of(answer) is not _NO_JSON)


def json_match(answer: str, references: Sequence[str]) -> float:
    """Return 1 when the answer is the same JSON value as a right one, whatever its layout and order of keys."""
    said = json_of(answer)
    return float(said is not _NO_JSON and any(said == json_of(reference) for reference in references))


_NO_JSON = object()


def json_of(answer: str) -> object:
    """Return the JSON value of an answer; a value of its own when there is none."""
    fenced = _FENCE.search(answer)
    try:
        return json.loads(fenced.group(1) if fenced else answer, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return _NO_JSON


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def code_of(answer: str) -> str:
    """Return the code in an answer: its first code fence, or all of it."""
    fenced = _FENCE.search(answer)
    return fenced.group(1) if fenced else answer


def user_score(place: str) -> Score:
    """Load a user's own function, "file.py:name", that takes (answer, references) and returns a number.

    It runs in this process: it is the user's, as a recipe is.

    Raises:
        InputError: no such file or function, or it cannot be imported.
    """
    file, colon, name = place.rpartition(":")
    if not colon or not file.endswith(".py"):
        raise InputError(f"--suite {place}: name a function of your own as file.py:function.")
    spec = importlib.util.spec_from_file_location("tunewise_user_score", file)
    if spec is None or spec.loader is None or not Path(file).is_file():
        raise InputError(f"--suite {place}: there is no file '{file}'.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the file is the user's own code, which may raise anything
        raise InputError(f"--suite {place}: the file cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"--suite {place}: '{file}' has no function '{name}'.")

    def score(answer: str, references: Sequence[str]) -> float:
        value = function(answer, list(references))
        if not isinstance(value, int | float):
            raise InputError(f"--suite {place}: the function must return a number, not {type(value).__name__}.")
        return float(value)

    return score


def _rouge_n(answer: str, references: Sequence[str], n: int) -> float:
    said = _ngrams(_words(answer), n)
    return max((_f1(said, _ngrams(_words(each), n)) for each in references), default=0.0)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.casefold())


def _ngrams(words: list[str], n: int) -> list[str]:
    return [" ".join(words[start : start + n]) for start in range(len(words) - n + 1)]


def _f1(said: list[str], wanted: list[str]) -> float:
    if not said or not wanted:
        return float(said == wanted)
    return _f_of(sum((Counter(said) & Counter(wanted)).values()), said, wanted)


def _f_of(common: int, said: list[str], wanted: list[str]) -> float:
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


def _common_length(one: list[str], other: list[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for word in one:
        before = 0
        for column, wanted in enumerate(other, 1):
            before, row[column] = row[column], before + 1 if word == wanted else max(row[column], row[column - 1])
    return row[-1]
