"""Which field of a record is what: found automatically or named by the user, and always said in words.

| format            | fields                                     | becomes                              |
|-------------------|--------------------------------------------|--------------------------------------|
| alpaca            | instruction, input, output, system         | user (instruction, input), assistant |
| prompt-completion | prompt, completion, system                 | user, assistant                      |
| messages          | messages (of role, content), tools, system | the messages                         |
| sharegpt          | conversations (of from, value), tools, ... | the messages, roles renamed          |
| text              | text                                       | plain text                           |

These are our names for the fields; data sets use others, and `detection` finds out which.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tunewise.errors import InputError
from tunewise.workload.conversation import Conversation, Document, Message, PlainText, message_from
from tunewise.workload.record import Record

ALPACA_PREAMBLE = "Below is an instruction that describes a task"
ALPACA_PROMPT = (
    ALPACA_PREAMBLE + ". Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_PROMPT_WITH_INPUT = (
    ALPACA_PREAMBLE + ", paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
"""The prompts of Stanford Alpaca (Taori et al. 2023), used when the tokenizer has no chat template."""

REQUIRED = {
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "text": ("text",),
}
OPTIONAL = {
    "alpaca": ("input", "system"),
    "prompt-completion": ("system",),
    "messages": ("tools", "system"),
    "sharegpt": ("tools", "system"),
    "text": (),
}


@dataclass(frozen=True)
class FieldMapping:
    """Which of the user's fields became which of ours.

    Attributes:
        format: one of the five formats.
        fields: our name -> the user's name, which may be a path such as "instances.0.output".
        ignored: the user's fields that are not used.
        also_possible: other readings of the same fields, in words.
    """

    format: str
    fields: Mapping[str, str]
    ignored: tuple[str, ...] = ()
    also_possible: tuple[str, ...] = ()

    def describe(self) -> str:
        """Say it: "format alpaca: instruction <- 'instruction', output <- 'response'; ignored: 'id'"."""
        sentence = f"format {self.format}: {arrows(self.fields)}"
        if self.ignored:
            sentence += f"; ignored: {quoted(self.ignored)}"
        if self.also_possible:
            sentence += f"; also possible: {' or '.join(self.also_possible)} (choose with 'format' and 'fields')"
        return sentence

    def convert(self, record: Record) -> Document:
        """Bring a record into the normal form.

        Raises:
            InputError: a required field is missing or is not what the format needs; names place and field.
        """
        for ours in REQUIRED[self.format]:
            self._found(record, ours)
        if self.format == "text":
            return PlainText(self._text(record, "text"), record.origin)
        if self.format in ("messages", "sharegpt"):
            return self._conversation(record)
        system = self._text(record, "system")
        if self.format == "alpaca":
            instruction, extra = self._text(record, "instruction"), self._text(record, "input")
            prompt = f"{instruction}\n\n{extra}" if extra.strip() else instruction
            template = ALPACA_PROMPT_WITH_INPUT if extra.strip() else ALPACA_PROMPT
            plain_prompt = template.format(instruction=instruction, input=extra)
            answer = self._text(record, "output")
        else:
            prompt = plain_prompt = self._text(record, "prompt")
            answer = self._text(record, "completion")
        turns = (Message("user", prompt), Message("assistant", answer, is_supervised=True))
        leading = (Message("system", system),) if system.strip() else ()
        return Conversation(leading + turns, record.origin, plain_prompt=plain_prompt)

    def _conversation(self, record: Record) -> Conversation:
        ours = REQUIRED[self.format][0]
        value = parsed_if_text(self._found(record, ours))
        place = f"{record.origin} {self.fields[ours]}"
        if not isinstance(value, list):
            raise InputError(f"{place}: must be a list of messages, not {value!r:.60}.")
        messages = [message_from(item, f"{place}[{index}]") for index, item in enumerate(value)]
        system = self._text(record, "system")
        if system.strip():
            messages.insert(0, Message("system", system))
        tools = parsed_if_text(look_up(record.fields, self.fields["tools"])) if "tools" in self.fields else None
        if tools in (None, "", []):
            return Conversation(tuple(messages), record.origin)
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise InputError(
                f"{record.origin} {self.fields['tools']}: must be a list of JSON schemas, not {tools!r:.60}."
            )
        return Conversation(tuple(messages), record.origin, tools=tuple(tools))

    def _found(self, record: Record, ours: str) -> Any:
        value = look_up(record.fields, self.fields[ours])
        if value is ABSENT:
            raise InputError(
                f"{record.origin}: no field '{self.fields[ours]}' (needed as '{ours}' by the format "
                f"{self.format}). This record has: {quoted(record.fields)}."
            )
        return value

    def _text(self, record: Record, ours: str) -> str:
        value = look_up(record.fields, self.fields[ours]) if ours in self.fields else None
        if value is None or value is ABSENT or value != value:  # NaN is how pandas writes a missing text
            return ""
        if isinstance(value, (str, int, float)):
            return str(value)
        theirs = self.fields[ours]
        raise InputError(
            f"{record.origin} {theirs}: must be text, not {type(value).__name__}: {value!r:.60}. "
            f"To use an item of it, name its path, for example fields: {{{ours}: {theirs}.0}}."
        )


ABSENT = object()


def look_up(fields: Mapping[str, Any], path: str) -> Any:
    """Return the field `path`, also as a path "instances.0.output" into lists and objects; `ABSENT` when not
    there."""
    if path in fields:
        return fields[path]
    value: Any = fields
    for step in path.split("."):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return ABSENT
    return value


def parsed_if_text(value: Any) -> Any:
    """CSV and some JSON files carry lists as JSON text."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def arrows(fields: Mapping[str, str]) -> str:
    """Say a mapping: "prompt <- 'question', completion <- 'answer'"."""
    return ", ".join(f"{ours} <- '{theirs}'" for ours, theirs in fields.items())


def quoted(names: Iterable[str]) -> str:
    """List names in quotes."""
    return ", ".join(f"'{name}'" for name in names) or "none"
