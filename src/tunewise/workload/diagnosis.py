"""The doctor's answer as values: findings, statistics, and a preview of what is learnt."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from tunewise.units import format_count
from tunewise.workload.corpus import Corpus
from tunewise.workload.tokens import Tokenized

Severity = Literal["error", "warning", "info"]

QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong or worth knowing.

    Attributes:
        severity: "error" (training makes no sense), "warning" (it will suffer) or "info".
        what: what was found, in words.
        count: how many records or tokens it concerns.
        origins: at most five places.
        advice: what to do.
    """

    severity: Severity
    what: str
    count: int
    origins: tuple[str, ...] = ()
    advice: str = ""

    def __str__(self) -> str:
        places = f" (first: {', '.join(self.origins)})" if self.origins else ""
        advice = f" {self.advice}" if self.advice else ""
        return f"{self.severity}: {self.what}: {self.count}{places}.{advice}"


@dataclass(frozen=True)
class Statistics:
    """The data in numbers.

    Attributes:
        records: records read.
        documents: documents to train on (windows of split texts count each).
        tokens: their tokens.
        supervised_tokens: those of them that are learnt.
        length_quantiles: (share, tokens) of document lengths, from the shortest to the longest.
        share_cut: the share of all tokens read that cutting and dropping took away.
    """

    records: int
    documents: int
    tokens: int
    supervised_tokens: int
    length_quantiles: tuple[tuple[float, int], ...]
    share_cut: float

    def __str__(self) -> str:
        lengths = ", ".join(f"{share:.0%} {tokens}" for share, tokens in self.length_quantiles)
        return (
            f"{self.records} records, {self.documents} documents, {format_count(self.tokens)} tokens, "
            f"{format_count(self.supervised_tokens)} of them learnt; lengths: {lengths}; "
            f"{self.share_cut:.2%} of the tokens cut"
        )


@dataclass(frozen=True)
class Diagnosis:
    """Findings, worst first, and statistics."""

    findings: tuple[Finding, ...]
    statistics: Statistics

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings with which training makes no sense."""
        return tuple(finding for finding in self.findings if finding.severity == "error")


def statistics_of(data: Tokenized) -> Statistics:
    """Return the data in numbers."""
    lengths = data.corpus.lengths
    shares = QUANTILES if len(lengths) else ()
    return Statistics(
        records=data.num_records,
        documents=len(data.corpus),
        tokens=len(data.corpus.token_ids),
        supervised_tokens=int(data.corpus.is_supervised.sum()),
        length_quantiles=tuple((share, int(np.quantile(lengths, share, method="inverted_cdf"))) for share in shares),
        share_cut=data.num_tokens_cut / max(1, data.num_tokens_read),
    )


def preview(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, index: int) -> list[tuple[str, bool]]:
    """Return a document's text in pieces, each with whether it is learnt; special tokens are spelt out.

    The pieces, joined, are the decoded document, unless a piece ends within a character.
    """
    ids, marks = corpus.document(index)
    borders = [0, *(np.flatnonzero(np.diff(marks)) + 1).tolist(), len(ids)]
    pieces = []
    before = ""
    for start, end in itertools.pairwise(borders):
        text = str(tokenizer.decode(ids[:end].tolist(), clean_up_tokenization_spaces=False))
        piece = text[len(before) :] if text.startswith(before) else str(tokenizer.decode(ids[start:end].tolist()))
        pieces.append((piece, bool(marks[start])))
        before = text
    return pieces
