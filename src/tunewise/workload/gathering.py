"""Records in chunks, each made into tokens by itself: on one core, or in a forked process for each core.

Chunks come back in their order, so what results, and which error comes first, does not depend on the number of
processes. No more chunks are on their way than processes can take, and what has come back is appended to flat arrays,
so memory does not grow with the number of records.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from tunewise.workload.corpus import Corpus, Origins
from tunewise.workload.flat import Growing
from tunewise.workload.record import Record
from tunewise.workload.tally import Tally
from tunewise.workload.tokens import Tokenized

CHUNK_RECORDS = 2000

SERIAL_CHUNKS = 2
"""So many chunks are worked on here; what has more is worth a pool of processes (a tenth of a second to fork)."""

MOST_PROCESSES = 16
"""Reading and gathering, which this process does, keeps no more of them busy."""

Work = Callable[[Sequence[Record], int], Tokenized]
"""From some records and the number of the first one to their documents."""


def tokenized(records: Iterable[Record], work: Work) -> Tokenized:
    """Return the documents of all records.

    Raises:
        InputError: reading or `work` raises it; the error of the earliest record.
    """
    gathering = _Gathering()
    for part in _parts(_chunks(records), work):
        gathering.add(part)
    return gathering.tokenized()


def _chunks(records: Iterable[Record]) -> Iterator[tuple[list[Record], int]]:
    """Yield chunks and the number of their first record; where reading fails, first what was read before."""
    iterator, first = iter(records), 0
    failure: Exception | None = None
    while failure is None:
        chunk: list[Record] = []
        try:
            chunk.extend(itertools.islice(iterator, CHUNK_RECORDS))
        except Exception as error:  # of reading, whatever it is: raised below, behind what was read before it
            failure = error
        if not chunk:
            break
        yield chunk, first
        first += len(chunk)
    if failure is not None:
        raise failure


def _parts(chunks: Iterator[tuple[list[Record], int]], work: Work) -> Iterator[Tokenized]:
    """Yield what `work` makes of each chunk."""
    for chunk, first in itertools.islice(chunks, SERIAL_CHUNKS):
        yield work(chunk, first)
    count = min(num_cores(), MOST_PROCESSES)
    if count < 2 or not _can_fork():
        for chunk, first in chunks:
            yield work(chunk, first)
        return
    head = next(chunks, None)
    if head is None:
        return
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("fork"), initializer=_begin, initargs=(work,))
    try:
        yield from _parts_of_pool(pool, 2 * count, itertools.chain([head], chunks), work)
    finally:
        pool.shutdown(cancel_futures=True)


def _parts_of_pool(
    pool: ProcessPoolExecutor, most_waiting: int, chunks: Iterator[tuple[list[Record], int]], work: Work
) -> Iterator[Tokenized]:
    """Yield what the pool's processes make of each chunk; what they cannot do, because one was ended, is done here."""
    waiting: deque[tuple[tuple[list[Record], int], Future[Tokenized] | None]] = deque()
    failure: Exception | None = None
    while True:
        while failure is None and len(waiting) < most_waiting:
            try:
                chunk = next(chunks, None)
            except Exception as error:  # of reading: what stands before it comes first, with errors of its own
                failure = error
                break
            if chunk is None:
                break
            try:
                waiting.append((chunk, pool.submit(_run, *chunk)))
            except BrokenProcessPool:
                waiting.append((chunk, None))
        if not waiting:
            break
        given, future = waiting.popleft()
        try:
            part = work(*given) if future is None else future.result()
        except BrokenProcessPool:
            part = work(*given)
        yield part
    if failure is not None:
        raise failure


_work: Work | None = None


def _begin(work: Work) -> None:
    """Take the work over by the fork; leave Ctrl-C to the process that asked, and start no threads."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _run(records: list[Record], first: int) -> Tokenized:
    assert _work is not None, "the pool was begun"
    return _work(records, first)


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _can_fork() -> bool:
    """Say whether processes can be forked and have not to fear what CUDA has started in this one."""
    torch = sys.modules.get("torch")
    return "fork" in multiprocessing.get_all_start_methods() and not (torch and torch.cuda.is_initialized())


class _Gathering:
    """Appends parts to flat arrays."""

    def __init__(self) -> None:
        self._ids, self._marks = Growing(np.int32), Growing(np.bool_)
        self._lengths, self._records = Growing(np.int64), Growing(np.int64)
        self._keys = [Growing(np.uint64) for _ in range(3)]
        self._places, self._place_lengths = Growing(np.uint8), Growing(np.int64)
        self._tally = Tally()
        self._counts = [0, 0, 0]

    def add(self, part: Tokenized) -> None:
        self._ids.add(part.corpus.token_ids)
        self._marks.add(part.corpus.is_supervised)
        self._lengths.add(part.corpus.lengths)
        self._records.add(part.record_numbers)
        for growing, keys in zip(self._keys, (part.content_keys, part.prompt_keys, part.token_keys), strict=True):
            growing.add(keys)
        origins = Origins.of(part.corpus.origins)
        self._places.add(origins.text)
        self._place_lengths.add(np.diff(origins.offsets))
        self._tally.merge(part.tally)
        counts = (part.num_records, part.num_tokens_read, part.num_tokens_cut)
        self._counts = [old + new for old, new in zip(self._counts, counts, strict=True)]

    def tokenized(self) -> Tokenized:
        content_keys, prompt_keys, token_keys = (growing.array() for growing in self._keys)
        origins = Origins(self._places.array(), _offsets(self._place_lengths))
        corpus = Corpus(self._ids.array(), self._marks.array(), _offsets(self._lengths), origins)
        return Tokenized(
            corpus=corpus,
            record_numbers=self._records.array(),
            content_keys=content_keys,
            prompt_keys=prompt_keys,
            token_keys=token_keys,
            num_records=self._counts[0],
            num_tokens_read=self._counts[1],
            num_tokens_cut=self._counts[2],
            tally=self._tally,
        )


def _offsets(lengths: Growing) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(lengths.array())))
