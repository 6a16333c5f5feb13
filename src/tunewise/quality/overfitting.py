"""Has the model learnt the task or its training records: the gap, exposure, and held-out documents seen in training.

gap        how much easier training documents are than held-out ones, beyond what they were before training
exposure   log2(N) - log2(rank) of a training record among N held-out ones, ranked by how far their loss fell
           (Carlini et al. 2019, arXiv 1802.08232, with held-out records in the place of made-up canaries)
leaks      held-out documents whose word sequences stand in a training document
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tunewise.quality.losses import DocumentLosses
from tunewise.quality.measured import Measured, Overfitting
from tunewise.quality.statistics import mean, rate
from tunewise.workload.corpus import Corpus

NGRAM_TOKENS = 13
"""Sequences that are compared; 13 is what GPT-3's decontamination took (Brown et al. 2020, arXiv 2005.14165, C)."""

LEAKED_SHARE = 0.8
"""A held-out document is leaked when so many of its sequences stand in training documents."""

_BOILERPLATE_DOCUMENTS = 3
_BOILERPLATE_SHARE = 0.01
_MIXER = 0x9E3779B97F4A7C15


def overfitting(
    base_train: DocumentLosses, train: DocumentLosses, base_held_out: DocumentLosses, held_out: DocumentLosses
) -> Overfitting:
    """Compare how far training documents and held-out ones fell."""
    fall_train, fall_held_out = base_train.sums - train.sums, base_held_out.sums - held_out.sums
    gap = _difference_of_means(fall_train, base_train.counts, fall_held_out, base_held_out.counts)
    exposures = exposure(fall_train / base_train.counts, fall_held_out / base_held_out.counts)
    return Overfitting(gap=gap, exposure=mean(exposures))


def exposure(train_N: NDArray[np.float64], held_out_M: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return each training record's exposure in bits, log2(M + 1) - log2(rank), from its fall in loss."""
    falling_M = np.sort(held_out_M)
    rank_N = 1 + len(falling_M) - np.searchsorted(falling_M, train_N, side="right")
    exposures: NDArray[np.float64] = np.log2(len(falling_M) + 1) - np.log2(rank_N)
    return exposures


def leaked_share(train: Corpus, held_out: Corpus) -> Measured:
    """Return the share of held-out documents that training has seen, word for word up to a few changes.

    A document counts when `LEAKED_SHARE` of its sequences of `NGRAM_TOKENS` tokens stand in training documents, or
    when it equals one. What many training documents share (a template, an instruction that
    never changes) does not count.
    """
    return rate(int(_is_leaked(train, held_out).sum()), len(held_out))


def _is_leaked(train: Corpus, held_out: Corpus) -> NDArray[np.bool_]:
    wanted = [_sequences(held_out.document(index)[0]) for index in range(len(held_out))]
    wholes_N = np.array([_whole(held_out.document(index)[0]) for index in range(len(held_out))], dtype=np.uint64)
    known = np.unique(np.concatenate([*wanted, np.empty(0, dtype=np.uint64)]))
    seen, whole_seen = np.zeros(len(known), dtype=np.int64), np.zeros(len(held_out), dtype=np.bool_)
    for index in range(len(train)):
        ids = train.document(index)[0]
        found = np.unique(_sequences(ids))
        places = np.searchsorted(known, found)
        places = places[places < len(known)]
        seen[places[np.isin(known[places], found)]] += 1
        whole_seen |= wholes_N == _whole(ids)
    most = max(_BOILERPLATE_DOCUMENTS, round(_BOILERPLATE_SHARE * len(train)))
    leaked = whole_seen.copy()
    for index, sequences in enumerate(wanted):
        times = seen[np.searchsorted(known, sequences)]
        own = times[times <= most]
        if len(own) > 0 and (own > 0).mean() >= LEAKED_SHARE:
            leaked[index] = True
    return leaked


def _sequences(ids: NDArray[np.int32]) -> NDArray[np.uint64]:
    """Return a hash of every sequence of `NGRAM_TOKENS` tokens."""
    if len(ids) < NGRAM_TOKENS:
        return np.empty(0, dtype=np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(ids.astype(np.uint64), NGRAM_TOKENS)
    return _hashed(windows)


def _whole(ids: NDArray[np.int32]) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "big"))


def _hashed(windows: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a 64-bit polynomial hash of each row (overflow wraps around, as it should)."""
    hashes = np.full(len(windows), windows.shape[1], dtype=np.uint64)
    with np.errstate(over="ignore"):
        for column in range(windows.shape[1]):
            hashes = (hashes ^ (windows[:, column] + np.uint64(1))) * np.uint64(_MIXER)
            hashes ^= hashes >> np.uint64(29)
    return hashes


def _difference_of_means(
    one: NDArray[np.float64], one_counts: NDArray[np.int64], other: NDArray[np.float64], other_counts: NDArray[np.int64]
) -> Measured:
    """Return the difference of two independent token means; intervals and floors add in squares."""
    first, second = mean(one, one_counts), mean(other, other_counts, seed=1)
    middle = first.middle - second.middle
    below = np.hypot(first.middle - first.low, second.high - second.middle)
    above = np.hypot(first.high - first.middle, second.middle - second.low)
    floor = float(np.hypot(first.noise_floor, second.noise_floor))
    return Measured(
        middle=middle,
        low=float(middle - below),
        high=float(middle + above),
        noise_floor=floor,
        num=min(first.num, second.num),
    )


def sample(num: int, wanted: int, seed: int = 0) -> Sequence[int]:
    """Return `wanted` of `num` documents, drawn once and for all, in file order."""
    if num <= wanted:
        return list(range(num))
    return sorted(int(index) for index in np.random.default_rng(seed).permutation(num)[:wanted])
