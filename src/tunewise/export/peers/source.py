"""Where model and data lie and what is in the data, in terms that other tools understand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tunewise.errors import InputError
from tunewise.export.peers.ledger import Ledger
from tunewise.recipe import Recipe
from tunewise.workload.detection import find_mapping
from tunewise.workload.formats import OPTIONAL, REQUIRED
from tunewise.workload.model import EMBEDDED_FOLDER
from tunewise.workload.places import user_path
from tunewise.workload.record_files import KNOWN_SUFFIXES, kind_of
from tunewise.workload.records import STDLIB, read_records

Loader = Literal["json", "csv", "parquet", "text"]

_LOADERS: dict[str, Loader] = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".txt": "text", ".md": "text",
}  # fmt: skip
"""Endings of files and the name under which Hugging Face's `load_dataset` reads them."""

_SAMPLE_RECORDS = 100
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class Source:
    """The records.

    Attributes:
        path: file, folder or hub id, as the recipe has it.
        loader: how `load_dataset` reads it; None for a hub data set.
        format: one of tunewise's formats, never "auto".
        fields: our names for the fields -> the user's.
        validation: a file of its own for validation, or None.
    """

    path: str
    loader: Loader | None
    format: str
    fields: Mapping[str, str]
    validation: str | None

    @property
    def is_hub(self) -> bool:
        """Whether the records are a data set of the Hugging Face hub."""
        return self.loader is None

    def field(self, ours: str) -> str:
        """Return the user's name of one of our fields."""
        return self.fields.get(ours, ours)

    @property
    def renamed(self) -> dict[str, str]:
        """The fields that are called otherwise than by us."""
        return {ours: theirs for ours, theirs in self.fields.items() if ours != theirs}


def source_of(ledger: Ledger, recipe: Recipe, path_name: str, format_name: str) -> Source:
    """Find out what the data are, reading the first records where they can be read, and account for them.

    Raises:
        InputError: the data are tunewise's own, or cannot be read.
    """
    data = recipe.data
    if data.source == STDLIB:
        raise InputError(
            f"export: data 'stdlib' are made by tunewise from Python's standard library, {ledger.peer} cannot read "
            "them. Name a file or a hub data set."
        )
    ledger.take("data.source", path_name)
    ledger.take("data.format", format_name)
    ledger.take("data.fields", format_name)
    path = user_path(data.source)
    loader = _loader(path)
    if loader is None and not _HUB_ID.fullmatch(data.source):
        raise InputError(
            f"export: '{data.source}' is no file that {ledger.peer} can read. Known: {', '.join(KNOWN_SUFFIXES)}."
        )
    if path.exists():
        sample = list(read_records(data.source, _SAMPLE_RECORDS))
        mapping = find_mapping(sample, data.format, data.fields)
        format_, fields = mapping.format, dict(mapping.fields)
    else:
        format_, fields = data.format, dict(data.fields)
        if loader is not None:
            ledger.note(f"data.source: there is no file '{data.source}' here yet")
    if format_ == "auto":
        format_ = "text" if recipe.objective != "sft" else "messages"
        ledger.miss(
            "data.format", f"the records cannot be looked at here; written as '{format_}', change it if they differ"
        )
    complete = {ours: ours for ours in REQUIRED[format_]} | fields
    _note_kinds(ledger, loader, path)
    return Source(data.source, loader, format_, complete, data.validation)


def _loader(path: Path) -> Loader | None:
    if path.is_dir():
        kinds = {kind_of(file) for file in path.rglob("*") if file.is_file()}
        return next((_LOADERS[kind] for kind in sorted(kinds) if kind in _LOADERS), None)
    return _LOADERS.get(kind_of(path))


def _note_kinds(ledger: Ledger, loader: Loader | None, path: Path) -> None:
    if loader == "text":
        ledger.note(f"data.source: tunewise reads a text file as one document, {ledger.peer} takes each line for one")
    if kind_of(path) == ".tsv":
        ledger.note(f"data.source: {ledger.peer} expects commas between columns; turn the tabs of '{path.name}' so")


def data_files(path: str) -> str:
    """Return what `load_dataset` wants as `data_files`: the file itself, or everything in the folder."""
    return str(Path(path) / "**") if user_path(path).is_dir() else path


def known_columns(source: Source) -> dict[str, str]:
    """Return the fields that the format knows, required ones and those optional ones that the records have."""
    return {ours: source.field(ours) for ours in (*REQUIRED[source.format], *OPTIONAL[source.format])
            if ours in source.fields}  # fmt: skip


def columns_must_be(ledger: Ledger, source: Source, *names: str) -> None:
    """Name the columns that the tool reads under fixed names only."""
    wrong = {ours: theirs for ours, theirs in source.renamed.items() if ours in names}
    if wrong:
        listed = ", ".join(f"'{theirs}' -> '{ours}'" for ours, theirs in sorted(wrong.items()))
        ledger.miss("data.fields", f"{ledger.peer} reads fixed column names; rename {listed}")
    nested = sorted(theirs for theirs in source.renamed.values() if "." in theirs)
    if nested:
        ledger.miss("data.fields", f"{ledger.peer} knows no paths into records such as '{nested[0]}'")


def model_path(ledger: Ledger, recipe: Recipe, name: str) -> str:
    """Return the model's folder or hub id under which another tool finds it."""
    given = str(ledger.take("model.name", name))
    if given == "embedded":
        ledger.note("model.name: 'embedded' is the folder that tunewise brings along")
        return str(EMBEDDED_FOLDER)
    path = user_path(given)
    if path.suffix != ".json":
        return given
    if path.name == "config.json":
        found = str(path.parent)
        if any(path.parent.glob("*.safetensors")):
            return found
    else:
        found = path.stem
    ledger.miss("model.name", f"is a configuration without weights; put the model's hub id or folder for '{found}'")
    return found


def stem_of(model: str) -> str:
    """Return a name for files: the model's, in letters that every file system takes."""
    name = Path(model)
    last = name.parent.name if name.name == "config.json" else name.stem if name.suffix == ".json" else name.name
    return re.sub(r"[^\w.-]+", "-", last).strip("-.") or "model"
