"""Where an experiment works: its size, its folder, the shared data, and the parts of it that are done already."""

from __future__ import annotations

import enum
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tunewise.engine.run_folder import write_whole

Choice = TypeVar("Choice")


class Size(enum.StrEnum):
    """How much is computed: to see that it runs, to see the effect in about a minute, or with more seeds and steps."""

    TINY = "tiny"
    SHORT = "short"
    FULL = "full"


@dataclass
class Bench:
    """Where one experiment works.

    Attributes:
        size: how much is computed.
        folder: kept until the experiment is finished, so that a call that was stopped goes on.
        shared: a folder of data sets and models that do not come with the package, or None.
        say: shows a line of progress.
        seconds_before: that earlier calls have spent on the parts that are found again.
    """

    size: Size
    folder: Path
    shared: Path | None = None
    say: Callable[[str], None] = lambda line: None
    seconds_before: float = field(default=0.0, init=False)
    _done: set[str] = field(default_factory=set, init=False, repr=False)

    def pick(self, *, tiny: Choice, short: Choice, full: Choice) -> Choice:
        """Return what belongs to this size."""
        return {Size.TINY: tiny, Size.SHORT: short, Size.FULL: full}[self.size]

    def shared_folder(self, name: str) -> Path | None:
        """Return a folder or file of the shared data, or None where it is not there."""
        if self.shared is None:
            return None
        path = self.shared / name
        return path if path.exists() else None

    def once(self, key: str, compute: Callable[..., Any], *arguments: Any) -> Any:
        """Return what `compute` returns for the arguments (plain data), computed once however often this is called.

        Each part is kept as soon as it is there: a stop loses only the part that was running.
        """
        file = self.folder / "parts.json"
        parts = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if key in parts:
            if key not in self._done:  # an earlier call spent them
                self.seconds_before += parts[key]["seconds"]
                self._done.add(key)
            return parts[key]["value"]
        started = time.monotonic()
        value = json.loads(json.dumps(compute(*arguments)))  # as it will be read again
        parts[key] = {"value": value, "seconds": time.monotonic() - started}
        self._done.add(key)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(parts))
        self.say(f"{key}: {parts[key]['seconds']:.1f} s")
        return value
