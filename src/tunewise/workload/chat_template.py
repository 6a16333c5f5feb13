"""How a conversation becomes one string by the tokenizer's own chat template, and where the assistant speaks
in it.

Nothing is added that the template does not write: this is the text that the model will see when it is used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from tunewise.errors import InputError
from tunewise.workload.conversation import Conversation, Message
from tunewise.workload.rendering import Rendered, Span, eos_text, spoken, tools_told
from tunewise.workload.tally import Event

DATE = "26 Jul 2024"
"""What templates with a `date_string` (Llama 3) write; today's date would make other data every day."""

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class ChatRenderer:
    """Layout by the tokenizer's chat template.

    Assistant turns are found by the template's `{% generation %}` blocks where it has them. Otherwise turn i
    is what rendering messages[: i + 1] adds to rendering messages[:i] with the generation prompt, provided
    that both are beginnings of the whole; templates that lay out earlier turns otherwise than the last one
    (Qwen3) break that, and then the turn is found by its content behind the generation prompt.
    """

    tokenizer: PreTrainedTokenizerBase
    special_tokens: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        added = self.tokenizer.added_tokens_decoder.values()
        names = {token.content for token in added if token.special} | set(self.tokenizer.all_special_tokens)
        object.__setattr__(self, "special_tokens", tuple(sorted(names, key=len, reverse=True)))

    def describe(self) -> str:
        """Say how conversations are laid out."""
        how = "its {% generation %} blocks" if self._has_generation(None) else "rendering turn by turn"
        template = self.tokenizer.get_chat_template(None, None)
        has_clock = "strftime_now" in template and "date_string" not in template
        warning = "; it writes today's date, so that another day makes other data" if has_clock else ""
        return f"the tokenizer's chat template; assistant turns found by {how}{warning}"

    def render(self, conversation: Conversation) -> Rendered:
        """Lay one conversation out by the template.

        Raises:
            InputError: the template refuses the conversation (its own words are given).
        """
        knows_tools = "tools" in self._template(conversation)
        if not knows_tools:
            conversation = tools_told(conversation)
        tools = [dict(tool) for tool in conversation.tools] or None
        knows_calls = "tool_calls" in self._template(conversation)
        turns = [_turn(message, knows_calls) for message in conversation.messages]
        try:
            if self._has_generation(tools):
                text, found = self._generation_spans(turns, tools)
                spans, events = self._chosen(conversation.messages, found, text)
            else:
                text = self._text(turns, tools)
                spans, events = self._turn_by_turn(conversation.messages, turns, tools, text)
        except TemplateSyntaxError as error:
            raise InputError(
                f"the chat template is not valid Jinja: line {error.lineno}: {error.message}. Mend the model folder's "
                "chat_template.jinja (or tokenizer_config.json), or name another one as model.chat_template."
            ) from None
        except TemplateError as error:
            raise InputError(
                f"{conversation.origin}: the chat template refuses this conversation: {error}. "
                f"Its roles are: {', '.join(message.role for message in conversation.messages)}."
            ) from None
        text, spans, more = self._ended(text, spans, conversation)
        dropped = any(not _appears(turn, text) for turn in turns)
        if dropped and Event.TURN_REWRITTEN not in events:
            more.append(Event.CONTENT_DROPPED)
        return Rendered(text, tuple(spans), takes_bos=False, events=(*events, *more))

    def _template(self, conversation: Conversation) -> str:
        return str(self.tokenizer.get_chat_template(None, [dict(tool) for tool in conversation.tools] or None))

    def _has_generation(self, tools: list[dict[str, Any]] | None) -> bool:
        return _GENERATION_BLOCK.search(self.tokenizer.get_chat_template(None, tools)) is not None

    def _text(self, turns: list[dict[str, Any]], tools: list[dict[str, Any]] | None, prompt: bool = False) -> str:
        text = self.tokenizer.apply_chat_template(
            turns, tools=tools, tokenize=False, add_generation_prompt=prompt, date_string=DATE
        )
        return str(text)

    def _generation_spans(
        self, turns: list[dict[str, Any]], tools: list[dict[str, Any]] | None
    ) -> tuple[str, list[Span]]:
        texts, spans = render_jinja_template(
            conversations=[turns],
            tools=tools,
            chat_template=self.tokenizer.get_chat_template(None, tools),
            return_assistant_tokens_mask=True,
            date_string=DATE,
            **self.tokenizer.special_tokens_map,
        )
        return texts[0], [(start, end) for start, end in spans[0]]

    def _chosen(self, messages: Sequence[Message], found: list[Span], text: str) -> tuple[list[Span], list[Event]]:
        """Keep the spans of supervised turns; the special token that ends a turn belongs to it in any
        case."""
        spans = [(start, self._past_special_token(text, start, end)) for start, end in found]
        assistants = [message for message in messages if message.role == "assistant"]
        if all(message.is_supervised for message in assistants):
            return spans, []
        if len(spans) != len(assistants):
            return [], [Event.TURN_REWRITTEN]
        return [span for span, message in zip(spans, assistants, strict=True) if message.is_supervised], []

    def _turn_by_turn(
        self,
        messages: Sequence[Message],
        turns: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        text: str,
    ) -> tuple[list[Span], list[Event]]:
        spans: list[Span] = []
        events: list[Event] = []
        for index, message in enumerate(messages):
            if not message.is_supervised:
                continue
            head = self._text(turns[:index], tools, prompt=True) if index else ""
            has_prompt = index > 0 and head != self._text(turns[:index], tools)
            upto = self._text(turns[: index + 1], tools)
            if index and text.startswith(upto) and upto.startswith(head):
                start, end = len(head), len(upto)
                if not has_prompt:  # the template writes the assistant's heading with the answer: not learnt
                    start = _content_start(text, start, end, turns[index].get("content", ""))
                span: Span | None = (start, self._without_blanks(text, start, end))
            else:
                begin = len(head) if text.startswith(head) else spans[-1][1] if spans else 0
                knows_start = index > 0 and text.startswith(head) and has_prompt
                span = self._located(text, begin, turns[index].get("content", ""), knows_start)
            if span is None:
                events.append(Event.TURN_REWRITTEN)
            else:
                spans.append(span)
        return spans, events

    def _located(self, text: str, begin: int, content: str, knows_start: bool) -> Span | None:
        """Find a turn by its content at or after `begin`: the first place behind which a special token or the
        end is."""
        content = content.strip()
        if not content:
            return None
        for match in re.finditer(re.escape(content), text[begin:]):
            start, end = begin + match.start(), begin + match.end()
            rest = text[end:].lstrip()
            if not rest or rest.startswith(self.special_tokens):
                return begin if knows_start else start, self._past_special_token(text, start, end)
        return None

    def _past_special_token(self, text: str, start: int, end: int) -> int:
        """Move `end` behind the special token that follows directly, unless one ends the span already."""
        if text[start:end].rstrip().endswith(self.special_tokens):
            return self._without_blanks(text, start, end)
        following = next((token for token in self.special_tokens if text.startswith(token, end)), "")
        return end + len(following)

    def _without_blanks(self, text: str, start: int, end: int) -> int:
        """Move `end` before the blanks that follow the special token which ends a turn."""
        stripped = text[start:end].rstrip()
        return start + len(stripped) if stripped.endswith(self.special_tokens) else end

    def _ended(self, text: str, spans: list[Span], conversation: Conversation) -> tuple[str, list[Span], list[Event]]:
        """Append EOS where the template ends the last answer with no special token at all."""
        if not spans or conversation.messages[-1].role != "assistant" or spans[-1][1] < len(text.rstrip()):
            return text, spans, []
        if text.rstrip().endswith(self.special_tokens):
            return text, spans, []
        eos = eos_text(self.tokenizer)
        start, end = spans[-1]
        text = text[:end].rstrip() + eos
        return text, [*spans[:-1], (start, len(text))], [Event.END_ADDED]


def _turn(message: Message, knows_calls: bool) -> dict[str, Any]:
    """Return a message as templates want it."""
    calls = message.extra.get("tool_calls")
    others = {key: value for key, value in message.extra.items() if key != "tool_calls"}
    if not calls or not knows_calls:
        return {**others, "role": message.role, "content": spoken(message)}
    is_call_only = not message.content.strip() or _is_json(message.content)
    content = "" if is_call_only else message.content
    return {**others, "role": message.role, "content": content, "tool_calls": [_call(call) for call in calls]}


def _call(call: Any) -> Any:
    """OpenAI's arguments are JSON text; templates want the object."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    if not _is_json(function["arguments"]):
        return call
    return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def _content_start(text: str, start: int, end: int, content: str) -> int:
    found = text.find(content.strip(), start, end)
    if found < 0 or not content.strip():
        return start
    while found > start and text[found - 1] == " ":
        found -= 1
    return found


def _appears(turn: dict[str, Any], text: str) -> bool:
    """Whether a message's content stands in the text, as it is or as a JSON string (tool results)."""
    content = str(turn.get("content", "")).strip()
    return any(form in text for form in _forms(content))


def _forms(content: str) -> Iterator[str]:
    yield content
    yield json.dumps(content)[1:-1]
    yield json.dumps(content, ensure_ascii=False)[1:-1]
