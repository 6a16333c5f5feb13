"""Finds out which format some records have, and which of their fields is what.

What the user named is honoured; of the rest the well-known names are known. Where several readings are
possible the most specific one is taken, and the others are named in the mapping.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tunewise.errors import InputError, did_you_mean
from tunewise.recipe import DataFormat
from tunewise.workload.formats import (
    ABSENT,
    OPTIONAL,
    REQUIRED,
    FieldMapping,
    arrows,
    look_up,
    parsed_if_text,
    quoted,
)
from tunewise.workload.record import Record

_ALPACA_OUTPUTS = ("output", "response", "completion", "answer", "instances.0.output")
_ALPACA_INPUTS = ("input", "context", "instances.0.input")
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("prompt", "output"),
    ("prompt", "answer"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("input", "output"),
    ("input", "target"),
    ("source", "target"),
    ("intent", "snippet"),
    ("mr", "ref"),
    ("text", "code"),
    ("document", "summary"),
    ("article", "highlights"),
    ("dialogue", "summary"),
)
_LISTS = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat")
_TEXTS = ("text", "content", "story", "document", "article", "body", "code")
_SYSTEMS = ("system", "system_prompt")
_TOOLS = ("tools", "functions")


def find_mapping(
    sample: Sequence[Record], format: DataFormat = "auto", fields: Mapping[str, str] | None = None
) -> FieldMapping:
    """Find out what the fields of `sample` (the first records) are, honouring what the user named.

    Args:
        sample: some records, at least one.
        format: a format's name, or "auto".
        fields: our name -> the user's name, for those that the user named.

    Raises:
        InputError: the fields fit no format (says what was seen and how to name them), fit only preference
            tuning, or a named field does not exist.
    """
    seen = list(dict.fromkeys(key for record in sample for key in record.fields))
    named = dict(fields or {})
    formats = _formats_for(named, format, sample[0].origin)
    _check_named(named, sample, seen)
    if format == "auto" and not named and {"chosen", "rejected"} <= set(seen):
        raise InputError(
            f"{sample[0].origin}: these are preference records ('chosen', 'rejected'), which "
            "supervised fine-tuning cannot learn from as they are. To learn the chosen answers, name the "
            "fields, for example format: prompt-completion, fields: {prompt: prompt, completion: chosen}."
        )
    first = sample[0].fields
    readings = [reading for name in formats for reading in _readings(name, named, seen, first)]
    if not readings:
        raise _no_reading(sample[0], seen, format)
    name, chosen = readings[0]
    used = {theirs.split(".")[0] if theirs not in seen else theirs for theirs in chosen.values()}
    others = tuple(f"format {other}: {arrows(pairs)}" for other, pairs in readings[1:3] if pairs != chosen)
    return FieldMapping(name, chosen, tuple(key for key in seen if key not in used), others if not named else ())


def _formats_for(named: Mapping[str, str], format: DataFormat, origin: str) -> list[str]:
    """Return the formats that have all the named fields."""
    formats = list(REQUIRED) if format == "auto" else [format]
    known = {ours for name in formats for ours in REQUIRED[name] + OPTIONAL[name]}
    for ours in named:
        if ours not in known:
            what = "tunewise" if format == "auto" else f"the format {format}"
            raise InputError(f"{origin}: data.fields: {what} has no field '{ours}'.{did_you_mean(ours, known)}")
    fitting = [name for name in formats if named.keys() <= {*REQUIRED[name], *OPTIONAL[name]}]
    if not fitting:
        raise InputError(f"{origin}: data.fields: no format has all of {quoted(named)} together.")
    preferred = ["sharegpt", "messages", "alpaca", "prompt-completion", "text"]
    return sorted(fitting, key=preferred.index)


def _check_named(named: Mapping[str, str], sample: Sequence[Record], seen: Sequence[str]) -> None:
    for ours, theirs in named.items():
        if all(look_up(record.fields, theirs) is ABSENT for record in sample):
            raise InputError(
                f"{sample[0].origin}: data.fields: there is no field '{theirs}' (named for '{ours}')."
                f"{did_you_mean(theirs, seen)}"
            )


def _readings(
    name: str, named: Mapping[str, str], seen: Sequence[str], first: Mapping[str, Any]
) -> list[tuple[str, dict[str, str]]]:
    """Return the ways in which `first` can be read in the format `name`, best first."""

    def pick(ours: str, candidates: Sequence[str]) -> list[str]:
        """Return the user's names that could be `ours`; letter case does not count."""
        if ours in named:
            return [named[ours]]
        by_lower = {key.lower(): key for key in reversed(seen)}
        paths = [path for path in candidates if "." in path and look_up(first, path) is not ABSENT]
        return [by_lower[candidate] for candidate in candidates if candidate in by_lower] + paths

    system = _first("system", pick("system", _SYSTEMS))
    if name == "alpaca":
        optional = _first("input", pick("input", _ALPACA_INPUTS)) | system
        outputs = pick("output", _ALPACA_OUTPUTS)[:1]
        return [
            (name, {"instruction": instruction, **optional, "output": output})
            for instruction in pick("instruction", ("instruction",))
            for output in outputs
        ]
    if name == "prompt-completion":
        pairs = [
            (prompt, completion)
            for wanted_prompt, wanted_completion in _PAIRS
            for prompt in pick("prompt", (wanted_prompt,))
            for completion in pick("completion", (wanted_completion,))
        ]
        pairs = [pair for pair in dict.fromkeys(pairs) if not any(isinstance(first.get(key), dict) for key in pair)]
        return [(name, {"prompt": prompt, "completion": completion} | system) for prompt, completion in pairs]
    if name == "text":
        return [(name, {"text": text}) for text in pick("text", _TEXTS) if isinstance(look_up(first, text), str)]
    ours = REQUIRED[name][0]
    tools = _first("tools", pick("tools", _TOOLS))
    return [
        (name, {ours: key} | tools | system)
        for key in pick(ours, _LISTS)
        if ours in named or _messages_kind(look_up(first, key)) == name
    ]


def _messages_kind(value: Any) -> str | None:
    """Tell messages from ShareGPT by the first item; None when it is no list of messages."""
    value = parsed_if_text(value)
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return None
    return "sharegpt" if {"from", "value"} <= value[0].keys() else "messages" if "role" in value[0] else None


def _no_reading(record: Record, seen: Sequence[str], format: DataFormat) -> InputError:
    wanted = "any known format" if format == "auto" else f"the format {format}"
    shapes = REQUIRED if format == "auto" else {format: REQUIRED[format]}
    listed = "\n".join(f"  {name}: {', '.join(names)}" for name, names in shapes.items())
    texts = [key for key in seen if isinstance(record.fields.get(key), str)]
    longest = sorted(texts, key=lambda key: -len(record.fields[key]))[:2]
    example = sorted(longest, key=texts.index) if len(longest) == 2 else ["QUESTION", "ANSWER"]
    return InputError(
        f"{record.origin}: the fields {quoted(seen)} do not fit {wanted}:\n{listed}\n"
        "Say which field is what, for example:\n"
        f"  data: {{format: prompt-completion, fields: {{prompt: {example[0]}, completion: {example[1]}}}}}"
    )


def _first(ours: str, found: Sequence[str]) -> dict[str, str]:
    return {ours: found[0]} if found else {}
