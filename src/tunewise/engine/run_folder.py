"""The folder of a run, made for people to read.

recipe.yaml      the recipe with every default written out
data.json        fingerprints of the data and of the model, to notice that they changed before a resume
versions.json    libraries, Python, machine
metrics.jsonl    one JSON object a line: steps, evaluations, checkpoints, what went wrong
checkpoints/     step-00000120/ ...
adapter/ or model/   what was trained, at the end
"""

from __future__ import annotations

import fcntl
import json
import platform
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch

from tunewise.engine.checkpoint import storage_errors
from tunewise.errors import InputError
from tunewise.methods.reading import recipe_to_yaml
from tunewise.recipe import Recipe

LIBRARIES = ("tunewise", "torch", "transformers", "tokenizers", "safetensors", "peft", "bitsandbytes", "numpy")


class RunFolder:
    """One run's folder, locked while this process trains in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metrics: IO[str] | None = None
        self._lock: IO[str] | None = None

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints lie."""
        return self.path / "checkpoints"

    @property
    def recipe_file(self) -> Path:
        """Where the complete recipe lies."""
        return self.path / "recipe.yaml"

    def open(self) -> None:
        """Make the folder, lock it and open the metrics for appending.

        Raises:
            InputError: another process trains in it.
            StorageError: the folder cannot be written.
        """
        with storage_errors(f"cannot write to the run folder {self.path}"):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"Another process is training in {self.path}; wait for it or choose another --out."
                ) from None
            _drop_half_line(self.path / "metrics.jsonl")
            self._metrics = (self.path / "metrics.jsonl").open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the metrics and release the lock."""
        for stream in (self._metrics, self._lock):
            if stream is not None:
                with suppress(OSError):  # a full disk refuses the line again that `record` has complained about
                    stream.close()
        self._metrics = self._lock = None

    def write_start(self, recipe: Recipe, fingerprints: dict[str, str]) -> None:
        """Write what a reader (and a resume) needs to know, before the first step."""
        with storage_errors(f"cannot write to the run folder {self.path}"):
            text = f"# tunewise {metadata.version('tunewise')}, recipe {recipe.id}\n"
            text += recipe_to_yaml(recipe)
            write_whole(self.path / "data.json", json.dumps(fingerprints, indent=1))
            write_whole(self.path / "versions.json", json.dumps(versions(), indent=1))
            write_whole(self.recipe_file, text)  # last: a folder with a recipe can be resumed

    def fingerprints(self) -> dict[str, str]:
        """Read the fingerprints that the run was started with.

        Raises:
            InputError: they are missing or damaged.
        """
        file = self.path / "data.json"
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            return {str(key): str(value) for key, value in content.items()}
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"{file} cannot be read, so nobody can tell whether the data changed: {error}") from None

    def record(self, entry: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        if self._metrics is None:
            raise ValueError("the run folder is not open")
        with storage_errors(f"cannot write to {self.path / 'metrics.jsonl'}"):
            self._metrics.write(json.dumps(entry) + "\n")
            self._metrics.flush()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a metrics.jsonl; a step that was done again after a resume has two lines, of which the later one counts."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def versions() -> dict[str, str]:
    """Return the versions of what a result depends on, and the machine."""
    found = {"python": platform.python_version(), "platform": platform.platform(), "processor": _processor()}
    for library in LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    return found


def write_whole(file: Path, text: str) -> None:
    """Write a small file so that it is there wholly or not at all."""
    aside = file.with_name(f".{file.name}.partial")
    aside.write_text(text, encoding="utf-8")
    aside.rename(file)


def _drop_half_line(file: Path) -> None:
    """Cut off a last line that a kill left unfinished; the step it tells of is done again."""
    if file.is_file():
        content = file.read_bytes()
        if content and not content.endswith(b"\n"):
            with file.open("r+b") as stream:
                stream.truncate(content.rfind(b"\n") + 1)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
