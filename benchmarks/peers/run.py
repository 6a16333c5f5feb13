"""tunewise beside what people would take instead: same model, records, tokens, LoRA shape and optimizer, in turns.

    python benchmarks/peers/run.py --workload short --method lora --peers all --json peers_short_lora.json
    python benchmarks/peers/run.py --workload long --method lora --peers trl-best,litgpt --json peers_long_lora.json
    python benchmarks/peers/run.py --workload long --method lora --size 360M --peers none --nf4 --json qlora_lora.json

Every tool trains once on the same records in a process of its own, as often as there are `--turns`: A B C A B C.
Counted are real tokens (padding is none) in a step's seconds without the first step; the peak resident size above a
process that has only imported torch; and, after equal tokens, the loss per supervised token on the same validation
records by the same plain function. Finished pieces stand in the JSON file; with `--seconds` a call stops starting new
ones and ends with exit code 75, and the same command goes on. `summary` has our median against the peers'."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from benchmarks.peers import problem
from benchmarks.peers.environments import python_of, torch_only_bytes

SIDES = Path(__file__).with_name("side")
OURS = "tunewise"
MORE_OF_OURS: dict[str, dict[str, Any]] = {
    "int8": {"quantize": {"kind": "int8", "compute": "int8", "head_compute": "int8"}},
    "nf4": {"quantize": {"kind": "nf4"}},
}
"""What further entries of ours add to method lora: base and head multiplied in 8 bits; QLoRA. See their loss."""

PEERS: dict[str, tuple[str, str]] = {
    "trl-default": ("trl", "huggingface.py"),
    "trl-best": ("trl", "huggingface.py"),
    "trainer-default": ("trl", "huggingface.py"),
    "trainer-best": ("trl", "huggingface.py"),
    "litgpt": ("litgpt", "litgpt_side.py"),
}
"""From a peer to its environment and the script that runs in it."""

DEFAULT = "trl-default"
UNFINISHED = 75
DOCUMENTS = {"short": 16, "vocab": 16, "long": 1}
STEPS = {"short": 4, "vocab": 4, "long": 4}
LIMIT_SECONDS = 240


def setting_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the model and return what every side is told."""
    folder = arguments.cache / "models" / f"{arguments.size}-{arguments.workload}"
    if not (folder / "config.json").is_file():
        problem.write_model(folder, arguments.size, arguments.workload)
    documents = DOCUMENTS[arguments.workload]
    count = documents * (arguments.steps or STEPS[arguments.workload])
    train = problem.corpus_of(arguments.workload, count)
    validation = problem.corpus_of(arguments.workload, 2 if arguments.workload == "long" else 24, first=count)
    mapping = problem.recipe_mapping(arguments.method, str(folder))
    return {
        "workload": arguments.workload,
        "method": arguments.method,
        "size": arguments.size,
        "model": str(folder),
        "methods": json.loads(arguments.methods),
        "targets": problem.TARGETS,
        "learning_rate": mapping["training"]["learning_rate"],
        "documents": documents,
        "row_tokens": arguments.row_tokens,
        "max_length": 8192,
        "longest": int(max(train.lengths.max(), validation.lengths.max())),
        "tokens_per_step": int(train.lengths.sum()) // (count // documents),
        "threads": torch.get_num_threads(),
        "train": problem.as_lists(train),
        "validation": problem.as_lists(validation),
    }


def run_side(name: str, setting: dict[str, Any], cache: Path) -> dict[str, Any]:
    """Train once with one tool in a process of its own; {"problem": ...} where it cannot."""
    environment, script = PEERS.get(name, ("", "ours.py"))
    try:
        python = python_of(environment, cache) if environment else Path(sys.executable)
    except RuntimeError as error:
        return {"problem": str(error)}
    with tempfile.TemporaryDirectory() as work:
        told, answer = Path(work) / "setting.json", Path(work) / "result.json"
        methods = setting["methods"] | MORE_OF_OURS.get(name.removeprefix(f"{OURS}-"), {})
        told.write_text(json.dumps({**setting, "methods": methods, "peer": name}))
        command = [str(python), str(SIDES / script), str(told), str(answer)]
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        try:
            done = subprocess.run(
                command, cwd=work, env={**os.environ, **offline}, capture_output=True, text=True,
                timeout=LIMIT_SECONDS, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"problem": f"not done after {LIMIT_SECONDS} s"}
        if not answer.is_file():
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
            return {"problem": lines[-1][:400], "tail": lines[-12:]}
        found: dict[str, Any] = json.loads(answer.read_text())
    if len(found["seconds"]) < 2:
        return {"problem": f"packed everything into {len(found['seconds'])} step, and the first one is not timed"}
    found["torch_only_bytes"] = torch_only_bytes(python)
    found["tokens_per_second"] = sum(found["tokens"][1:]) / sum(found["seconds"][1:])
    found["memory_bytes"] = found["peak_resident_bytes"] - found["torch_only_bytes"]
    return found


def summarize(pieces: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the figures of every tool and ours against theirs."""
    tools: dict[str, dict[str, Any]] = {}
    for name, runs in pieces.items():
        good = [run for run in runs if "problem" not in run]
        if not good:
            tools[name] = {"problem": runs[-1]["problem"]}
            continue
        speeds = [run["tokens_per_second"] for run in good]
        tools[name] = {
            "tokens_per_second": round(statistics.median(speeds), 1),
            "turns": [round(speed, 1) for speed in speeds],
            "memory_bytes": int(statistics.median(run["memory_bytes"] for run in good)),
            "validation_loss": round(statistics.median(run["validation_loss"] for run in good), 4),
            "version": good[-1]["version"],
        }
    peers = {name: tool for name, tool in tools.items() if name in PEERS and "problem" not in tool}
    ours = tools.get(OURS, {"problem": "not run"})
    summary: dict[str, Any] = {"tools": tools}
    if "problem" in ours:
        return summary
    for kind in MORE_OF_OURS:
        own = tools.get(f"{OURS}-{kind}", {"problem": "not run"})
        if "problem" not in own:
            beside = {
                "speed_vs_ours": own["tokens_per_second"] / ours["tokens_per_second"],
                "memory_vs_ours": own["memory_bytes"] / ours["memory_bytes"],
                "loss_vs_ours": own["validation_loss"] - ours["validation_loss"],
            }
            summary[kind] = {name: round(number, 4) for name, number in beside.items()} | _beside_peers(own, peers)
    return summary | _beside_peers(ours, peers)


def _beside_peers(ours: dict[str, Any], peers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """An entry of ours against the fastest peer, the leanest and the one with defaults; nothing without peers."""
    if not peers:
        return {}
    fastest = max(peers, key=lambda name: peers[name]["tokens_per_second"])
    leanest = min(peers, key=lambda name: peers[name]["memory_bytes"])
    speed = ours["tokens_per_second"]
    found = {
        "ratio_vs_best": round(speed / peers[fastest]["tokens_per_second"], 2),
        "fastest_peer": fastest,
        "memory_vs_leanest": round(ours["memory_bytes"] / peers[leanest]["memory_bytes"], 3),
        "leanest_peer": leanest,
        "loss_gap": round(ours["validation_loss"] - peers[fastest]["validation_loss"], 4),
    }
    if DEFAULT in peers:
        found["ratio_vs_default"] = round(speed / peers[DEFAULT]["tokens_per_second"], 2)
    return found


def main(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    chosen = {"all": list(PEERS), "none": []}.get(arguments.peers, arguments.peers.split(","))
    unknown = [name for name in chosen if name not in PEERS]
    if unknown:
        sys.exit(f"there is no peer '{unknown[0]}'; there are {', '.join(PEERS)}")
    setting = setting_of(arguments)
    told = {key: value for key, value in setting.items() if key not in ("train", "validation")}
    result: dict[str, Any] = {"setting": told, "pieces": {}}
    if arguments.json.is_file():
        before = json.loads(arguments.json.read_text())
        if before["setting"] != told:
            sys.exit(f"{arguments.json} holds another setting; choose another file")
        result = before
    pieces: dict[str, list[dict[str, Any]]] = result["pieces"]
    for turn in range(arguments.turns):
        for name in (OURS, *(f"{OURS}-{kind}" for kind in MORE_OF_OURS if getattr(arguments, kind)), *chosen):
            runs = pieces.setdefault(name, [])
            if len(runs) > turn or (runs and "problem" in runs[-1]):
                continue
            if arguments.seconds is not None and time.monotonic() - started > arguments.seconds:
                return UNFINISHED
            runs.append(run_side(name, setting, arguments.cache))
            last = runs[-1]
            shown = last.get("problem") or (
                f"{last['tokens_per_second']:8.1f} tokens/s  {last['memory_bytes'] / 2**30:6.2f} GiB  "
                f"loss {last['validation_loss']:.4f}"
            )
            print(f"{turn + 1}/{arguments.turns} {name:16} {shown}", flush=True)
            result["summary"] = summarize(pieces)
            result["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            result["machine"] = {"cores": os.cpu_count(), "threads": setting["threads"]}
            arguments.json.write_text(json.dumps(result, indent=1))
    result["summary"] = summarize(pieces)
    arguments.json.write_text(json.dumps(result, indent=1))
    print(json.dumps({key: value for key, value in result["summary"].items() if key != "tools"}))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=problem.WORKLOADS, default="short")
    parser.add_argument("--method", choices=("lora", "qlora", "full", "scratch"), default="lora")
    parser.add_argument("--peers", default="all", help="all, none, or names with commas: " + ", ".join(PEERS))
    parser.add_argument("--size", choices=problem.SIZES, default="70M")
    parser.add_argument("--methods", default='{"fused": {}}', help="JSON: methods added to our recipe")
    for kind in MORE_OF_OURS:
        parser.add_argument(f"--{kind}", action="store_true", help=f"method lora: also our entry over {kind}")
    parser.add_argument("--row-tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=None)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "tunewise-peers")
    parser.add_argument("--json", type=Path, required=True)
    sys.exit(main(parser.parse_args()))
