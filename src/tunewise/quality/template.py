"""Does generation ask the model as training taught it: the same prompt, the same tokens, the same end?"""

from __future__ import annotations

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from tunewise.errors import InputError
from tunewise.workload.chat_template import DATE
from tunewise.workload.conversation import Conversation, Message
from tunewise.workload.tokens import renderer_for

_QUESTION, _SYSTEM, _ANSWER = "What is the colour of the sky?", "Answer in one word.", "Blue"
_EARLIER = (Message("user", "Hello."), Message("assistant", "Hello, what is it?"))

CONVERSATIONS = (
    (Message("user", _QUESTION),),
    (Message("system", _SYSTEM), Message("user", _QUESTION)),
    (*_EARLIER, Message("user", _QUESTION)),
)
"""What is laid out in both ways; a template that refuses one of them is not asked for it."""


def template_problems(trained: PreTrainedTokenizerBase, used: PreTrainedTokenizerBase) -> list[str]:
    """Say how the prompts that generation makes differ from those that training taught; an empty list is good.

    Args:
        trained: the tokenizer, with its chat template, that training used.
        used: the one that lies beside the result, which generation will use.
    """
    problems = []
    if trained.get_vocab() != used.get_vocab():
        problems.append("the tokenizer beside the result has another vocabulary than the one that training used")
    if trained.eos_token_id != used.eos_token_id:
        problems.append(f"generation stops at {used.eos_token}, training ended answers with {trained.eos_token}")
    for turns in CONVERSATIONS:
        taught = _taught(trained, turns)
        asked = None if taught is None else _asked(used, turns)
        if taught is not None and asked != taught:
            problems.append(f"training taught answers after {_tail(taught)}, generation asks with {_tail(asked)}")
            break
    return problems


def _taught(tokenizer: PreTrainedTokenizerBase, turns: tuple[Message, ...]) -> str | None:
    """Return what stands before the answer in a training document; None when the template refuses these turns."""
    answer = Message("assistant", _ANSWER, is_supervised=True)
    try:
        rendered = renderer_for(tokenizer).render(Conversation((*turns, answer), "probe"))
    except InputError:
        return None
    return rendered.text[: rendered.spans[-1][0]] if rendered.spans else None


def _asked(tokenizer: PreTrainedTokenizerBase, turns: tuple[Message, ...]) -> str | None:
    """Return what generation puts before the answer; None when the template refuses these turns."""
    if not tokenizer.chat_template:
        return _taught(tokenizer, turns)
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, date_string=DATE)
        )
    except (TemplateError, ValueError, TypeError):
        return None


def _tail(text: str | None, characters: int = 60) -> str:
    return "nothing, for its template refuses these turns" if text is None else repr(text[-characters:])
