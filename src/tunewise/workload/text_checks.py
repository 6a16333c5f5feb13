"""Damage that only the text shows, before it becomes tokens: broken encodings, control and special tokens,
blanks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from transformers import PreTrainedTokenizerBase

from tunewise.workload.conversation import Conversation, Document
from tunewise.workload.tally import Event, Tally

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f]")  # tab, line ends and form feeds are ordinary
_MAYBE_MOJIBAKE = re.compile(r"[\u00c2-\u00f4][^\x00-\x7f]{1,3}")
_SHORTEST_SPECIAL_TOKEN = 3


def checked(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase | None, tally: Tally
) -> Iterator[Document]:
    """Pass documents on and count in `tally` what is wrong with their text; special tokens need a
    tokenizer."""
    names = [] if tokenizer is None else tokenizer.all_special_tokens
    long_names = [re.escape(name) for name in names if len(name) >= _SHORTEST_SPECIAL_TOKEN]
    special = re.compile("|".join(long_names)) if long_names else None
    for document in documents:
        for event in set(_events(document, special)):
            tally.add(event, document.origin)
        yield document


def _events(document: Document, special: re.Pattern[str] | None) -> Iterator[Event]:
    if isinstance(document, Conversation):
        texts = [message.content for message in document.messages]
        if not any(message.content.strip() for message in document.messages if message.role != "assistant"):
            yield Event.EMPTY_PROMPT
    else:
        texts = [document.text]
    for text in texts:
        if "\ufffd" in text:
            yield Event.REPLACEMENT_CHARACTER
        if _CONTROL.search(text):
            yield Event.CONTROL_CHARACTER
        if not text.isascii() and _is_mojibake(text):
            yield Event.MOJIBAKE
        if special is not None and special.search(text):
            yield Event.SPECIAL_TOKEN_IN_TEXT


def _is_mojibake(text: str) -> bool:
    """Whether a piece of the text is UTF-8 that was read as Windows-1252 or Latin-1 ("Ã©" for "é")."""
    for match in _MAYBE_MOJIBAKE.finditer(text):
        piece = match.group()
        for length in range(len(piece), 1, -1):
            for encoding in ("cp1252", "latin-1"):
                try:
                    piece[:length].encode(encoding).decode("utf-8")
                except UnicodeError:
                    continue
                return True
    return False
