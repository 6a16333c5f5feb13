"""Where records come from: a file, a folder, a data set of the Hugging Face hub, or "stdlib"."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from tunewise.errors import InputError, MissingBackend
from tunewise.workload.places import user_path
from tunewise.workload.record import Record
from tunewise.workload.record_files import KNOWN_SUFFIXES, TEXT_SUFFIXES, kind_of, read_file
from tunewise.workload.stdlib_source import stdlib_records

STDLIB = "stdlib"

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def read_records(source: str, max_records: int | None = None) -> Iterator[Record]:
    """Yield the records of `source` lazily and in a fixed order, at most `max_records` of them.

    Args:
        source: a file (JSONL, JSON, CSV, TSV, Parquet, text; also `.gz`), a folder of such files of one kind,
            the id "owner/name" of a hub data set (its split "train"; only when no such path exists), or
            "stdlib" (the instruction records of the Python standard library).
        max_records: stop after so many.

    Raises:
        InputError: nothing there, or not readable; names the file and the line, row or byte.
        MissingBackend: pyarrow or datasets is needed and not installed.
    """
    return itertools.islice(_all_records(source), max_records)


def _all_records(source: str) -> Iterator[Record]:
    if source == STDLIB:
        return stdlib_records("train")
    path = user_path(source)
    if path.is_dir():
        return _folder(path)
    if path.exists():
        return read_file(path)
    if _HUB_ID.fullmatch(source) and kind_of(path) not in KNOWN_SUFFIXES and not path.parent.exists():
        return _hub(source)
    raise _missing(path)


def source_files(source: str) -> list[tuple[Path, str]] | None:
    """Return the files of a source in the order of reading, each with the name that it has in origins.

    None where records do not come from files: "stdlib", a hub's data set, or nothing at all.

    Raises:
        InputError: a folder cannot be read or is no folder of data.
    """
    path = user_path(source)
    if source == STDLIB or not path.exists():
        return None
    return _files_of(path) if path.is_dir() else [(path, path.name)]


def _folder(folder: Path) -> Iterator[Record]:
    for path, name in _files_of(folder):
        yield from read_file(path, name)


def _files_of(folder: Path) -> list[tuple[Path, str]]:
    try:
        paths = sorted(path for path in folder.rglob("*") if path.is_file() and kind_of(path) in KNOWN_SUFFIXES)
        next(folder.iterdir(), None)  # rglob passes over a folder that may not be read
    except OSError as error:
        raise InputError(f"{folder}: the folder cannot be read: {error.strerror or error}.") from None
    if not paths:
        raise InputError(f"{folder}: no data files in this folder. Known endings: {', '.join(KNOWN_SUFFIXES)}.")
    kinds = {"text" if kind_of(path) in TEXT_SUFFIXES else kind_of(path) for path in paths}
    if len(kinds) > 1:
        raise InputError(f"{folder}: the folder mixes kinds of files ({', '.join(sorted(kinds))}). Name one file.")
    return [(path, path.relative_to(folder).as_posix()) for path in paths]


def _missing(path: Path) -> InputError:
    try:
        names = [other.name for other in path.parent.iterdir()]
    except OSError:
        return InputError(f"{path}: there is no such file, nor the folder {path.parent}.")
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    hint = f" Did you mean '{path.parent / near[0]}'?" if near else f" Looked in {path.parent.resolve()}."
    return InputError(f"{path}: there is no such file or folder.{hint}")


def _hub(source: str) -> Iterator[Record]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise MissingBackend("datasets", f"Reading the hub data set '{source}' (no such path exists)", "hub") from None
    try:
        for number, fields in enumerate(load_dataset(source, split="train", streaming=True)):
            yield Record(dict(fields), f"{source}[{number}]")
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"'{source}' is no path here, and as a hub data set (split 'train') it cannot be read: {error}"
        ) from None
