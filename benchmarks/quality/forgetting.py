"""What does fine-tuning on one domain cost on another, and what does each cure save? Three seeds, two models.

    python benchmarks/quality/forgetting.py --json benchmarks/results/cpu-2core/forgetting.json --minutes 4

Each model learns tinyshakespeare: the embedded one, whose own domain is Python's standard library, and stories260k, a
real model whose own domain is TinyStories. Every arm learns about the same number of Shakespeare's tokens. Forgetting
is the rise of the loss on held-out text of the model's own domain, gain the fall of the loss on held-out Shakespeare.
The plain arm's last state is scaled from its base to beyond (`tunewise scale`), and its seeds are averaged. A call ends
after `--minutes` and the next one goes on: runs are kept under `--folder`, figures in the JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from forgetting_table import AVERAGE, SCALED, summary, table

from tunewise import api
from tunewise.engine.evaluate import validation_loss
from tunewise.engine.finished import open_finished
from tunewise.methods.reading import recipe_from_mapping

PLACES = [parent / "shared" / "data" for parent in Path(__file__).resolve().parents]
SHARED = next((place for place in PLACES if place.is_dir()), PLACES[3])
SHAKESPEARE = SHARED / "tinyshakespeare" / "input.txt.gz"
SEEDS = (0, 1, 2)
FACTORS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0, 1.125, 1.25)
EVALUATIONS = 6


@dataclass(frozen=True)
class World:
    """A model, the text of its own domain, and how much of Shakespeare it learns at which rate.

    A long one repeats a few arms with four times the tokens; its plain runs are neither scaled nor averaged.
    """

    name: str
    model: str
    general: str
    tokens: int
    learning_rate: float
    budget: float
    arms: tuple[str, ...]
    is_long: bool = False


ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "replay 1 %": {"replay": 0.01},
    "replay 5 %": {"replay": 0.05},
    "replay 25 %": {"replay": 0.25},
    "own text 5 %": {"replay": 0.05, "source": "self"},
    "kl_to_base 0.5": {"methods": {"kl_to_base": {"beta": 0.5}}},
    "l2_sp 1": {"methods": {"l2_sp": {"strength": 1.0}}},
    "rank 2": {"rank": 2},
    "rate / 3": {"rate": 1 / 3},
    "budget": {"budget": True},
}


LONG = (SCALED, "replay 1 %", "replay 5 %", "own text 5 %")
"""What is asked of longer trainings: does the same share of replay remove more?"""

WORLDS = (
    World("stories260k", str(SHARED / "models" / "stories260k"), str(SHARED / "tinystories" / "valid_head.txt.gz"),
          tokens=120_000, learning_rate=5e-3, budget=0.2, arms=tuple(arm for arm in ARMS if arm not in LONG[-1:])),
    World("embedded", "embedded", "default", tokens=30_000, learning_rate=2e-3, budget=0.2,
          arms=(SCALED, "replay 1 %", "replay 5 %", "kl_to_base 0.5", "budget")),
    World("stories260k, four times as long", str(SHARED / "models" / "stories260k"),
          str(SHARED / "tinystories" / "valid_head.txt.gz"), tokens=480_000, learning_rate=5e-3, budget=0.2, arms=LONG,
          is_long=True),
    World("embedded, four times as long", "embedded", "default", tokens=120_000, learning_rate=2e-3, budget=0.2,
          arms=LONG, is_long=True),
)  # fmt: skip


def recipe_of(world: World, arm: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return the recipe of one run; every arm learns about `world.tokens` tokens of Shakespeare."""
    share = arm.get("replay", 0.0)
    data: dict[str, Any] = {"source": str(SHAKESPEARE), "format": "text", "max_length": 128, "too_long": "split"}
    data["validation_fraction"] = 0.02
    if share:
        data["replay"] = {"fraction": share, "source": arm.get("source", world.general)}
    every = max(1, world.tokens // (16 * 127) // EVALUATIONS)
    return {
        "model": world.model,
        "data": data,
        "objective": "continue",
        "methods": {
            "lora": {"rank": arm.get("rank", 16)},
            "packing": {"row_tokens": 512},
            "precision": {"compute": "fp32"},
            **arm.get("methods", {}),
        },
        "batch": {"documents": 16},
        "training": {
            "tokens": round(world.tokens / (1 - share)),
            "learning_rate": world.learning_rate * arm.get("rate", 1.0),
        },
        "evaluation": {
            "every": every,
            "max_documents": 32,
            "general_text": world.general,
            "general_tokens": 4096,
            "keep_best": bool(arm.get("budget")),
            **({"forgetting_budget": world.budget, "every": 1} if arm.get("budget") else {}),
        },
        "checkpoints": {"every": 10**6, "keep": 1},
        "seed": seed,
        "device": "cpu",
    }


def train(world: World, name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train one arm, and measure the state that it keeps."""
    shutil.rmtree(folder, ignore_errors=True)  # what a call that ran out of time has left
    curve: list[dict[str, Any]] = []
    learnt = [0]

    def observe(entry: dict[str, Any]) -> None:
        if entry["event"] == "step":
            learnt[0] += entry["supervised_tokens"]
        if entry["event"] == "evaluation":
            kept = {key: entry[key] for key in ("step", "validation_loss", "general_loss")}
            curve.append({**kept, "tokens": learnt[0]})

    outcome = api.train(recipe_from_mapping(recipe_of(world, ARMS[name], seed)), out=folder, observe=observe).outcome
    kept_step = outcome.best_step if ARMS[name].get("budget") and outcome.best_step is not None else outcome.steps
    end = next(point for point in curve if point["step"] == kept_step)
    return {
        "kind": "run", "world": world.name, "arm": name, "seed": seed,
        "gain": curve[0]["validation_loss"] - end["validation_loss"], "forgetting": outcome.forgetting,
        "base": [curve[0]["validation_loss"], curve[0]["general_loss"]],
        "tokens": end["tokens"], "reason": outcome.reason, "seconds": outcome.seconds, "curve": curve,
    }  # fmt: skip


def scale(world: World, seed: int, folder: Path) -> dict[str, Any]:
    """Sweep the factor of the plain run's change."""
    found = api.sweep_scale(folder, factors=FACTORS)
    points = [[p.factor, p.task_loss, p.general_loss] for p in found.points]
    return {"kind": "sweep", "world": world.name, "arm": SCALED, "seed": seed, "points": points}


def soup(world: World, folders: list[Path]) -> dict[str, Any]:
    """Average the plain runs of all seeds, and measure the average as each of them was measured."""
    finished = open_finished(folders[0], "averaged", others=tuple(folders[1:]))
    data, spec = finished.plan.data, finished.plan.recipe.evaluation
    assert data.general is not None
    run, documents = finished.run, range(min(len(data.validation), spec.max_documents))
    on_task = validation_loss(run, data.validation, documents, run.layout)
    on_general = validation_loss(run, data.general, range(len(data.general)), run.layout)
    losses = [on_task, on_general]
    return {"kind": "soup", "world": world.name, "arm": AVERAGE, "seed": 0, "losses": losses, "lost": finished.lost}


def rest(done: set[tuple[str, str, str, int]], folder: Path) -> Any:
    """Yield (key, function) of everything that is not done yet, a seed after the other."""
    for seed in SEEDS:
        for world in WORLDS:
            for name in world.arms:
                place = folder / world.name / f"{name.replace(' ', '').replace('/', '-').replace('%', '')}-{seed}"
                yield ("run", world.name, name, seed), lambda w=world, n=name, s=seed, p=place: train(w, n, s, p)
                if name == SCALED and not world.is_long:
                    yield ("sweep", world.name, name, seed), lambda w=world, s=seed, p=place: scale(w, s, p)
    for world in (world for world in WORLDS if not world.is_long):
        places = [folder / world.name / f"{SCALED}-{seed}" for seed in SEEDS]
        yield ("soup", world.name, AVERAGE, 0), lambda w=world, p=places: soup(w, p)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="OUT")
    parser.add_argument("--folder", type=Path, default=Path("runs") / "forgetting")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin nothing new after so long")
    parser.add_argument("--only", default=None, help="one world")
    arguments = parser.parse_args()
    if not SHAKESPEARE.is_file():
        print(f"needs the data in {SHARED}", file=sys.stderr)
        return 2
    end = time.monotonic() + 60 * arguments.minutes
    rows: list[dict[str, Any]] = []
    if arguments.json.is_file():
        rows = json.loads(arguments.json.read_text(encoding="utf-8"))["rows"]
    done = {(row["kind"], row["world"], row["arm"], row["seed"]) for row in rows}
    left = [each for each in rest(done, arguments.folder) if each[0] not in done]
    left = [each for each in left if arguments.only in (None, each[0][1])]
    for number, (key, work) in enumerate(left):
        if time.monotonic() > end:
            print(f"{len(left) - number} of {len(left)} left; the same command goes on")
            break
        started = time.monotonic()
        rows.append(work())
        print(f"{' '.join(map(str, key))}: {time.monotonic() - started:.0f} s", flush=True)
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "command": "benchmarks/quality/forgetting.py " + " ".join(sys.argv[1:]),
            "machine": platform.processor() or platform.machine(), "torch": torch.__version__,
            "threads": torch.get_num_threads(), "summary": summary(rows), "rows": rows,
        }  # fmt: skip
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(table(summary(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
