"""What an export to another trainer returns: the text of its configuration, and what it cannot say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import PretrainedConfig

from tunewise.errors import InputError
from tunewise.recipe import Recipe


@dataclass(frozen=True)
class Missing:
    """A setting of the recipe that the other tool cannot honour as it stands.

    Attributes:
        setting: its dotted name in the recipe ("training.spike", "lora.init").
        value: its value, as JSON.
        reason: what the tool does instead.
    """

    setting: str
    value: str
    reason: str

    def __str__(self) -> str:
        return f"{self.setting} = {self.value}: {self.reason}"


@dataclass(frozen=True)
class Facts:
    """What a plan knows about the data beyond the recipe; None where nobody said.

    Attributes:
        tokens_per_step: real tokens (no padding) in an optimizer step, on average.
        num_steps: optimizer steps of the whole run.
    """

    tokens_per_step: float | None = None
    num_steps: int | None = None


@dataclass(frozen=True, eq=False)
class Case:
    """What is exported.

    Attributes:
        recipe: complete (`tunewise.methods.complete`).
        config: the model's configuration.
        facts: what is known of the data.
        name: what the files are called, without tool and ending.
        folder: where they will lie, as seen from where the tool is run.
    """

    recipe: Recipe
    config: PretrainedConfig
    facts: Facts
    name: str
    folder: Path

    def out(self, peer: str) -> str:
        """Return where the tool's run goes: what the recipe says, else a folder named like the file."""
        return self.recipe.out or f"runs/{self.name}-{peer}"


@dataclass(frozen=True)
class Draft:
    """A tool's configuration as data.

    Attributes:
        content: what becomes the YAML file.
        command: how to run it, FILE standing for the file.
        intro: further comment lines for the top.
        companions: see `PeerConfig`.
    """

    content: Mapping[str, Any]
    command: str
    intro: tuple[str, ...] = ()
    companions: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class PeerConfig:
    """A recipe as another tool's configuration.

    Attributes:
        peer: the tool ("trl").
        text: the content of the file, with what could not be said as comments on top.
        file_name: what the file is called, without folder.
        command: how to run it, one shell command a line.
        mapped: each setting that has a counterpart, and where it stands in the file.
        not_expressible: every other setting that means something, with the reason.
        notes: what the file says and means otherwise than tunewise would.
        companions: further files that belong to it, (path below the same folder, text).
    """

    peer: str
    text: str
    file_name: str
    command: str
    mapped: Mapping[str, str]
    not_expressible: tuple[Missing, ...]
    notes: tuple[str, ...]
    companions: tuple[tuple[str, str], ...] = field(default=())

    def write(self, folder: Path) -> Path:
        """Write the file and its companions into `folder`; nothing is written when one of them exists.

        Raises:
            InputError: a file of that name is there already, or the folder cannot be written to.
        """
        files = {folder / self.file_name: self.text} | {folder / name: text for name, text in self.companions}
        for file in files:
            if file.exists():
                raise InputError(f"export: '{file}' exists already; move it away, or give --out another name.")
        for file, text in files.items():
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8")
            except OSError as error:
                raise InputError(f"export: '{file}' cannot be written: {error.strerror or error}.") from None
        return folder / self.file_name


def as_yaml(content: Mapping[str, Any], head: list[str]) -> str:
    """Write `content` as YAML under comment lines; the text reads back to equal content."""
    plain = dict(content)
    body = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)
    if yaml.safe_load(body) != plain:  # PyYAML 6 writes U+0085 and its like bare, and reads them as line ends
        body = yaml.safe_dump(plain, sort_keys=False, width=100)
    return "".join(f"# {_one_line(line)}".rstrip() + "\n" for line in head) + "\n" + body


def _one_line(text: str) -> str:
    """Write whatever YAML could take for the end of a comment, or for no text at all, as an escape."""
    return "".join(
        letter if " " <= letter <= "~" else letter.encode("unicode_escape").decode("ascii") for letter in text
    )


def shown(value: Any) -> str:
    """Return a value as JSON on one line, in ASCII, so that it can stand in a comment."""
    return json.dumps(value, default=str)
