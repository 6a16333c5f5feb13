"""A checkpoint is there wholly or not at all, and a damaged one is noticed."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from tunewise.engine import checkpoint
from tunewise.errors import CheckpointError, StorageError


def save(folder: Path, step: int) -> Path:
    return checkpoint.save_checkpoint(folder, step, {"w": torch.full((3,), float(step))}, {"step": step})


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    path = save(tmp_path, 12)
    assert path.name == "step-00000012"
    tensors, state = checkpoint.load_checkpoint(path)
    assert tensors["w"].tolist() == [12.0] * 3
    assert state == {"step": 12}


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damage_is_noticed_and_the_last_good_one_used(tmp_path: Path, name: str, damage: str) -> None:
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    content = file.read_bytes()
    if damage == "truncate":
        file.write_bytes(content[:-5])
    elif damage == "flip":
        file.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    else:
        file.unlink()
    with pytest.raises(CheckpointError):
        checkpoint.load_checkpoint(file.parent)
    path, _, state, problems = checkpoint.newest_intact(tmp_path)
    assert (path.name, state["step"], len(problems)) == ("step-00000001", 1, 1)


def test_a_damaged_manifest_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "manifest.json").write_text(json.dumps({"tensors.safetensors": None}))
    with pytest.raises(CheckpointError):
        checkpoint.load_checkpoint(path)


def test_no_intact_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no intact checkpoint"):
        checkpoint.newest_intact(tmp_path)


def test_a_half_written_checkpoint_is_invisible_and_cleaned_up(tmp_path: Path) -> None:
    partial = tmp_path / ".partial-step-00000005"
    partial.mkdir()
    (partial / "tensors.safetensors").write_bytes(b"half")
    assert checkpoint.list_checkpoints(tmp_path) == []
    save(tmp_path, 6)
    assert not partial.exists()


def test_a_full_disk_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"No space left.*last good checkpoint is .*step-00000001"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [1]


def test_old_ones_go_but_the_best_stays(tmp_path: Path) -> None:
    for step in range(1, 7):
        save(tmp_path, step)
    checkpoint.remove_old(tmp_path, keep=2, keep_also=3)
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [3, 5, 6]


def test_an_error_that_is_not_the_disks_is_not_disguised() -> None:
    with pytest.raises(FileNotFoundError), checkpoint.storage_errors("cannot write"):
        raise FileNotFoundError(errno.ENOENT, "gone")
