"""Prepared data kept on disk: what was tokenized, split and examined once is found again as flat arrays.

A key is the hash of everything that the answer depends on: the content of the files (not their dates), what the recipe
says of them, tokenizer and template, versions, and tunewise's own source. So nothing stale is ever found; what changes
is made anew, and what nobody has used for longest is deleted where space ends. An entry comes to its place whole.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from tunewise.recipe import Recipe
from tunewise.workload.corpus import Corpus, Origins
from tunewise.workload.diagnosis import Diagnosis, Finding, Statistics
from tunewise.workload.places import cache_folder
from tunewise.workload.records import source_files

WORTH_SECONDS = 1.0
"""What was made in less time is not kept."""

MOST_BYTES = 20 * 2**30
"""Of all entries together; the oldest go first."""

_ARRAYS = ("token_ids", "is_supervised", "offsets", "num_supervised", "origins_text", "origins_offsets")


@dataclass(frozen=True, eq=False)
class Diagnosed:
    """What `prepare.diagnose` finds.

    Attributes:
        diagnosis: the doctor's findings.
        train, validation: the documents, not yet mixed with anything.
        said: sentences for the user.
    """

    diagnosis: Diagnosis
    train: Corpus
    validation: Corpus
    said: list[str]


def key_of(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, more: Mapping[str, Any]) -> str | None:
    """Return the key of a recipe's data; None where their content cannot be known (a hub's data set, "stdlib").

    Args:
        recipe: of which `data`, `objective` and `seed` count.
        tokenizer: with its chat template.
        more: what else the answer depends on, as plain data.
    """
    files: list[list[str]] = []
    for source in (recipe.data.source, recipe.data.validation):
        listed = [] if source is None else source_files(source)
        if listed is None:
            return None
        try:
            files.append([f"{name} {_digest(path)}" for path, name in listed])
        except OSError:
            return None  # reading them says what is wrong
    template = str(tokenizer.chat_template)
    content = {
        "files": files,
        "data": recipe.data.model_dump(mode="json", exclude={"replay"}),
        "recipe": [recipe.objective, recipe.seed],
        "more": dict(more),
        "tokenizer": [
            type(tokenizer).__name__,
            hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
            {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        ],
        "template": template,
        "day": today() if "strftime_now" in template else "",
        "versions": [sys.version, transformers.__version__, tokenizers.__version__, np.__version__, _source_digest()],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:24]


def today() -> str:
    """Return the date, which some templates write into every prompt."""
    return str(datetime.date.today())


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@functools.cache
def _source_digest() -> str:
    """Return a hash of the code that decides about documents."""
    digest = hashlib.sha256()
    for file in (*sorted(Path(__file__).parent.glob("*.py")), Path(__file__).parents[1] / "recipe.py"):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _folder() -> Path:
    return cache_folder() / "data"


def read(key: str) -> Diagnosed | None:
    """Return what is kept under `key`, its arrays on disk until they are looked at; None for nothing, or damaged."""
    entry = _folder() / key
    try:
        content = json.loads((entry / "data.json").read_text(encoding="utf-8"))
        os.utime(entry)
        train, validation = (load_corpus(entry, name, content[name]) for name in ("train", "validation"))
        findings = tuple(Finding(**{**each, "origins": tuple(each["origins"])}) for each in content["findings"])
        statistics = {**content["statistics"]}
        statistics["length_quantiles"] = tuple(map(tuple, statistics["length_quantiles"]))
        return Diagnosed(Diagnosis(findings, Statistics(**statistics)), train, validation, content["said"])
    except (OSError, ValueError, KeyError, TypeError):
        shutil.rmtree(entry, ignore_errors=True)  # so that it can be kept again
        return None


def load_corpus(folder: Path, name: str, about: Mapping[str, Any]) -> Corpus:
    """Return what `save_corpus` wrote; its arrays stay on disk until they are looked at.

    Args:
        folder: where it was written.
        name: under which it was written.
        about: what `save_corpus` returned.

    Raises:
        OSError, ValueError: files are missing or damaged.
        KeyError: `about` is something else.
    """
    arrays = {}
    for array in _ARRAYS:
        file = folder / f"{name}.{array}.npy"
        count = about["sizes"][array]
        found = np.load(file, mmap_mode="r" if count else None, allow_pickle=False)
        if found.shape != (count,):
            raise ValueError(f"{file} is damaged")
        arrays[array] = np.asarray(found)
    origins = Origins(arrays["origins_text"], arrays["origins_offsets"])
    corpus = Corpus(arrays["token_ids"], arrays["is_supervised"], arrays["offsets"], origins)
    return corpus.knowing(arrays["num_supervised"], about["fingerprint"])


def write(key: str, data: Diagnosed) -> None:
    """Keep `data` under `key`; where nothing can be written, nothing is kept."""
    folder = _folder()
    made: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder, suffix=".part"))
        content = {
            "train": save_corpus(data.train, made, "train"),
            "validation": save_corpus(data.validation, made, "validation"),
            "findings": [asdict(finding) for finding in data.diagnosis.findings],
            "statistics": asdict(data.diagnosis.statistics),
            "said": data.said,
        }
        with (made / "data.json").open("w", encoding="utf-8") as stream:
            json.dump(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        made.rename(folder / key)
        _make_space(folder, key)
    except OSError:  # the disk is full or read-only, or another process was first
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def save_corpus(corpus: Corpus, folder: Path, name: str) -> dict[str, Any]:
    """Write a corpus as flat arrays under names that begin with `name`; return what `load_corpus` must be told.

    Raises:
        OSError: it cannot be written.
    """
    origins = Origins.of(corpus.origins)
    arrays: tuple[NDArray[Any], ...] = (
        corpus.token_ids, corpus.is_supervised, corpus.offsets, corpus.num_supervised, origins.text, origins.offsets,
    )  # fmt: skip
    for array, content in zip(_ARRAYS, arrays, strict=True):
        with (folder / f"{name}.{array}.npy").open("wb") as stream:
            np.save(stream, content, allow_pickle=False)
            stream.flush()
            os.fsync(stream.fileno())
    sizes = {array: len(content) for array, content in zip(_ARRAYS, arrays, strict=True)}
    return {"sizes": sizes, "fingerprint": corpus.fingerprint}


def _make_space(folder: Path, newest: str) -> None:
    """Delete what nobody has used for longest until all entries keep to `MOST_BYTES`."""
    entries = sorted((e for e in folder.iterdir() if e.is_dir() and not e.name.endswith(".part")), key=_used)
    sizes = {entry: sum(file.stat().st_size for file in entry.iterdir()) for entry in entries}
    total = sum(sizes.values())
    for entry in entries:
        if total <= MOST_BYTES:
            return
        if entry.name != newest:
            shutil.rmtree(entry, ignore_errors=True)
            total -= sizes[entry]


def _used(entry: Path) -> float:
    return entry.stat().st_mtime
