"""The general text that stays fixed: what the model could do before it was fine-tuned.

The user's own file or folder, or by default the part of Python's standard library that neither the embedded model's
training nor the data set "stdlib" uses: documentation strings as prose, modules as code.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from tunewise.errors import InputError
from tunewise.recipe import QualitySpec
from tunewise.workload.conversation import Document, PlainText
from tunewise.workload.corpus import Corpus
from tunewise.workload.detection import find_mapping
from tunewise.workload.record import Record
from tunewise.workload.records import read_records
from tunewise.workload.stdlib_source import stdlib_texts
from tunewise.workload.tokens import tokenize

WINDOW_TOKENS = 128
"""Tokens of one document: short ones give more independent pieces for the same work."""

MOST_TOKENS = 32768
MOST_DOMAINS = 8
_LEAST_WINDOW = 16
_LEAST_PROSE_CHARACTERS = 200
_FEWEST_TEXTS = 8
_MOST_CHARACTERS = 10_000
_SAMPLE_RECORDS = 100


@dataclass(frozen=True, eq=False)
class GeneralText:
    """Windows of a text, and what kind of text each is of.

    Attributes:
        corpus: N windows of which every token but the first is predicted.
        domains: N names ("prose", "code", or the user's files).
        source: for people.
    """

    corpus: Corpus
    domains: tuple[str, ...]
    source: str

    def mixed(self) -> GeneralText:
        """Return the same windows in an order of which every beginning has all domains alike, drawn at random."""
        drawn = np.random.default_rng(0).permutation(len(self.domains))
        seen: dict[str, int] = {}
        places = []
        for number in drawn:
            domain = self.domains[number]
            seen[domain] = seen.get(domain, 0) + 1
            places.append((seen[domain], int(number)))
        order = [number for _, number in sorted(places, key=lambda place: place[0])]
        return replace(self, corpus=self.corpus.take(order), domains=tuple(self.domains[number] for number in order))


def general_text(spec: QualitySpec, tokenizer: PreTrainedTokenizerBase, context: int, num_tokens: int) -> GeneralText:
    """Return about `num_tokens` tokens of the general text, the same for the same arguments.

    Args:
        spec: whose `general_text` names the user's own, or is None.
        tokenizer: the model's.
        context: the most positions that the model knows.
        num_tokens: how many tokens, at most `MOST_TOKENS`; at least one window of each domain is taken.

    Raises:
        InputError: the user's text cannot be read, or is too short for a single window.
    """
    wanted = min(num_tokens, MOST_TOKENS)
    named: dict[str, Iterator[Document]]
    if spec.general_text is None:
        enough = 2 * max(_FEWEST_TEXTS, wanted // WINDOW_TOKENS)  # some have no prose
        modules = list(itertools.islice(stdlib_texts("validation"), enough))
        named = {"prose": _prose(modules), "code": _code(modules)}
        source = "the standard library's held-out part"
    else:
        named, source = _own(spec.general_text), spec.general_text
    window = min(WINDOW_TOKENS, context)
    each = max(1, round(wanted / len(named) / window))
    corpora = {domain: _windows(texts, tokenizer, window, each) for domain, texts in named.items()}
    documents: list[tuple[NDArray[np.int32], NDArray[np.bool_]]] = []
    domains: list[str] = []
    for domain, corpus in corpora.items():
        documents += [corpus.document(index) for index in range(len(corpus))]
        domains += [domain] * len(corpus)
    if not documents:
        raise InputError(f"quality.general_text: {source} has no text of {_LEAST_WINDOW} tokens.")
    return GeneralText(Corpus.from_documents(documents, domains), tuple(domains), source)


def _own(source: str) -> dict[str, Iterator[Document]]:
    """Read the user's text; each file of a folder is a domain of its own, unless there are too many."""
    records = read_records(source)
    sample = list(itertools.islice(records, _SAMPLE_RECORDS))
    if not sample:
        raise InputError(f"quality.general_text: {source} has no records.")
    mapping = find_mapping(sample, "auto", {})
    texts: dict[str, list[Document]] = {}
    for record in itertools.chain(sample, records):
        texts.setdefault(_file_of(record.origin), []).append(mapping.convert(record))
    if len(texts) > MOST_DOMAINS:
        texts = {"text": [text for each in texts.values() for text in each]}
    return {domain: iter(documents) for domain, documents in texts.items()}


def _file_of(origin: str) -> str:
    """Return the file in "notes.jsonl:17", "notes.json[3]" and "notes.csv row 2"."""
    return origin.split(" row ")[0].split("[")[0].rsplit(":", 1)[0]


def _code(modules: list[Record]) -> Iterator[Document]:
    """Yield the beginnings of the held-out modules."""
    for record in modules:
        yield PlainText(record.fields["text"][:_MOST_CHARACTERS], record.origin)


def _prose(modules: list[Record]) -> Iterator[Document]:
    """Yield the longer documentation strings of the held-out modules, a module's together."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for record in modules:
        tree = ast.parse(record.fields["text"])
        found = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
        text = "\n\n".join(string for string in found if len(string) >= _LEAST_PROSE_CHARACTERS)
        if text:
            yield PlainText(text[:_MOST_CHARACTERS], record.origin)


def _windows(texts: Iterator[Document], tokenizer: PreTrainedTokenizerBase, window: int, num_windows: int) -> Corpus:
    """Return `num_windows` windows, drawn from as many texts."""
    some = itertools.islice(texts, max(_FEWEST_TEXTS, num_windows))
    corpus = tokenize(some, tokenizer, objective="continue", max_length=window, too_long="split").corpus
    long_enough = np.flatnonzero(corpus.lengths >= min(_LEAST_WINDOW, window))
    drawn = np.random.default_rng(0).permutation(long_enough)[:num_windows]
    return corpus.take(np.sort(drawn))
