"""Book-keeping of an export: every setting of the recipe is written somewhere, named as missing, or an error of ours.

A recipe has some eighty settings and a tool other names for most of them. What is forgotten in such a mapping stays
forgotten, so `close` refuses to end while a setting is not accounted for; a new field of the recipe or a new method
therefore fails the tests of every tool until somebody has decided what becomes of it.
"""

from __future__ import annotations

from typing import Any

from tunewise.export.peers.config import Missing, shown
from tunewise.recipe import Recipe, Value


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """Return all settings of a recipe by dotted name.

    A method is a setting itself ("lora": True) besides its options ("lora.rank"), so that a method without options
    cannot be overlooked.
    """
    settings: dict[str, Any] = {}
    for name in type(recipe).model_fields:
        value = getattr(recipe, name)
        if name == "methods":
            for method in value or ():
                settings[method.name] = True
                for option in type(method).model_fields:
                    settings[f"{method.name}.{option}"] = getattr(method, option)
        elif isinstance(value, Value):
            settings |= {f"{name}.{field}": getattr(value, field) for field in type(value).model_fields}
        else:
            settings[name] = value
    return settings


class Ledger:
    """The settings of one recipe on their way into one tool's configuration.

    Attributes:
        peer: the tool's name for people ("TRL").
        mapped: settings that were taken, and the tool's names for them.
        missing: settings that the tool cannot honour.
        notes: further remarks.
    """

    def __init__(self, recipe: Recipe, peer: str) -> None:
        self.peer = peer
        self.mapped: dict[str, str] = {}
        self.missing: list[Missing] = []
        self.notes: list[str] = []
        self._values = settings_of(recipe)
        self._open = set(self._values)

    def value(self, setting: str) -> Any:
        """Look at a setting without accounting for it."""
        return self._values[setting]

    def has(self, setting: str) -> bool:
        """Say whether the recipe has this setting."""
        return setting in self._values

    def take(self, setting: str, *names: str) -> Any:
        """Return a setting that is written under the tool's `names`."""
        self._open.discard(setting)
        self.mapped[setting] = ", ".join(names)
        return self._values[setting]

    def miss(self, setting: str, reason: str) -> None:
        """Name a setting that the tool cannot honour as it stands, written near or not at all."""
        self._open.discard(setting)
        self.missing.append(Missing(setting, shown(self._values[setting]), reason))

    def need(self, setting: str, *same: Any, otherwise: str) -> bool:
        """Account for a setting without counterpart: fine when its value is among `same`, else named.

        `same` are the values with which the tool does what the recipe wants anyway. Returns whether it is fine.
        """
        self._open.discard(setting)
        if any(self._values[setting] == value for value in same):
            return True
        self.miss(setting, otherwise)
        return False

    def without_effect(self, setting: str) -> None:
        """Account for a setting that changes nothing in this recipe."""
        self._open.discard(setting)

    def note(self, sentence: str) -> None:
        """Say something about what was written."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def close(self) -> None:
        """Check that nothing was forgotten.

        Raises:
            AssertionError: a setting was neither taken nor named; this is an error of ours.
        """
        if self._open:
            raise AssertionError(f"the export to {self.peer} forgets {', '.join(sorted(self._open))}")
