"""Do the other trainers accept the configurations that `tunewise plan --export` writes for them?

python benchmarks/export/accept.py --json OUT [--cache DIR] [--peers trl,axolotl]

Each tool is installed into an environment of its own (kept under --cache), a spread of recipes (`cases.py`) is written
as its configuration, and its own parser reads every file (`parsers.py`): TRL's `TrlParser`, axolotl's `load_cfg`,
LLaMA-Factory's `get_train_args`, torchtune's `tune validate`, Unsloth's `load_config`. Nothing is trained.
Other tools that OUT holds already are kept, so that they can be tried one after another.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import cases
import environments

from tunewise.errors import TunewiseError
from tunewise.export.peers import PEERS, peer_config

HERE = Path(__file__).parent
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def export_all(peer: str, folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Write every recipe for `peer`; return file -> label, and label -> why tunewise wrote nothing."""
    written, refused = {}, {}
    for number, (label, recipe) in enumerate(cases.recipes()):
        try:
            exported = peer_config(recipe, peer, name=f"case{number}", folder=Path(peer))
        except TunewiseError as error:
            refused[label] = str(error)
            continue
        written[str(exported.write(folder / peer).relative_to(folder))] = label
    return written, refused


def check(peer: str, folder: Path, cache: Path) -> dict[str, Any]:
    """Export, install and parse for one tool."""
    written, refused = export_all(peer, folder)
    result: dict[str, Any] = {"configs": len(written), "refused_by_tunewise": refused}
    try:
        python = environments.python_of(peer, cache)
    except RuntimeError as error:
        return result | {"accepted": 0, "refused": 0, "not_installed": str(error)}
    started = time.perf_counter()
    done = subprocess.run(
        [str(python), str(HERE / "parsers.py"), peer, *written],
        cwd=folder, capture_output=True, text=True, env={**os.environ, **NO_GPU},
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if len(lines) != len(written) + 1:
        return result | {"accepted": 0, "refused": 0, "not_importable": done.stderr[-2000:]}
    version, verdicts = lines[0]["version"], lines[1:]
    files = {Path(file).name: label for file, label in written.items()}
    read_back = Counter(key for verdict in verdicts for key in verdict.get("altered", ()))
    return result | {
        "version": version,
        "accepted": sum(verdict["accepted"] for verdict in verdicts),
        "of_these_with_questions_about_the_gpu_answered": sum(v["accepted"] and v["gpu_answered"] for v in verdicts),
        "refused": sum(not verdict["accepted"] for verdict in verdicts),
        "keys_read_back_otherwise": dict(read_back),
        "examples_read_back": {key: value for verdict in verdicts for key, value in verdict.get("altered", {}).items()},
        "errors": {files[v["file"]]: v["error"] for v in verdicts if not v["accepted"]},
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "tunewise" / "peers")
    parser.add_argument("--peers", default=",".join(PEERS))
    arguments = parser.parse_args()
    out, cache = arguments.json.resolve(), arguments.cache.resolve()
    if not cases.CONFIGS.is_dir():
        raise SystemExit(f"{cases.CONFIGS} is not there; the shapes of the models are read from it.")
    results: dict[str, Any] = json.loads(out.read_text())["tools"] if out.is_file() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chdir(folder)
        cases.write_inputs(folder)
        for peer in arguments.peers.split(","):
            results[peer] = check(peer, folder, cache)
            shown = {key: results[peer].get(key) for key in ("version", "configs", "accepted", "refused")}
            print(f"{PEERS[peer].name}: {shown}", flush=True)
            write(out, results)


def write(out: Path, results: dict[str, Any]) -> None:
    """Write what is known of all tools so far."""
    summary = {
        "tools": len(results),
        **{key: sum(each[key] for each in results.values()) for key in ("configs", "accepted", "refused")},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"summary": summary, "tools": results}, indent=1) + "\n")
    print(summary, flush=True)


if __name__ == "__main__":
    main()
