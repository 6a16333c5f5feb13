"""Prompts and reference answers out of tokenized documents: what stood before the last answer, and that answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from tunewise.workload.corpus import Corpus
from tunewise.workload.own_text import last_answer


@dataclass(frozen=True)
class Prompt:
    """What a model is asked: token ids as they stood in training, and the text of the answer that was expected."""

    ids: tuple[int, ...]
    reference: str
    origin: str


def prompts_of(corpus: Corpus, documents: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Return the prompts of those documents that have one (texts that are learnt as a whole have none)."""
    prompts = []
    for document in documents:
        ids, marks = corpus.document(document)
        start = last_answer(marks)
        if start <= 1:  # nothing, or BOS alone, stands before
            continue
        answer = [int(token) for token in ids[start:][marks[start:]]]
        reference = str(tokenizer.decode(answer, skip_special_tokens=True))
        prompts.append(Prompt(tuple(ids[:start].tolist()), reference, corpus.origins[document]))
    return prompts


def endings_of(corpus: Corpus, documents: Sequence[int], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Corpus:
    """Return the documents with nothing supervised but the token that must end their last answer.

    It is the special token that ends the answer in the data, or the tokenizer's EOS where the data have none; so it is
    asked for even where the training data never showed it. Documents that were cut have no end and are left out.
    """
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    found, origins = [], []
    for document in documents:
        ids, marks = corpus.document(document)
        if len(ids) >= max_length or not marks.any():
            continue
        end = int(np.flatnonzero(marks)[-1])
        if int(ids[end]) not in special:
            end += 1
            if end >= len(ids) or int(ids[end]) not in special:
                ids = np.concatenate((ids[:end], np.array([tokenizer.eos_token_id], dtype=ids.dtype)))
        wanted = np.zeros(end + 1, dtype=np.bool_)
        wanted[end] = True
        found.append((ids[: end + 1], wanted))
        origins.append(corpus.origins[document])
    return Corpus.from_documents(found, origins)


def share_of_taught_ends(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, max_length: int) -> float | None:
    """Return the share of documents, cut ones left out, whose last learnt token is a special one; None: no document."""
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    last = [
        int(ids[np.flatnonzero(marks)[-1]])
        for ids, marks in map(corpus.document, range(len(corpus)))
        if len(ids) < max_length and marks.any()
    ]
    return sum(token in special for token in last) / len(last) if last else None
