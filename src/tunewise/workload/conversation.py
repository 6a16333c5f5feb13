"""The normal form of all data: a `Conversation` of messages, or `PlainText`; and how roles are called
elsewhere."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tunewise.errors import InputError

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
"""How data sets call the four roles."""

ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value")
_WEIGHT_KEYS = ("weight", "train")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Attributes:
        role: "system", "user", "assistant" or "tool".
        content: what is said; for a tool call also its JSON, for templates that know no tool calls.
        is_supervised: whether this turn is learnt (assistant turns, unless the data say otherwise).
        extra: the message's other fields (tool_calls, reasoning_content, name, ...), handed to the chat
            template.
    """

    role: str
    content: str
    is_supervised: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order.

    Attributes:
        messages: the turns.
        origin: the place of the record.
        tools: JSON schemas of the functions that the assistant may call.
        plain_prompt: what stands before the answer when the tokenizer has no chat template; None lays the
            turns out under role headings.
    """

    messages: tuple[Message, ...]
    origin: str
    tools: tuple[Mapping[str, Any], ...] = ()
    plain_prompt: str | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left to learn: no supervised turn has content."""
        return not any(
            message.is_supervised and (message.content.strip() or message.extra.get("tool_calls"))
            for message in self.messages
        )

    def with_system_prompt(self, system_prompt: str) -> Conversation:
        """Return this conversation with a system message in front, unless it has one of its own."""
        if any(message.role == "system" for message in self.messages):
            return self
        return replace(self, messages=(Message("system", system_prompt), *self.messages))

    @property
    def content_key(self) -> int:
        """A hash of all that is said; equal up to case and blanks."""
        return normalised_hash(*(f"{message.role}:{message.content}" for message in self.messages))

    @property
    def prompt_key(self) -> int:
        """A hash of all that comes before the last answer; the content's hash where nothing comes before
        it."""
        last = max((i for i, message in enumerate(self.messages) if message.role == "assistant"), default=0)
        before = [f"{message.role}:{message.content}" for message in self.messages[:last] if message.content.strip()]
        return normalised_hash(*before) if before else self.content_key


@dataclass(frozen=True, slots=True)
class PlainText:
    """A text to be learnt as a whole, and its place."""

    text: str
    origin: str

    @property
    def is_empty(self) -> bool:
        """Whether the text has nothing but blanks."""
        return not self.text.strip()

    @property
    def content_key(self) -> int:
        """A hash of the text; equal up to case and blanks."""
        return normalised_hash(self.text)

    @property
    def prompt_key(self) -> int:
        """The same as `content_key`: a text has no prompt."""
        return self.content_key


Document = Conversation | PlainText


def normalised_hash(*parts: str) -> int:
    """Return 64 bits that are equal for parts that are equal up to Unicode form, case and blanks."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(" ".join(unicodedata.normalize("NFKC", part).casefold().split()).encode("utf-8", "replace"))
        digest.update(b"\x00")
    return int.from_bytes(digest.digest(), "big")


def message_from(value: Any, place: str) -> Message:
    """Read {role, content, ...} or {from, value}; `place` names it in errors, such as "train.jsonl:17
    messages[3]".

    Raises:
        InputError: no object, no role, an unknown role, or content that is not text.
    """
    if not isinstance(value, dict):
        raise InputError(f"{place}: a message must be an object with a role and a content, not {value!r:.60}.")
    role_key = next((key for key in ROLE_KEYS if key in value), None)
    content_key = next((key for key in CONTENT_KEYS if key in value), None)
    if role_key is None or (content_key is None and not value.get("tool_calls")):
        wanted = "'role' and 'content' (or 'from' and 'value')"
        raise InputError(f"{place}: a message needs {wanted}; this one has: {', '.join(map(str, value)) or 'nothing'}.")
    named = str(value[role_key]).lower()
    if named not in ROLES:
        raise InputError(f"{place}: unknown role '{value[role_key]}'. Known: {', '.join(ROLES)}.")
    role = ROLES[named]
    content = _content(value.get(content_key) if content_key else None, place)
    left = {role_key, content_key, *_WEIGHT_KEYS}
    extra = {key: item for key, item in value.items() if key not in left and item is not None}
    calls = _tool_calls(content) if named == "function_call" else None
    if calls:
        extra["tool_calls"] = calls
    wanted_marks = [bool(value[key]) for key in _WEIGHT_KEYS if value.get(key) is not None]
    return Message(role, content, role == "assistant" and all(wanted_marks), extra)


def _content(value: Any, place: str) -> str:
    """Return text; a list of parts ({"type": "text", "text": ...}) is joined."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in value]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            return "".join(texts)
        raise InputError(f"{place}: only text can be learnt; the content has a part that is not text: {value!r:.80}.")
    raise InputError(f"{place}: the content must be text, not {value!r:.60}.")


def _tool_calls(content: str) -> list[dict[str, Any]] | None:
    """Read ShareGPT's function calls ({"name", "arguments"}, or a list of these); None when they are not that
    JSON."""
    try:
        value = json.loads(content)
    except json.JSONDecodeError:
        return None
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        return None
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
        for call in calls
    ]
