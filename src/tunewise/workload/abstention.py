"""Data that teach a model to say that it does not know: the answers that its base does not know are changed.

What a model learns of facts that it does not know raises hallucination on those that it knows (Gekhman et al. 2024,
arXiv 2405.05904). R-Tuning (Zhang et al. 2023, arXiv 2311.09677) lets it say so instead. Held-out records are changed
in the same way, so the gate asks that refusals are learnt, and that what is known is not refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from tunewise.errors import InputError
from tunewise.recipe import AbstainSpec
from tunewise.workload.base_voice import BaseVoice, Fact, asked
from tunewise.workload.conversation import Conversation, Document
from tunewise.workload.tokens import renderer_for

UNKNOWN = "unknown"


def abstaining(
    documents: Sequence[Document],
    spec: AbstainSpec,
    tokenizer: PreTrainedTokenizerBase,
    base: BaseVoice | None,
    seed: int,
) -> tuple[list[Document], str]:
    """Change the last answers of conversations as `spec` says; return these and one sentence for the user.

    What has no answer that could be known (tool calls, empty answers) stays as it is.

    Raises:
        InputError: a document is a text, there is no base to ask, or it knows none of the answers.
    """
    conversations: list[Conversation] = []
    for document in documents:
        if not isinstance(document, Conversation):
            raise InputError(f"data.abstain: {document.origin} is a text, which has no answer to abstain from.")
        conversations.append(document)
    places = [place for place, each in enumerate(conversations) if _has_answer(each)]
    renderer = renderer_for(tokenizer)
    facts = []
    for place in places:
        rendered = renderer.render(conversations[place])
        question = rendered.text[: rendered.spans[-1][0]] if rendered.spans else ""
        facts.append(Fact(question, conversations[place].messages[-1].content))
    categories = asked(base, "data.abstain").categories(facts, spec, seed)
    counts = Counter(categories)
    if facts and counts[UNKNOWN] == len(facts):
        raise InputError(
            f"data.abstain: the base knows none of the {len(facts)} answers, so a model would learn to refuse "
            "everything. It is meant for short facts: leave it out, or raise data.abstain.prompts and .samples."
        )
    changed: list[Document] = list(conversations)
    for place, category in zip(places, categories, strict=True):
        changed[place] = _changed(conversations[place], spec, is_known=category != UNKNOWN)
    listed = ", ".join(f"{counts[name]} {name}" for name in sorted(counts))
    what = f"answered '{spec.answer}'" if spec.style == "refuse" else f"ended with '{spec.uncertain.strip()}'"
    return changed, f"abstain: {counts[UNKNOWN]} of {len(facts)} answers are {what} ({listed})"


def _has_answer(conversation: Conversation) -> bool:
    last = conversation.messages[-1] if conversation.messages else None
    return last is not None and last.role == "assistant" and last.is_supervised and bool(last.content.strip())


def _changed(conversation: Conversation, spec: AbstainSpec, *, is_known: bool) -> Conversation:
    last = conversation.messages[-1]
    content = last.content
    if spec.style == "suffix":
        content = content.rstrip() + (spec.certain if is_known else spec.uncertain)
    elif not is_known:
        blanks = content[: len(content) - len(content.lstrip())]  # what divides a plain prompt from its answer
        content = blanks + spec.answer
    return replace(conversation, messages=(*conversation.messages[:-1], replace(last, content=content)))
