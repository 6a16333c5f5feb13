"""The general text: what a base model could do before, measured so that it is not forgotten, and replayed against that.

A source is a file (or anything else that `data.source` may be) or "default": the source text of this machine's Python
standard library, which is prose and code. Two parts of it never meet: what is *replayed* is mixed into the training,
what is *measured* is not, or the measure would only show that the replayed text was learnt by heart. Of the default,
the files that the embedded model was pre-trained on are replayed, and files that it never saw are measured; anything
else is divided by a hash of its content, in documents or, where there are few of them, in blocks.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from tunewise.errors import InputError
from tunewise.workload.conversation import Document, PlainText
from tunewise.workload.corpus import Corpus
from tunewise.workload.detection import find_mapping
from tunewise.workload.record import Record
from tunewise.workload.records import read_records
from tunewise.workload.stdlib_source import stdlib_texts
from tunewise.workload.tokens import tokenize

DEFAULT = "default"

Use = Literal["replayed", "measured"]

MEASURED_BUCKETS = 2
"""Of ten parts of a text that is not the default, how many are measured and never replayed."""

CHARACTERS_FOR_A_TOKEN = 50
"""How much of the default text is read for each token that is wanted: what is drawn is then a tenth or less of it."""

FEW_DOCUMENTS = 20
BLOCK_CHARACTERS = 2000
"""A text of fewer documents is divided by blocks of so many characters."""

_NUM_BUCKETS = 10
_SAMPLE_RECORDS = 100


def general_corpus(
    source: str, use: Use, tokenizer: PreTrainedTokenizerBase, *, max_length: int, max_tokens: int, seed: int = 0
) -> Corpus:
    """Return about `max_tokens` tokens of general text, drawn at random, every token supervised.

    Args:
        source: "default" or what `data.source` may be.
        use: which of the two parts.
        tokenizer: the model's.
        max_length: longer texts are cut into windows of so many tokens.
        max_tokens: the last window is shortened so that not one supervised token more comes out; fewer come out where
            the text has no more.
        seed: of the draw.

    Raises:
        InputError: the source cannot be read, or this part of it is empty.
    """
    if source == DEFAULT:
        records = _enough(stdlib_texts("train" if use == "replayed" else "validation", seed), max_tokens)
    else:
        records = read_records(source)
    sample = list(itertools.islice(records, _SAMPLE_RECORDS))
    if not sample:
        raise InputError(f"general text '{source}': there are no records.")
    mapping = find_mapping(sample, "auto", {})
    documents = [mapping.convert(record) for record in itertools.chain(sample, records)]
    if source != DEFAULT:
        documents = part_of(documents, use)
    whole = tokenize(documents, tokenizer, objective="continue", max_length=max_length, too_long="split").corpus
    if len(whole) == 0:
        raise InputError(
            f"general text '{source}': it is too short to be divided into a part that is replayed and one that is "
            "measured. Bring more text, or use: default."
        )
    return first_tokens(whole, np.random.default_rng(seed).permutation(len(whole)), max_tokens)


def part_of(documents: Sequence[Document], use: Use) -> list[Document]:
    """Return the part of a text that may be used so, decided by content: whatever windows are cut later never meet."""
    if len(documents) < FEW_DOCUMENTS:
        documents = [block for document in documents for block in _blocks(document)]
    return [
        document for document in documents if (_bucket(document.content_key) < MEASURED_BUCKETS) == (use == "measured")
    ]


def _blocks(document: Document) -> list[Document]:
    """Cut a long text into blocks: one book is a single record."""
    if not isinstance(document, PlainText):
        return [document]
    starts = range(0, len(document.text), BLOCK_CHARACTERS)
    return [PlainText(document.text[start : start + BLOCK_CHARACTERS], document.origin) for start in starts]


def _enough(texts: Iterator[Record], max_tokens: int) -> Iterator[Record]:
    """Yield texts until they hold far more than `max_tokens` tokens, so that reading stops before the library ends."""
    characters = 0
    for record in texts:
        yield record
        characters += len(record.fields["text"])
        if characters > CHARACTERS_FOR_A_TOKEN * max_tokens:
            return


def first_tokens(corpus: Corpus, order: NDArray[np.int64], max_tokens: int) -> Corpus:
    """Take documents in `order` until they hold `max_tokens` supervised tokens; the last one is cut to fit."""
    left, documents, origins = max_tokens, [], []
    for index in order:
        ids, marks = corpus.document(int(index))
        if left < 1:
            break
        end = 2 + int(np.searchsorted(np.cumsum(marks[1:]), left))  # the first token of a document is no target
        ids, marks = ids[:end], marks[:end]
        documents.append((ids, marks))
        origins.append(corpus.origins[int(index)])
        left -= int(marks[1:].sum())
    return Corpus.from_documents(documents, origins)


def _bucket(key: int) -> int:
    return int.from_bytes(hashlib.sha256(key.to_bytes(8, "big")).digest()[:8], "big") % _NUM_BUCKETS
