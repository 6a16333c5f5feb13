"""`tunewise reproduce`: lists, refuses wrong names, runs, keeps, writes JSON, and goes on after a failure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunewise import reproduce
from tunewise.cli import main
from tunewise.errors import Interrupted
from tunewise.reproduce.bench import Bench
from tunewise.reproduce.claim import Claim, Finding, Mark
from tunewise.reproduce.reproduction import Evidence, Reproduction

CLAIMS = (
    Claim(key="one", says="it is one", mark=Mark.MEMORY, published=1.0, tolerance=0.1),
    Claim(key="two", says="it grows", mark=Mark.READ, published=2.0, expects="above", neutral=1.0),
)


def good(bench: Bench) -> Evidence:
    bench.say("a part is done")
    return Evidence({"one": Finding.exact(1.0), "two": Finding.untested(f"at size {bench.size}")})


def bad(bench: Bench) -> Evidence:
    raise ValueError("broken")


def stopped(bench: Bench) -> Evidence:
    raise Interrupted(2, "Stopped.")


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = tuple(
        Reproduction(measure.__name__, f"about {measure.__name__}", "source", "there", "here", CLAIMS, measure)
        for measure in (bad, good, stopped)
    )
    monkeypatch.setattr(reproduce, "ALL", made[:2])
    monkeypatch.setattr(reproduce, "BY_NAME", {each.name: each for each in made})
    monkeypatch.chdir(tmp_path)


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["tunewise", "reproduce", "--jobs", "1", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


@pytest.mark.usefixtures("three")
@pytest.mark.parametrize("words", [(), ("--list",), ("good", "--list")])
def test_without_a_name_they_are_listed(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *words) == 0
    assert [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()] == [
        ["bad", "about bad"],
        ["good", "about good"],
    ]


@pytest.mark.usefixtures("three")
def test_a_wrong_name_names_the_nearest(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "goood") == 2
    assert "Did you mean 'good'?" in capsys.readouterr().err
    assert call(monkeypatch, "good", "--shared", "nowhere") == 2
    assert "no folder 'nowhere'" in capsys.readouterr().err


@pytest.mark.usefixtures("three")
def test_one_is_run_shown_kept_and_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert call(monkeypatch, "good", "--short", "--json", "deep/out.json") == 0
    shown = capsys.readouterr()
    assert "[1/1] good" in shown.err
    assert "a part is done" in shown.err
    assert "paper 1 x [from memory]   ours 1 x   ratio 1   => same" in shown.out
    assert "paper 2 (> 1) x   ours -   => not testable here (at size short)" in shown.out
    content = json.loads((tmp_path / "deep" / "out.json").read_text())
    assert content["summary"] | {"seconds": 0} == {
        "reproductions": 1, "claims": 2, "same": 1, "same direction": 0, "differs": 0, "not testable here": 1,
        "failed": [], "seconds": 0,
    }  # fmt: skip
    assert call(monkeypatch, "good", "--short") == 0
    assert "a part is done" not in capsys.readouterr().err


@pytest.mark.usefixtures("three")
def test_a_failure_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert call(monkeypatch, "--all", "--json", "out.json") == 1
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["summary"]["failed"] == ["bad"]
    assert [result["name"] for result in content["results"]] == ["good"]


@pytest.mark.usefixtures("three")
def test_a_stop_is_a_stop(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "stopped", "good") == 130
    assert "2/2" not in capsys.readouterr().err
