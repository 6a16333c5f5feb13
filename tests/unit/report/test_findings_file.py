"""Findings from their file, and every way in which that can fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.report.samples import CASES, findings
from tunewise.errors import InputError
from tunewise.report.findings_file import FINDINGS_FILE, read_findings


@pytest.mark.parametrize("case", sorted(CASES))
def test_findings_survive_their_file(case: str, tmp_path: Path) -> None:
    found = CASES[case]()
    (tmp_path / FINDINGS_FILE).write_text(found.model_dump_json(indent=1), encoding="utf-8")
    assert read_findings(tmp_path) == found


def test_no_folder_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"There is no folder '.*nowhere'\. Name the folder of a tuning"):
        read_findings(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"There is no findings\.json in .* a training alone has none"):
        read_findings(tmp_path)


@pytest.mark.parametrize("content", [b"", b'{"tunewise": "0.1.0", "da', b"\xff\xfe\x00", b"null", b"[1, 2]", b"{}"])
def test_a_damaged_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / FINDINGS_FILE).write_bytes(content)
    with pytest.raises(InputError, match=r"findings\.json is damaged.*Run the same command again"):
        read_findings(tmp_path)


def test_a_wrong_field_is_named(tmp_path: Path) -> None:
    content = json.loads(findings().model_dump_json())
    content["batch"]["curve"][0]["loss"]["low"] = "three"
    content["tunewise"] = json.loads(json.dumps(_installed()))
    (tmp_path / FINDINGS_FILE).write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"damaged: batch\.curve\.0\.loss\.low: .*valid number.*\(1 such places\)"):
        read_findings(tmp_path)


def test_another_version_with_other_fields(tmp_path: Path) -> None:
    content = json.loads(findings().model_dump_json())
    content |= {"tunewise": "9.9", "colour": "green"}
    (tmp_path / FINDINGS_FILE).write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"written by tunewise 9\.9, and this is tunewise .*\(at colour\)"):
        read_findings(tmp_path)


def test_another_version_with_the_same_fields_is_read(tmp_path: Path) -> None:
    found = findings(tunewise="0.0.9")
    (tmp_path / FINDINGS_FILE).write_text(found.model_dump_json())
    assert read_findings(tmp_path).tunewise == "0.0.9"


def _installed() -> str:
    from importlib import metadata

    return metadata.version("tunewise")
