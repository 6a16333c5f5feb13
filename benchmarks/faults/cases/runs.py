"""Bad runs, checkpoints and disks: nothing to resume, damaged, changed, locked, full, read-only."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from contextlib import ExitStack
from pathlib import Path

import yaml
from benchmarks.faults.cases.case import (
    Case,
    Spoil,
    also,
    bound,
    change_json,
    flip_byte,
    largest_file,
    leave,
    read_only_disk,
    remove,
    small_disk,
    train,
    truncate,
    write,
)

RESUME = ("train", "--resume", "run")
EXPORT = ("export", "run", "--merged", "merged")
NEWEST, OLDER = "run/checkpoints/step-00000004", "run/checkpoints/step-00000002"
GOES_ON = ("run/checkpoints/*",)
"""What a run that goes on may change: it replaces checkpoints by newer ones."""


def _goes_on(what: str, spoil: Spoil, *says: str) -> Case:
    return Case(f"run: {what}", RESUME, says, spoil, exit_code=0, may_change=GOES_ON)


def _refused(what: str, spoil: Spoil, *says: str) -> Case:
    return Case(f"run: {what}", RESUME, says, spoil)


def _edit_recipe(folder: Path) -> None:
    file = folder / "run/recipe.yaml"
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    content["training"]["learning_rate"] *= 2
    file.write_text(yaml.safe_dump(content), encoding="utf-8")


def _more_data(folder: Path) -> None:
    with (folder / "data.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"prompt": "One more?", "completion": "Yes."}) + "\n")


def _other_layout(folder: Path) -> None:
    """A checkpoint that is intact, but whose state lacks what we need, as of another version."""
    for step in (NEWEST, OLDER):
        change_json(f"{step}/state.json", progress=...)(folder)
        content = (folder / step / "state.json").read_bytes()
        manifest = json.loads((folder / step / "manifest.json").read_text(encoding="utf-8"))
        manifest["state.json"] = {"sha256": hashlib.sha256(content).hexdigest(), "num_bytes": len(content)}
        (folder / step / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def _lock(folder: Path, stack: ExitStack) -> None:
    stream = stack.enter_context((folder / "run/.lock").open("a"))
    fcntl.flock(stream, fcntl.LOCK_EX)


def _no_writing(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).mkdir(exist_ok=True)
        os.chmod(folder / name, 0o555)

    return spoil


def _full_metrics(folder: Path) -> None:
    """A device that answers every write with "no space left on device"."""
    (folder / "run/metrics.jsonl").unlink()
    (folder / "run/metrics.jsonl").symlink_to("/dev/full")


def _no_write(name: str, what: str, arguments: tuple[str, ...], *says: str) -> Case:
    return Case(f"disk: {what}", arguments, (name, *says), _no_writing(name), around=bound)


RUNS = (
    Case("run: resume of nothing", ("train", "--resume", "rnu"), ("There is no run to resume in 'rnu'",)),
    Case(
        "run: resume of a folder that is no run", ("train", "--resume", "model"), ("no run to resume", "no recipe.yaml")
    ),
    Case("run: resume of a file", ("train", "--resume", "data.jsonl"), ("There is no run to resume in 'data.jsonl'",)),
    _goes_on("killed before its first checkpoint: begins anew", remove("run/checkpoints"), "done"),
    _goes_on(
        "the newest checkpoint is cut off: the older one is taken",
        truncate(f"{NEWEST}/tensors.safetensors"),
        "damaged checkpoint",
        "step-00000004/tensors.safetensors is damaged",
        "resumed after step 2",
    ),
    _goes_on(
        "the newest checkpoint was tampered with: the older one is taken",
        flip_byte(f"{NEWEST}/tensors.safetensors"),
        "damaged checkpoint",
        "resumed after step 2",
    ),
    _goes_on(
        "the newest checkpoint lacks its manifest: the older one is taken",
        remove(f"{NEWEST}/manifest.json"),
        "damaged checkpoint",
        "resumed after step 2",
    ),
    _goes_on(
        "a half-written checkpoint lies about",
        write("run/checkpoints/.partial-step-00000006/tensors.safetensors", b"x"),
        "resumed after step 4",
        "done",
    ),
    _goes_on("the last line of metrics.jsonl is cut off", truncate("run/metrics.jsonl", 0.99), "resumed after step 4"),
    _refused(
        "every checkpoint is damaged",
        also(truncate(f"{NEWEST}/state.json"), flip_byte(f"{OLDER}/state.json")),
        "There is no intact checkpoint",
        "step-00000004/state.json is damaged",
        "step-00000002/state.json is damaged",
    ),
    _refused("a checkpoint of another version", _other_layout, "step-00000004 is intact", "'progress'"),
    _refused("recipe.yaml was edited", _edit_recipe, "cannot go on", "the recipe changed"),
    _refused("recipe.yaml is broken", write("run/recipe.yaml", "model: ["), "run/recipe.yaml", "not valid YAML"),
    _refused("the data changed", _more_data, "cannot go on", "the data changed"),
    _refused("the data are gone", remove("data.jsonl"), "data.jsonl", "no such file"),
    _refused(
        "the model changed", change_json("model/config.json", rms_norm_eps=1e-3), "cannot go on", "the model changed"
    ),
    _refused("the model is gone", remove("model/config.json"), "has no config.json"),
    _refused(
        "data.json is missing", remove("run/data.json"), "run/data.json", "nobody can tell whether the data changed"
    ),
    _refused(
        "data.json is a list", write("run/data.json", "[]"), "run/data.json", "nobody can tell whether the data changed"
    ),
    Case("run: locked by another process", RESUME, ("Another process is training in run",), leave, around=_lock),
    Case(
        "run: the folder holds a run already",
        ("train", "--model", "model", "--data", "data.jsonl", "--out", "run"),
        ("'run' already holds a run", "tunewise train --resume run"),
    ),
    Case("run: --out is a file", train("--out", "data.jsonl"), ("'data.jsonl' is a file", "name a folder with --out")),
    Case(
        "run: --out lies in a file",
        train("--out", "data.jsonl/out"),
        ("data.jsonl/out", "Not a directory", "A file is in the way"),
    ),
    Case(
        "run: export of a folder that is no run",
        ("export", "model", "--merged", "merged"),
        ("There is no run in 'model'",),
    ),
    Case("run: export of a run without checkpoints", EXPORT, ("has no checkpoint to take",), remove("run/checkpoints")),
    Case(
        "run: export of damaged checkpoints",
        EXPORT,
        ("step-00000004/state.json is damaged",),
        also(truncate(f"{NEWEST}/state.json"), truncate(f"{OLDER}/state.json")),
    ),
    Case(
        "run: export into a folder that is not empty", ("export", "run", "--merged", "model"), ("'model' is not empty",)
    ),
    Case("run: export into a file", ("export", "run", "--merged", "data.jsonl"), ("data.jsonl", "name a new folder")),
    Case(
        "run: export of a run whose model changed",
        EXPORT,
        ("cannot be exported", "the model changed"),
        change_json("model/config.json", rms_norm_eps=1e-3),
    ),
)

DISK = (
    _no_write("locked", "a folder that may not be written", train("--out", "locked/out"), "Check its permissions"),
    _no_write(
        "run/checkpoints",
        "checkpoints that may not be written",
        RESUME,
        "Check its permissions",
        "The last good checkpoint is run/checkpoints/step-00000004",
    ),
    _no_write(
        "locked",
        "export into a folder that may not be written",
        ("export", "run", "--merged", "locked/merged"),
        "Check its permissions",
    ),
    Case(
        "disk: a file in place of the folder for checkpoints",
        train(),
        ("out/checkpoints", "A file is in the way"),
        write("out/checkpoints", "in the way"),
        begins_run=True,
    ),
    Case(
        "disk: full while the metrics are written",
        RESUME,
        ("run/metrics.jsonl", "No space left", "Free some space"),
        _full_metrics,
    ),
    Case(
        "disk: full while a checkpoint is written",
        RESUME,
        ("cannot write the checkpoint of step 6", "The last good checkpoint is run/checkpoints/step-00000004"),
        around=largest_file(30_000),
    ),
    Case(
        "disk: full while the adapter is saved",
        RESUME,
        ("cannot save to run/adapter", "resume to save again"),
        around=largest_file(150_000),
        may_change=GOES_ON,
    ),
    Case(
        "disk: full while a model is exported",
        EXPORT,
        ("cannot save to merged", "Free some space"),
        around=largest_file(150_000),
    ),
    Case(
        "disk: full, a file system of its own",
        RESUME,
        (
            "cannot write the checkpoint of step 6",
            "No space left",
            "Free some space and resume",
            "The last good checkpoint is run/checkpoints/step-00000004",
        ),
        prepare=small_disk("run", 32_768),
        needs="mount",
    ),
    Case(
        "disk: mounted read-only",
        RESUME,
        ("cannot write to the run folder run", "Read-only file system"),
        prepare=read_only_disk("run"),
        needs="mount",
    ),
)

CASES = (*RUNS, *DISK)
