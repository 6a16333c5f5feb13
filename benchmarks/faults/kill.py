"""Kill a training at random moments, resume it each time, and compare the end with a run that nobody killed.

    python benchmarks/faults/kill.py --kills 100 --json kill.json

Each round trains the same recipe (LoRA with dropout, packing, checkpoints every other step) in a child process that is
killed with SIGKILL several times: at a random moment of its life, or while a half-written checkpoint is seen on the
disk. After the last kill it trains to its end; weights, optimizer state, random state and progress of the last
checkpoint, and the saved adapter, must then equal those of the uninterrupted run bit for bit. A kill counts as survived
when its round ends equal. Children are forked from a process that has imported everything, so a kill costs less than a
second.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from tunewise import api
from tunewise.engine.checkpoint import list_checkpoints, load_checkpoint
from tunewise.workload.model import EMBEDDED_FOLDER

KILLS_IN_A_ROUND = 10
STEPS = 60
WRITING_SECONDS = 0.01
"""About how long a checkpoint of this size takes to be written and synced."""


def make_workload(folder: Path) -> dict[str, Any]:
    """Write a tiny random model and some records, and return the recipe that trains on them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    chooser = random.Random(0)
    with (folder / "data.jsonl").open("w") as stream:
        for number in range(120):
            answer = " ".join(chooser.choices(words, k=chooser.randint(3, 30)))
            stream.write(json.dumps({"prompt": f"Question {number}: say", "completion": answer}) + "\n")
    return {
        "model": {"name": str(folder / "model"), "tokenizer": str(EMBEDDED_FOLDER)},
        "data": str(folder / "data.jsonl"),
        "methods": {"lora": {"rank": 4, "dropout": 0.1}, "packing": {"row_tokens": 128}},
        "batch": {"documents": 6, "micro_batch_size": 2},
        "training": {"steps": STEPS, "learning_rate": 1e-3},
        "evaluation": {"every": 7},
        "checkpoints": {"every": 2},
        "quality": "off",
        "device": "cpu",
        "seed": 5,
    }


def train_or_resume(recipe: dict[str, Any], out: Path) -> None:
    """What a child does: resume if the run was begun, else begin it."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    torch.set_num_threads(1)
    if (out / "recipe.yaml").exists():
        api.resume(out)
    else:
        api.train(recipe, out=out)


def fingerprint(out: Path) -> dict[str, str]:
    """Hash what must be equal: the last checkpoint (time spent left out) and the saved adapter."""
    tensors, state = load_checkpoint(list_checkpoints(out / "checkpoints")[-1][1])
    state["progress"].pop("seconds")
    prints = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}
    prints["state"] = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    for name, tensor in load_file(out / "adapter" / "adapter_model.safetensors").items():
        prints[f"adapter/{name}"] = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    return prints


def kill_once(child: Any, out: Path, chooser: random.Random, lifetime: float, in_writing: bool) -> str | None:
    """Kill `child` and return how: "writing" when it left a half-written checkpoint, else "random"; None when it ended.

    The moment is random. With `in_writing` it is soon after the first sight of a half-written checkpoint from then on,
    by a delay that reaches from its first byte to its last.
    """
    left_behind = half_written(out)  # by the kill before
    moment = time.monotonic() + chooser.uniform(0.0, lifetime)
    while child.is_alive() and time.monotonic() < moment:
        time.sleep(0.0005)
    while in_writing and child.is_alive() and not half_written(out) - left_behind:
        time.sleep(0.0002)
    if in_writing:
        time.sleep(chooser.uniform(0.0, WRITING_SECONDS))
    if not child.is_alive():
        return None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    return "writing" if half_written(out) - left_behind else "random"


def half_written(out: Path) -> set[tuple[str, int]]:
    """Return name and time of change of every half-written checkpoint."""
    found = set()
    for path in (out / "checkpoints").glob(".partial-*"):
        with contextlib.suppress(FileNotFoundError):  # it has got its name, or was cleaned up, in between
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def start(recipe: dict[str, Any], out: Path) -> Any:
    child = multiprocessing.get_context("fork").Process(target=train_or_resume, args=(recipe, out))
    child.start()
    return child


def play_round(
    recipe: dict[str, Any], out: Path, kills: int, chooser: random.Random, lifetime: float
) -> dict[str, Any]:
    """Kill one run `kills` times, let it end, and return its fingerprint and how it was killed."""
    done: list[str] = []
    while len(done) < kills:
        child = start(recipe, out)
        how = kill_once(child, out, chooser, lifetime, in_writing=chooser.random() < 0.4)
        if how is None:
            child.join()
            if child.exitcode != 0:
                return {"kills": done, "problem": f"a resume ended with exit code {child.exitcode}"}
            break
        done.append(how)
    child = start(recipe, out)
    child.join()
    if child.exitcode != 0:
        return {"kills": done, "problem": f"the last resume ended with exit code {child.exitcode}"}
    return {"kills": done, "fingerprint": fingerprint(out)}


def main(kills: int, json_file: Path | None, seed: int) -> int:
    torch.set_num_threads(1)
    chooser = random.Random(seed)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = make_workload(folder)
        begun = time.monotonic()
        start(recipe, folder / "reference").join()
        lifetime = time.monotonic() - begun
        reference = fingerprint(folder / "reference")
        rounds: list[dict[str, Any]] = []
        tried = 0
        while tried < kills:
            wanted = min(KILLS_IN_A_ROUND, kills - tried)
            # Each life gets a share of the uninterrupted one, so that a round really is killed `wanted` times.
            result = play_round(recipe, folder / f"round-{len(rounds)}", wanted, chooser, 2.0 * lifetime / (wanted + 1))
            result["equal"] = result.pop("fingerprint", None) == reference
            rounds.append(result)
            tried += len(result["kills"])
            print(f"round {len(rounds)}: {len(result['kills'])} kills, equal: {result['equal']}", flush=True)
    survived = sum(len(result["kills"]) for result in rounds if result["equal"])
    while_writing = sum(result["kills"].count("writing") for result in rounds)
    summary = {
        "tried": tried,
        "survived": survived,
        "while_writing_a_checkpoint": while_writing,
        "seconds": round(time.monotonic() - started, 1),
        "seed": seed,
    }
    if json_file is not None:
        json_file.write_text(json.dumps({"summary": summary, "rounds": rounds}, indent=1))
    print(f"{while_writing} kills hit a checkpoint being written; {summary['seconds']} s")
    print(f"{tried} tried, {survived} survived")
    return 0 if survived == tried else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.exit(main(arguments.kills, arguments.json, arguments.seed))
