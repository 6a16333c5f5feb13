"""How a conversation becomes one string, and which characters of it are learnt: the layout without chat
template.

A prompt and its completion are joined as they are (Alpaca records through Alpaca's prompt), chats are laid
out under the headings below, and behind every answer stands the tokenizer's EOS. `chat_template` has the
other layout.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from tunewise.errors import InputError
from tunewise.workload.conversation import Conversation, Message
from tunewise.workload.tally import Event

HEADINGS = {
    "system": "### System:\n",
    "user": "### User:\n",
    "assistant": "### Assistant:\n",
    "tool": "### Tool:\n",
}
"""What stands before a turn when the tokenizer has no chat template; turns are separated by a blank line."""

TOOLS_IN_SYSTEM = "You may call these functions:\n"
"""Before the JSON of the tools in the system message, for templates (and plain layouts) that know no
tools."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A conversation's text.

    Attributes:
        text: the whole text.
        spans: (start, end) of the characters that are learnt, in order.
        takes_bos: whether the tokenizer's BOS belongs before it (a chat template writes its own).
        events: what must be told.
    """

    text: str
    spans: tuple[Span, ...]
    takes_bos: bool
    events: tuple[Event, ...] = ()


class Renderer(Protocol):
    """Lays conversations out as text."""

    def describe(self) -> str:
        """Say in words how conversations are laid out."""

    def render(self, conversation: Conversation) -> Rendered:
        """Lay one conversation out; raises InputError when that is impossible."""


def eos_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the EOS token's text, having checked that the tokenizer turns it into the EOS id.

    Raises:
        InputError: there is none, so the model could never learn to stop.
    """
    eos = tokenizer.eos_token
    if eos is None:
        raise InputError(
            "the tokenizer has no EOS token, so the model could not learn where an answer ends. Set "
            "'eos_token' in the model folder's tokenizer_config.json to the token that ends a text."
        )
    if tokenizer(eos, add_special_tokens=False).input_ids != [tokenizer.eos_token_id]:
        raise InputError(
            f"the tokenizer's EOS token {eos!r} is not one token of its own. "
            "Add it as a special token to the tokenizer (tokenizer.add_special_tokens) and save it again."
        )
    return str(eos)


@dataclass(frozen=True)
class PlainRenderer:
    """Layout without a chat template."""

    eos: str

    def describe(self) -> str:
        """Say how conversations are laid out."""
        return f"no chat template: prompt, answer and {self.eos} are joined; chats get headings (### User: ...)"

    def render(self, conversation: Conversation) -> Rendered:
        """Join prompt and answer, or the turns under their headings; every answer ends with EOS."""
        conversation = tools_told(conversation)
        if conversation.plain_prompt is not None:
            return self._joined(conversation, conversation.plain_prompt)
        text, spans = "", []
        for message in conversation.messages:
            text += ("\n\n" if text else "") + HEADINGS[message.role]
            start, content = len(text), spoken(message)
            text += content
            if message.role == "assistant":
                text += self._end(content)
            if message.is_supervised:
                spans.append((start, len(text)))
        return Rendered(text, tuple(spans), takes_bos=True)

    def _joined(self, conversation: Conversation, prompt: str) -> Rendered:
        *before, answer = conversation.messages
        system = "".join(f"{message.content}\n\n" for message in before if message.role == "system")
        start, content = len(system) + len(prompt), answer.content
        text = system + prompt + content + self._end(content)
        has_gap = not prompt or prompt[-1].isspace() or content[:1].isspace()
        events = () if has_gap else (Event.RUN_TOGETHER,)
        return Rendered(text, ((start, len(text)),), takes_bos=True, events=events)

    def _end(self, content: str) -> str:
        return "" if content.endswith(self.eos) else self.eos


def spoken(message: Message) -> str:
    """Return a message's text; tool calls without text are written as JSON."""
    calls = message.extra.get("tool_calls")
    if message.content.strip() or not calls:
        return message.content
    functions = [call.get("function", call) if isinstance(call, dict) else call for call in calls]
    return json.dumps(functions[0] if len(functions) == 1 else functions, ensure_ascii=False)


def tools_told(conversation: Conversation) -> Conversation:
    """Move the tools into the system message."""
    if not conversation.tools:
        return conversation
    told = TOOLS_IN_SYSTEM + json.dumps([dict(tool) for tool in conversation.tools], ensure_ascii=False)
    messages = list(conversation.messages)
    if messages and messages[0].role == "system":
        messages[0] = Message("system", f"{messages[0].content}\n\n{told}")
    else:
        messages.insert(0, Message("system", told))
    return Conversation(tuple(messages), conversation.origin, plain_prompt=conversation.plain_prompt)
