from __future__ import annotations

from pathlib import Path

import pytest

from tunewise.workload.places import user_path


def test_home_is_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert user_path("~/models/a") == Path("/home/me/models/a")
    assert user_path("models/~a") == Path("models/~a")


def test_a_name_of_no_user_is_a_name() -> None:
    assert user_path("~\ud7ff nobody/model") == Path("~\ud7ff nobody/model")
