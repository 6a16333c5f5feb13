"""What the documents say is what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tunewise.methods import BY_NAME
from tunewise.methods.reading import load_recipe, read_yaml
from tunewise.reproduce import BY_NAME as BY_REPRODUCTION
from tunewise.reproduce.keeping import read_result

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "reproductions").rglob("*.md")])
OVERVIEW = (ROOT / "docs" / "reproductions.md").read_text(encoding="utf-8")


def test_the_method_cards_are_current() -> None:
    script = ROOT / "docs" / "make_method_cards.py"
    assert subprocess.run([sys.executable, script, "--check"]).returncode == 0, f"run: python {script}"


def test_the_pages_of_reproductions_are_current() -> None:
    script = ROOT / "docs" / "make_reproductions.py"
    assert subprocess.run([sys.executable, script, "--check"]).returncode == 0, f"run: python {script}"


@pytest.mark.parametrize("name", BY_REPRODUCTION)
def test_every_reproduction_has_a_page_that_explains_its_result_or_is_named_as_missing(name: str) -> None:
    folder = ROOT / "reproductions" / name
    if not (folder / "result.json").is_file():
        (missing,) = [line for line in OVERVIEW.splitlines() if line.startswith("Not measured yet:")]
        assert name in missing.removeprefix("Not measured yet: ").removesuffix(".").split(", ")
        return
    result = read_result(folder / "result.json")
    assert result is not None
    assert {each.claim.key for each in result.judged} == {claim.key for claim in BY_REPRODUCTION[name].claims}
    _, _, by_hand = (folder / "README.md").read_text(encoding="utf-8").partition("## Same or not, and why")
    assert len(by_hand.split()) >= 10


@pytest.mark.parametrize("file", sorted((ROOT / "examples").rglob("*.yaml")), ids=lambda file: file.name)
def test_every_example_is_a_valid_recipe(file: Path) -> None:
    recipe = load_recipe(file)
    assert {method.name for method in recipe.methods or ()} == set(read_yaml(file).get("methods") or ())


def test_the_readme_names_every_method() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in BY_NAME if f"`{name}`" not in readme] == []


def test_ci_runs_the_readme_command() -> None:
    command = "python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e '.[test]'"
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_what_a_document_links_to_is_there_and_no_merge_was_left_half_done(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert not re.search(r"^(<{7}|>{7}) ", text, re.MULTILINE)
    targets = [target for target in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in target]
    assert [target for target in targets if not (document.parent / target).exists()] == []
