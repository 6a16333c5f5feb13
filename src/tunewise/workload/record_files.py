"""Reads the records of one file: JSON Lines, JSON, CSV, Parquet and plain text, each also as `.gz`.

Files are read lazily (JSON excepted: its text, not its objects, is held), and every complaint names the file
and the line, row or byte.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from tunewise.errors import InputError, MissingBackend
from tunewise.workload.record import Record

_GZIP_MAGIC = b"\x1f\x8b"
_PARQUET_MAGIC = b"PAR1"
_LONGEST_CSV_FIELD = 2**31 - 1


def read_file(path: Path, name: str | None = None) -> Iterator[Record]:
    """Yield the records of one file; `name` stands for the file in origins (default: the file's own name).

    Raises:
        InputError: the ending is unknown or the content is not what the ending says.
        MissingBackend: Parquet without pyarrow.
    """
    reader = _READERS.get(kind_of(path))
    if reader is None:
        raise InputError(f"{path}: cannot read files that end in '{path.suffix}'. Known: {', '.join(KNOWN_SUFFIXES)}.")
    yield from reader(path, name or path.name)


def kind_of(path: Path) -> str:
    """Return the ending that decides how a file is read, in lower case, without `.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _opened(path: Path) -> BinaryIO:
    """Open a file for reading bytes, unzipped; an ending that contradicts the first bytes is an error."""
    try:
        with path.open("rb") as stream:
            magic = stream.read(4)
        if not magic:
            raise InputError(f"{path}: the file is empty.")
        is_gzip = magic.startswith(_GZIP_MAGIC)
        if path.suffix.lower() == ".gz":
            if not is_gzip:
                raise InputError(f"{path}: ends in .gz but is not gzip-compressed. Rename it without .gz.")
            return cast(BinaryIO, gzip.open(path, "rb"))
        if is_gzip:
            raise InputError(f"{path}: is gzip-compressed but does not end in .gz. Rename it to {path.name}.gz.")
        if magic == _PARQUET_MAGIC:
            raise InputError(f"{path}: is a Parquet file. Rename it to {path.stem}.parquet.")
        return path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}.") from None


def _lines(path: Path) -> Iterator[str]:
    """Yield decoded lines with their line ends; a byte order mark at the start is dropped."""
    offset, number = 0, 0
    with _opened(path) as stream:
        while True:
            line = _read(path, stream.readline, f"after line {number}")
            if not line:
                return
            number += 1
            yield _decoded(line, path, number, offset)
            offset += len(line)


def _text(path: Path) -> str:
    with _opened(path) as stream:
        content = _read(path, stream.read, "before its end")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _not_utf8(path, line, error.start, content[error.start]) from None


def _read(path: Path, read: Callable[[], bytes], where: str) -> bytes:
    try:
        return read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(
            f"{path}: the gzip data are damaged or cut off {where} ({error}). Get the file again."
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read {where}: {error.strerror or error}.") from None


def _decoded(line: bytes, path: Path, number: int, offset: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, number, offset + error.start, line[error.start]) from None


def _not_utf8(path: Path, line: int, offset: int, byte: int) -> InputError:
    return InputError(
        f"{path}:{line}: byte 0x{byte:02x} at offset {offset} is not UTF-8. "
        f"Convert the file, for example: iconv -f LATIN1 -t UTF-8 {path.name}"
    )


def _json_lines(path: Path, name: str) -> Iterator[Record]:
    found = False
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        found = True
        try:
            value = json.loads(line.rstrip(), object_pairs_hook=_unrepeated)
        except (json.JSONDecodeError, RecursionError) as error:
            column = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            hint = " A JSON array over several lines belongs in a file that ends in .json." if number == 1 else ""
            raise InputError(f"{path}:{number}{column}: the line is not JSON: {reason}.{hint}") from None
        except _RepeatedField as error:
            raise InputError(f"{path}:{number}: {error}") from None
        yield Record(_object(value, f"{path}:{number}", number == 1), f"{name}:{number}")
    if not found:
        raise InputError(f"{path}: the file has only blank lines.")


class _RepeatedField(Exception):
    """A JSON object has a field twice, of which Python would keep the last one without a word."""


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _RepeatedField(f"the record has the field '{twice}' twice. Keep one of them.")
    return fields


def _object(value: Any, place: str, is_first: bool = False) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    hint = " A whole JSON array belongs in a file that ends in .json." if is_first and isinstance(value, list) else ""
    raise InputError(f"{place}: a record must be a JSON object with named fields, not {_json_type(value)}.{hint}")


def _json_type(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _json(path: Path, name: str) -> Iterator[Record]:
    """Read a JSON array, an object that has exactly one list, or (a common misnomer) JSON Lines named
    `.json`."""
    text = _text(path)
    if not text.strip():
        raise InputError(f"{path}: the file has only blank lines.")
    if text.lstrip()[0] == "[":
        yield from _array_items(text, path, name)
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _json_lines(path, name)
            return
        raise _broken_json(path, error) from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply to hold records.") from None
    lists = {key: item for key, item in _object(value, str(path)).items() if isinstance(item, list)}
    if len(lists) != 1:
        listed = f"lists: {', '.join(lists)}" if lists else f"fields: {', '.join(value)}"
        raise InputError(
            f"{path}: a JSON file must be an array of records, or an object with exactly one list of them ({listed})."
        )
    for key, items in lists.items():
        if not items:
            raise InputError(f"{path}: the list '{key}' is empty.")
        for index, item in enumerate(items):
            yield Record(_object(item, f"{path} {key}[{index}]"), f"{name} {key}[{index}]")


def _array_items(text: str, path: Path, name: str) -> Iterator[Record]:
    """Yield the objects of an array one after another, so that only one exists at a time."""
    decoder = json.JSONDecoder(object_pairs_hook=_unrepeated)
    position, index = _skip_blanks(text, text.index("[") + 1), 0
    if text[position : position + 1] == "]":
        raise InputError(f"{path}: the array is empty.")
    while True:
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise _broken_json(path, error, f"[{index}]") from None
        except _RepeatedField as error:
            raise InputError(f"{path}[{index}]: {error}") from None
        except RecursionError:
            raise InputError(f"{path}[{index}]: nested too deeply to be a record.") from None
        yield Record(_object(value, f"{path}[{index}]"), f"{name}[{index}]")
        position = _skip_blanks(text, position)
        mark = text[position : position + 1]
        if mark not in (",", "]"):
            raise _broken_json(path, json.JSONDecodeError("Expecting ',' or ']'", text, position), f"[{index}]")
        position, index = _skip_blanks(text, position + 1), index + 1
        if mark == "]":
            if position < len(text):
                raise _broken_json(path, json.JSONDecodeError("text after the array's end", text, position))
            return


def _skip_blanks(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _broken_json(path: Path, error: json.JSONDecodeError, item: str = "") -> InputError:
    return InputError(f"{path}{item}: not JSON at line {error.lineno}, column {error.colno}: {error.msg}.")


def _csv(path: Path, name: str) -> Iterator[Record]:
    csv.field_size_limit(_LONGEST_CSV_FIELD)  # the default of 131072 characters refuses long documents
    delimiter = "\t" if kind_of(path) == ".tsv" else ","
    rows = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    number = 0
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise InputError(f"{path}: line {rows.line_num}: not CSV: {error}.") from None
        if row is None:
            break
        if header is None:
            header = _checked_header(row, path, delimiter)
            continue
        if not row:
            continue
        number += 1
        if len(row) != len(header):
            raise InputError(
                f"{path}: row {number} (line {rows.line_num}) has {len(row)} columns, the header has "
                f"{len(header)} ({', '.join(header)}). Quote fields that contain '{delimiter}' or a line end."
            )
        yield Record(dict(zip(header, row, strict=True)), f"{name} row {number}")
    if number == 0:
        raise InputError(f"{path}: the file has no rows after its header.")


def _checked_header(row: list[str], path: Path, delimiter: str) -> list[str]:
    header = [column.strip() for column in row]
    if len(header) == 1 and any(other in header[0] for other in (";", "\t")):
        raise InputError(f"{path}: line 1: columns are separated by ';' or tabs. Use ',' in .csv and tabs in .tsv.")
    repeated = sorted({column for column in header if header.count(column) > 1})
    if repeated or "" in header:
        what = f"the column '{repeated[0]}' twice" if repeated and repeated[0] else "a column without a name"
        raise InputError(f"{path}: line 1: the header has {what}. Columns, split at {delimiter!r}: {header}.")
    return header


def _parquet(path: Path, name: str) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise MissingBackend("pyarrow", f"Reading {path}", "parquet") from None
    if path.suffix.lower() == ".gz":
        raise InputError(f"{path}: Parquet is compressed inside already; unzip it first: gunzip {path.name}")
    number = 0
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1000):
                for fields in batch.to_pylist():
                    number += 1
                    yield Record(fields, f"{name} row {number}")
    except (ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file (after row {number}): {error}") from None
    if number == 0:
        raise InputError(f"{path}: the file has no rows.")


def _plain_text(path: Path, name: str) -> Iterator[Record]:
    text = _text(path)
    if not text.strip():
        raise InputError(f"{path}: the file has only blank lines.")
    yield Record({"text": text}, name)


_READERS: dict[str, Callable[[Path, str], Iterator[Record]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".txt": _plain_text,
    ".md": _plain_text,
}

KNOWN_SUFFIXES = tuple(_READERS)
TEXT_SUFFIXES = (".txt", ".md")
