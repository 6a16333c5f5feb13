"""Are facts that a model does not know learnt later than those it knows, and what do they do to what it knew?

    python benchmarks/quality/unknown_facts.py --json benchmarks/results/cpu-2core/unknown_facts.json --minutes 4

Gekhman et al. 2024 (arXiv 2405.05904): fine-tuning examples with new knowledge are fitted slower; as they are fitted,
what the model knew before falls; stopping early recovers most of it. Rebuilt in the small, with facts that no model can
have met: "The mayor of Zaborin is Keldu Marat." with names drawn at random.

1. The embedded model is taught 240 facts until it knows nearly all of them: its pre-training. Of these 120 are never
   trained on again (`dev` chooses where to stop, `held` is the test), and 80 are the known part of fine-tuning.
2. Fine-tuning on 80 facts: half of them known and half unknown, or all known, or all unknown.
3. At 20 moments: how many facts of each set are recalled. A fact is when every token of its answer is the likeliest,
   which is the same as that greedy decoding gives the answer.

A call ends after `--minutes` and the next one goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tunewise import api
from tunewise.engine.assemble import assemble, settle
from tunewise.engine.run_folder import RunFolder
from tunewise.engine.train import Training
from tunewise.methods.reading import recipe_from_mapping
from tunewise.reproduce.unknown_facts import LEARNT, MIXES, facts, recalled
from tunewise.workload.corpus import Corpus

SEEDS = (0, 1, 2)
NUM_KNOWN, NUM_HELD, NUM_TRAINED = 240, 60, 80
TAUGHT_EPOCHS = 24
EPOCHS, EVALUATIONS = 40, 20
"""Of fine-tuning."""


def write(file: Path, records: list[dict[str, str]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    return file


def recipe_of(model: str, data: Path, epochs: float, rate: float, seed: int, schedule: str) -> dict[str, Any]:
    """Return a full fine-tuning: where facts are stored is no question of rank."""
    return {
        "model": {"name": model, "tokenizer": "embedded"},
        "data": {"source": str(data), "validation_fraction": 0.0},
        "methods": {"packing": {"row_tokens": 512}, "precision": {"compute": "fp32"}},
        "batch": {"documents": 16},
        "training": {"epochs": epochs, "learning_rate": rate, "schedule": schedule, "spike": None},
        "evaluation": {"every": 10**6, "keep_best": False, "max_documents": 1},
        "checkpoints": {"every": 10**6, "keep": 1},
        "seed": seed,
        "device": "cpu",
    }


def corpus_of(model: str, file: Path) -> Corpus:
    return settle(recipe_from_mapping(recipe_of(model, file, 1, 1e-3, 0, "constant"))).data.train


def teach(seed: int, folder: Path) -> Path:
    """Teach the embedded model what it will know; return the folder of the model."""
    if not (folder / "taught" / "model" / "config.json").is_file():
        shutil.rmtree(folder / "taught", ignore_errors=True)
        data = write(folder / "known.jsonl", facts(seed, NUM_KNOWN + NUM_TRAINED)[:NUM_KNOWN])
        api.train(
            recipe_from_mapping(recipe_of("embedded", data, TAUGHT_EPOCHS, 1e-3, seed, "cosine")), out=folder / "taught"
        )
    return folder / "taught" / "model"


def fine_tune(seed: int, mix: str, folder: Path) -> dict[str, Any]:
    """Fine-tune the taught model on a mix, and follow what it recalls."""
    model, every = str(teach(seed, folder)), facts(seed, NUM_KNOWN + NUM_TRAINED)
    known, unknown = every[2 * NUM_HELD : 2 * NUM_HELD + NUM_TRAINED], every[NUM_KNOWN:]
    num_unknown = round(MIXES[mix] * NUM_TRAINED)
    sets = {"dev": every[:NUM_HELD], "held": every[NUM_HELD : 2 * NUM_HELD]}
    sets |= {"practised": known[num_unknown:], "unknown": unknown[:num_unknown]}
    home = folder / mix.replace(" ", "-")
    corpora = {name: corpus_of(model, write(home / f"{name}.jsonl", part)) for name, part in sets.items() if part}
    data = write(home / "train.jsonl", sets["practised"] + sets["unknown"])
    plan = settle(recipe_from_mapping(recipe_of(model, data, EPOCHS, 3e-4, seed, "constant")))
    run = assemble(plan)
    curve: list[dict[str, Any]] = []

    def look(step: int) -> None:
        shares = {name: statistics.mean(recalled(run, corpus)) for name, corpus in corpora.items()}
        curve.append({"epoch": step / (plan.num_steps / EPOCHS), **shares})

    def observe(entry: dict[str, Any]) -> None:
        if entry["event"] == "step" and entry["step"] % (plan.num_steps // EVALUATIONS) == 0:
            look(entry["step"])

    look(0)
    run_folder = RunFolder(home / "run")
    run_folder.open()
    try:
        Training(run, plan.data.train, plan.data.validation, plan.num_steps, run_folder, observe, saves=False).run()
    finally:
        run_folder.close()
    return {"seed": seed, "mix": mix, "curve": curve}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return, over seeds, when sets were learnt, and what was known before, when stopped early, and at the end."""
    found: dict[str, Any] = {}
    for mix in MIXES:
        mine = [row["curve"] for row in rows if row["mix"] == mix]
        if not mine:
            continue
        figures: dict[str, Any] = {"seeds": len(mine)}
        for name in ("practised", "unknown"):
            if name in mine[0][0]:
                figures[f"{name} learnt at epoch"] = [_learnt_at(curve, name) for curve in mine]
        figures["held before"] = statistics.mean(curve[0]["held"] for curve in mine)
        figures["held at the end"] = statistics.mean(curve[-1]["held"] for curve in mine)
        early = [_early(curve) for curve in mine]
        figures["held when stopped early"] = statistics.mean(point["held"] for point in early)
        figures["early epoch"] = statistics.mean(point["epoch"] for point in early)
        if "unknown" in mine[0][0]:
            figures["unknown when stopped early"] = statistics.mean(point["unknown"] for point in early)
            figures["unknown at the end"] = statistics.mean(curve[-1]["unknown"] for curve in mine)
        found[mix] = figures
    if len(found) == len(MIXES):
        found["as published"] = _as_published(found)
    return found


def _learnt_at(curve: list[dict[str, Any]], name: str) -> float | None:
    return next((point["epoch"] for point in curve if point[name] >= LEARNT), None)


def _early(curve: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the point after the start where `dev` is recalled best; of equal ones the last, which has learnt more."""
    return max(curve[1:], key=lambda point: (point["dev"], point["epoch"]))


def _as_published(found: dict[str, Any]) -> dict[str, bool]:
    half, known = found["half unknown"], found["known only"]
    late = [epoch or float(EPOCHS) for epoch in half["unknown learnt at epoch"]]
    return {
        "unknown facts are learnt later than known ones": all(
            known_at is not None and at > known_at
            for at, known_at in zip(late, half["practised learnt at epoch"], strict=True)
        ),
        "known facts fall more with unknown ones in the mix": half["held at the end"] < known["held at the end"],
        "the more unknown, the deeper the fall": found["unknown only"]["held at the end"] < half["held at the end"],
        "stopping early recovers known facts": half["held when stopped early"] > half["held at the end"],
    }


def asked(description: str | None, name: str) -> tuple[argparse.Namespace, list[dict[str, Any]]]:
    """Return the command line of a benchmark that goes on where it was, and the rows that its OUT holds already."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="OUT")
    parser.add_argument("--folder", type=Path, default=Path("runs") / name)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin nothing new after so long")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if arguments.json.is_file():
        rows = json.loads(arguments.json.read_text(encoding="utf-8"))["rows"]
    return arguments, rows


def main() -> int:
    arguments, rows = asked(__doc__, "unknown-facts")
    end = time.monotonic() + 60 * arguments.minutes
    done = {(row["seed"], row["mix"]) for row in rows}
    left = [(seed, mix) for seed in SEEDS for mix in MIXES if (seed, mix) not in done]
    for number, (seed, mix) in enumerate(left):
        if time.monotonic() > end:
            print(f"{len(left) - number} of {len(left)} left; the same command goes on")
            break
        started = time.monotonic()
        rows.append(fine_tune(seed, mix, arguments.folder / str(seed)))
        print(f"seed {seed}, {mix}: {time.monotonic() - started:.0f} s", flush=True)
        content = {
            "command": "benchmarks/quality/unknown_facts.py " + " ".join(sys.argv[1:]),
            "machine": platform.processor() or platform.machine(), "torch": torch.__version__,
            "summary": summary(rows), "rows": rows,
        }  # fmt: skip
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary(rows), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
