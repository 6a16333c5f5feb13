"""The data set "stdlib": made at run time from the Python standard library of the machine that we run on.

It needs no network and no licence question: two kinds of records, instruction records (a function's signature
and docstring -> its body) and the plain source text of modules. A stable hash of a file's path decides what
it is for, so that pre-training, fine-tuning and validation never see the same file.
"""

from __future__ import annotations

import ast
import hashlib
import os
import random
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from tunewise.workload.record import Record

Part = Literal["train", "validation"]

PRETRAINING_BUCKETS = range(5)
FINE_TUNING_BUCKETS = range(5, 9)
VALIDATION_BUCKETS = range(9, 10)
_NUM_BUCKETS = 10

BODY_LINES = range(2, 41)
MAX_PROMPT_CHARACTERS = 1500
MAX_BODY_CHARACTERS = 2000

_LEFT_OUT_FOLDERS = frozenset(
    (
        *("test", "tests", "idle_test", "idlelib", "turtledemo", "lib2to3", "site-packages", "dist-packages"),
        *("__pycache__", "encodings", "pydoc_data", "lib-dynload", "ensurepip"),
    )
)
_LEFT_OUT_FILES = ("_sysconfigdata", "antigravity", "__phello__", "__hello__", "pydoc_topics")


def stdlib_records(part: Part) -> Iterator[Record]:
    """Yield {"prompt": signature and docstring, "completion": body} with origins such as
    "json/decoder.py:284".

    Prompt and completion, joined, are a Python function that parses. Functions and methods count; functions
    inside functions do not, because they are part of a body already.
    """
    buckets = FINE_TUNING_BUCKETS if part == "train" else VALIDATION_BUCKETS
    for name, source in _sources(buckets):
        lines = source.splitlines()
        for function in _functions(_parsed(source)):
            record = _instruction(function, lines, name)
            if record is not None:
                yield record


def stdlib_texts(part: Part, seed: int | None = None) -> Iterator[Record]:
    """Yield {"text": source} of each module, with origins such as "json/decoder.py", shuffled where a seed is given."""
    buckets = PRETRAINING_BUCKETS if part == "train" else VALIDATION_BUCKETS
    for name, source in _sources(buckets, seed):
        yield Record({"text": source}, name)


def bucket_of(name: str) -> int:
    """Return the bucket, 0 to 9, of a file by its path below the library, such as "json/decoder.py"."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % _NUM_BUCKETS


def _python_files(library: Path) -> Iterator[Path]:
    """Yield the library's files; folders that are left out are not entered, so installed packages cost nothing and
    change no draw."""
    for folder, inner, files in os.walk(library):
        inner[:] = [name for name in inner if name not in _LEFT_OUT_FOLDERS]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))


def _sources(buckets: range, seed: int | None = None) -> Iterator[tuple[str, str]]:
    """Yield (path below the library, source text) of the modules in `buckets` that parse, by path or shuffled."""
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(_python_files(library))
    if seed is not None:
        random.Random(seed).shuffle(paths)
    for path in paths:
        relative = path.relative_to(library)
        if _LEFT_OUT_FOLDERS.intersection(relative.parts) or relative.name.startswith(_LEFT_OUT_FILES):
            continue
        if bucket_of(relative.as_posix()) not in buckets:
            continue
        try:
            source = path.read_text(encoding="utf-8")
            _parsed(source)
        except (OSError, UnicodeDecodeError, SyntaxError):
            continue  # a distribution's own oddity (latin-1 source, templates): not a part of the data set
        if source.strip():
            yield relative.as_posix(), source


def _parsed(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own escapes such as "\d" are not our user's concern
        return ast.parse(source)


def _functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child
        elif not isinstance(child, (ast.Lambda, ast.expr)):
            yield from _functions(child)


def _instruction(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str], name: str) -> Record | None:
    """Cut a function after its docstring; None when it has none, or is too short, too long or laid out
    oddly."""
    if not ast.get_docstring(function) or len(function.body) < 2:
        return None
    docstring_end, function_end = function.body[0].end_lineno, function.end_lineno
    if docstring_end is None or function_end is None or function.body[1].lineno <= docstring_end:
        return None
    indent = " " * function.col_offset
    prompt = _dedented(lines[function.lineno - 1 : docstring_end], indent) + "\n"
    body_lines = lines[docstring_end:function_end]
    while body_lines and not body_lines[0].strip():
        body_lines = body_lines[1:]
    body = _dedented(body_lines, indent)
    fits = len(prompt) <= MAX_PROMPT_CHARACTERS and len(body) <= MAX_BODY_CHARACTERS
    if not fits or len(body_lines) not in BODY_LINES:
        return None
    try:
        _parsed(prompt + body)
    except SyntaxError:
        return None
    return Record({"prompt": prompt, "completion": body}, f"{name}:{function.lineno}")


def _dedented(lines: list[str], indent: str) -> str:
    return "\n".join(line.removeprefix(indent).rstrip() for line in lines)
