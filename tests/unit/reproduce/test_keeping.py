"""Finished reproductions are kept and found again; a stop loses the running part only."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunewise.errors import MissingBackend
from tunewise.reproduce.bench import Bench, Size
from tunewise.reproduce.claim import Claim, Finding, Mark, Verdict
from tunewise.reproduce.keeping import Keeper, _modules, as_json, combined, digest_of, read_result
from tunewise.reproduce.reproduction import Evidence, Reproduction, Table

CLAIM = Claim(key="k", says="it is one", mark=Mark.MEMORY, published=1.0, tolerance=0.1)
TABLE = Table(title="figures", columns=("a", "b"), rows=(("x", 1.5), (None, 2)))
calls: list[str] = []


def parts(bench: Bench) -> Evidence:
    for part in ("first", "second", "third"):
        bench.once(part, part_of, part)
    return Evidence({"k": Finding.exact(1.0)}, (TABLE,))


def part_of(part: str) -> int:
    if part == "second" and "stop" in calls:
        calls.remove("stop")
        raise KeyboardInterrupt
    calls.append(part)
    return len(calls)


def without_backend(bench: Bench) -> Evidence:
    raise MissingBackend("peft", "this", "peft")


def without_answer(bench: Bench) -> Evidence:
    return Evidence({})


def made(measure: object = parts, **more: object) -> Reproduction:
    return Reproduction("made", "t", "s", "w", "h", (CLAIM,), measure, **more)  # type: ignore[arg-type]


@pytest.fixture
def keeper(tmp_path: Path) -> Keeper:
    calls.clear()
    return Keeper(tmp_path / "kept", Size.SHORT, None, lambda line: None)


def test_a_finished_one_is_found_again(keeper: Keeper) -> None:
    first = keeper.result(made())
    assert calls == ["first", "second", "third"]
    assert keeper.result(made()) == first
    assert len(calls) == 3
    assert not list((keeper.folder / "work").iterdir())


def test_after_a_stop_only_the_running_part_is_done_again(keeper: Keeper) -> None:
    calls.append("stop")
    with pytest.raises(KeyboardInterrupt):
        keeper.result(made())
    assert calls == ["first"]
    assert keeper.result(made()).count(Verdict.SAME) == 1
    assert calls == ["first", "second", "third"]


def test_other_sizes_and_versions_are_other_results(keeper: Keeper, tmp_path: Path) -> None:
    keeper.result(made())
    other = Keeper(keeper.folder, Size.FULL, None, lambda line: None)
    assert other.kept(made()) is None
    digest = digest_of(made(), keeper.versions, None)
    assert digest == digest_of(made(), keeper.versions, None)
    assert digest != digest_of(made(), {**keeper.versions, "torch": "0.1"}, None)
    (tmp_path / "words").touch()
    needs = made(data=("words",))
    assert digest_of(needs, keeper.versions, None) != digest_of(needs, keeper.versions, tmp_path)


def test_the_digest_covers_what_the_experiment_is_made_of() -> None:
    names = {module.__name__ for module in _modules("tunewise.reproduce.hf_single_gpu")}
    used = ("hf_single_gpu", "ladder_claims", "claim", "ladders.hugging_face", "ladders.table")
    assert {f"tunewise.reproduce.{name}" for name in used} <= names
    assert "tunewise.reproduce.nf4" not in names


def test_what_is_damaged_is_done_again(keeper: Keeper) -> None:
    keeper.result(made())
    (file,) = keeper.folder.glob("*.json")
    file.write_text("{")
    assert read_result(file) is None
    assert keeper.result(made()).count(Verdict.SAME) == 1
    assert len(calls) == 6


def test_json_comes_back_as_it_was(keeper: Keeper, tmp_path: Path) -> None:
    result = keeper.result(made())
    file = tmp_path / "result.json"
    file.write_text(as_json(result))
    assert read_result(file) == result
    content = combined([result], ["other"])
    assert content["summary"] == {
        "reproductions": 1, "claims": 1, "same": 1, "same direction": 0, "differs": 0, "not testable here": 0,
        "failed": ["other"], "seconds": result.seconds,
    }  # fmt: skip


def test_what_is_missing_is_said_and_no_failure(keeper: Keeper) -> None:
    (judged,) = keeper.result(made(without_backend)).judged
    assert judged.verdict == Verdict.NOT_TESTABLE
    assert "not installed" in judged.reason
    (judged,) = keeper.result(made(data=("words",))).judged
    assert judged.verdict == Verdict.NOT_TESTABLE
    assert "words" in judged.reason


def test_every_claim_needs_a_finding(keeper: Keeper) -> None:
    with pytest.raises(AssertionError, match="do not match"):
        keeper.result(made(without_answer))
