"""What is kept is what would be made again, and is found only while nothing that it depends on has changed."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from transformers import PreTrainedTokenizerBase

from tests.unit.workload import tiny_tokenizers as tiny
from tests.unit.workload.tiny_tokenizers import tiny_tokenizer
from tunewise.recipe import DataSpec, ModelSpec, Recipe
from tunewise.workload import kept, prepare
from tunewise.workload.kept import Diagnosed


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept, "WORTH_SECONDS", 0.0)


def write(path: Path, count: int = 40, answer: str = "Answer") -> Path:
    rows = [{"prompt": f"Question {i % 37}?", "completion": f"{answer} {i} "} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe_for(source: Path, seed: int = 0, **data: Any) -> Recipe:
    return Recipe(model=ModelSpec(name="tiny"), data=DataSpec(source=str(source), **data), seed=seed)


def diagnosed(recipe: Recipe, template: str | None = None, context: int = 64, vocab_size: int = 400) -> Diagnosed:
    return prepare.diagnose(recipe, tiny_tokenizer(template), context, vocab_size)


@pytest.fixture
def times_made(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    made = []
    original = prepare._diagnosed

    def counting(*arguments: Any) -> Diagnosed:
        made.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(prepare, "_diagnosed", counting)
    return lambda: len(made)


def assert_same(found: Diagnosed, expected: Diagnosed) -> None:
    assert found.diagnosis == expected.diagnosis
    assert found.said == expected.said
    for one, other in ((found.train, expected.train), (found.validation, expected.validation)):
        for name in ("token_ids", "is_supervised", "offsets", "lengths", "num_supervised"):
            assert np.array_equal(getattr(one, name), getattr(other, name)), name
            assert getattr(one, name).dtype == getattr(other, name).dtype
        assert list(one.origins) == list(other.origins)
        assert one.fingerprint == other.fingerprint


def test_the_second_use_finds_what_the_first_made(tmp_path: Path, times_made: Callable[[], int]) -> None:
    recipe = recipe_for(write(tmp_path / "a.jsonl"), validation_fraction=0.2)
    plain = prepare._diagnosed(recipe, tiny_tokenizer(), 64, 400)
    assert plain.diagnosis.findings
    assert len(plain.validation) > 0
    first, second = diagnosed(recipe), diagnosed(recipe)
    assert times_made() == 2  # the plain one and the first
    assert_same(first, plain)
    assert_same(second, plain)


def test_no_validation_documents_can_be_kept_too(tmp_path: Path, times_made: Callable[[], int]) -> None:
    recipe = recipe_for(write(tmp_path / "a.jsonl"), validation_fraction=0.0)
    assert_same(diagnosed(recipe), diagnosed(recipe))
    assert times_made() == 1


def test_the_date_of_a_file_does_not_matter(tmp_path: Path, times_made: Callable[[], int]) -> None:
    file = write(tmp_path / "a.jsonl")
    diagnosed(recipe_for(file))
    os.utime(file, (1, 1))
    diagnosed(recipe_for(file))
    assert times_made() == 1


def test_equal_size_and_date_do_not_hide_other_content(tmp_path: Path, times_made: Callable[[], int]) -> None:
    file = write(tmp_path / "a.jsonl")
    before = file.stat()
    first = diagnosed(recipe_for(file)).train.fingerprint
    write(file, answer="Avowal")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert diagnosed(recipe_for(file)).train.fingerprint != first
    assert times_made() == 2


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"validation_fraction": 0.3},
        {"max_length": 32},
        {"max_records": 30},
        {"too_long": "drop"},
        {"fields": {"prompt": "prompt"}},
        {"validation": True},
    ],
    ids=str,
)
def test_what_the_recipe_says_counts(tmp_path: Path, times_made: Callable[[], int], changed: dict[str, Any]) -> None:
    file = write(tmp_path / "a.jsonl")
    if "validation" in changed:
        changed = {"validation": str(write(tmp_path / "v.jsonl", answer="Other"))}
    diagnosed(recipe_for(file))
    diagnosed(recipe_for(file, **changed))
    assert times_made() == 2


def test_a_file_of_validation_counts_by_its_content(tmp_path: Path, times_made: Callable[[], int]) -> None:
    file, other = write(tmp_path / "a.jsonl"), tmp_path / "v.jsonl"
    for answer in ("Other", "Another"):
        write(other, answer=answer)
        diagnosed(recipe_for(file, validation=str(other)))
    assert times_made() == 2


def test_tokenizer_template_context_vocabulary_and_versions_count(
    tmp_path: Path, times_made: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(write(tmp_path / "a.jsonl"))
    diagnosed(recipe)
    diagnosed(recipe, template=tiny.CHATML)
    diagnosed(recipe, context=48)
    diagnosed(recipe, vocab_size=500)
    larger: PreTrainedTokenizerBase = tiny_tokenizer()
    larger.add_tokens(["Question"])
    prepare.diagnose(recipe, larger, 64, 400)
    monkeypatch.setattr(tokenizers, "__version__", "0")
    diagnosed(recipe)
    monkeypatch.setattr(kept, "_source_digest", lambda: "changed")
    diagnosed(recipe)
    assert times_made() == 7


def test_a_template_that_writes_the_date_is_good_for_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, keys = recipe_for(write(tmp_path / "a.jsonl")), []

    for template in (tiny.CHATML, "{{ strftime_now('%d') }}" + tiny.CHATML):
        for day in ("2026-11-01", "2026-11-02"):
            monkeypatch.setattr(kept, "today", lambda day=day: day)
            keys.append(kept.key_of(recipe, tiny_tokenizer(template), {}))
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_folders_count_by_names_and_content(tmp_path: Path, times_made: Callable[[], int]) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "a.jsonl")
    diagnosed(recipe_for(folder))
    (folder / "a.jsonl").rename(folder / "b.jsonl")
    assert set(diagnosed(recipe_for(folder)).train.origins[0][:1]) == {"b"}
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "p?", "completion": "c"}\n'))
    diagnosed(recipe_for(folder))
    diagnosed(recipe_for(folder))
    assert times_made() == 3


def test_a_damaged_entry_is_made_again(tmp_path: Path, times_made: Callable[[], int]) -> None:
    recipe = recipe_for(write(tmp_path / "a.jsonl"))
    plain = prepare._diagnosed(recipe, tiny_tokenizer(), 64, 400)
    diagnosed(recipe)
    (entry,) = (tmp_path / "cache" / "data").iterdir()
    damaged = entry / "train.token_ids.npy"
    damaged.write_bytes(damaged.read_bytes()[:-8])
    assert_same(diagnosed(recipe), plain)
    assert times_made() == 3
    assert_same(diagnosed(recipe), plain)
    assert times_made() == 3, "what was made again is kept again"


def test_what_cannot_be_written_is_not_kept(tmp_path: Path, times_made: Callable[[], int]) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    recipe = recipe_for(write(tmp_path / "a.jsonl"))
    assert_same(diagnosed(recipe), diagnosed(recipe))
    assert times_made() == 2


def test_what_takes_no_time_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "WORTH_SECONDS", 1e9)
    diagnosed(recipe_for(write(tmp_path / "a.jsonl")))
    assert not (tmp_path / "cache" / "data").exists()


def test_the_oldest_entries_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [write(tmp_path / f"{name}.jsonl", answer=name) for name in ("first", "second", "third")]
    data = tmp_path / "cache" / "data"
    for age, file in enumerate(files[:2]):
        known = set(data.iterdir()) if data.exists() else set()
        diagnosed(recipe_for(file))
        (made,) = set(data.iterdir()) - known
        os.utime(made, (age, age))
    oldest = min(data.iterdir(), key=lambda entry: entry.stat().st_mtime)
    held = sum(file.stat().st_size for file in data.rglob("*") if file.is_file())
    monkeypatch.setattr(kept, "MOST_BYTES", held * 6 // 5)
    diagnosed(recipe_for(files[2]))
    assert len(list(data.iterdir())) == 2
    assert not oldest.exists()


def test_sources_without_files_are_not_kept() -> None:
    for source in ("stdlib", "owner/data-set-of-nobody"):
        assert kept.key_of(recipe_for(Path(source)), tiny_tokenizer(), {}) is None
