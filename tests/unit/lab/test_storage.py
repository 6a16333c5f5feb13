"""A storage that is made whole or not at all."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from tunewise.lab.storage import STUDIES, Storage


def names_in(file: Path) -> list[str]:
    with sqlite3.connect(file) as connection:
        return sorted(name for (name,) in connection.execute("select study_name from studies"))


def test_a_kill_while_the_storage_is_made_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "_open", kill)
        with pytest.raises(Killed):
            Storage.in_folder(tmp_path)
    assert not (tmp_path / "study.db").exists()
    Storage.in_folder(tmp_path)
    Storage.in_folder(tmp_path)
    assert names_in(tmp_path / "study.db") == sorted(STUDIES)
    assert [path.name for path in tmp_path.iterdir()] == ["study.db"]


def test_the_names_of_studies_are_unique(tmp_path: Path) -> None:
    Storage.in_folder(tmp_path)
    with (
        sqlite3.connect(tmp_path / "study.db") as connection,
        pytest.raises(sqlite3.IntegrityError, match="UNIQUE"),
    ):
        connection.execute("insert into studies (study_name) values ('methods')")
