"""How much `tunewise tune` loses against trying everything, and what it costs beside it.

    python benchmarks/regret/run.py --workload embedded|stories --json OUT [--small] [--folder DIR] [--seconds N]

The grid is exhaustive: every batch x learning rate x combination of methods is trained to the end of the same number
of tokens, each in a process of its own. Its best recipe is the one that ends within 0.01 nats of the lowest loss in
the least time; that is what "time to the target loss" means where every run decays to zero. Then a tuning of the same
recipe looks for it without seeing the grid. Both answers are trained again in turns with fresh seeds: times are
compared by medians, losses by their means. (The lowest of 120 losses of one seed is low by luck as well, so it is no
measure for another recipe; it is given beside.)

The grid is kept in --folder and continued there; --seconds ends this call after so long (exit code 3: not finished).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunewise.lab.arms import ArmSpec, arm_recipe, beta2_of, half_life_kept
from tunewise.lab.factors import FactorSpace, On, factor_space
from tunewise.lab.outcome import Measurement
from tunewise.lab.trial import Trial
from tunewise.lab.tuning import BATCH_SHARE, CONFIRM_SHARE, METHODS_SHARE, Options, Tuning
from tunewise.methods.reading import recipe_from_mapping
from tunewise.recipe import Recipe

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
BAND = 0.01
"""Nats above the lowest loss that still count as reaching it."""

SEARCH_SHARE = 0.13
"""Of the grid's compute, what the tuning may spend; the aim is 15 %, and a trial may last longer than expected."""

SHORTEST_SEARCH = 60.0
"""Seconds; with less than this there is no search. On a small grid it is a larger share, and the summary says so."""

REPEATS = 6
"""Fresh seeds with which both answers are trained again."""


@dataclass(frozen=True)
class Workload:
    """A recipe to start from and what the grid varies.

    Attributes:
        recipe: where the tuning starts.
        batches: supervised tokens a step.
        rates: factors on the square-root rule's learning rate.
        methods: factors whose combinations are tried, where the machine has them (it may lack bf16); others are as in
            the recipe.
    """

    recipe: dict[str, Any]
    batches: tuple[int, ...]
    rates: tuple[float, ...]
    methods: tuple[str, ...]


WORKLOADS = {
    "embedded": Workload(
        recipe={
            "model": "embedded",
            "data": {"source": "stdlib", "max_records": 200},
            "methods": {"lora": {"rank": 16}, "packing": {"row_tokens": 1024}},
            "batch": {"documents": 8},
            "training": {"epochs": 1, "learning_rate": 2e-3},
            "evaluation": {"max_documents": 60},
        },
        batches=(128, 256, 512, 1024, 2048),
        rates=(0.5, 1.0, 2.0),
        methods=("bf16", "packing", "attention"),
    ),
    "stories": Workload(
        recipe={
            "model": str(SHARED / "models" / "stories260k"),
            "data": {
                "source": str(SHARED / "gpteacher" / "toolformer_sim06.jsonl.gz"),
                "max_length": 512,
                "max_records": 300,
            },
            "methods": {"lora": {"rank": 16}, "packing": {"row_tokens": 1024}},
            "batch": {"documents": 16},
            "training": {"epochs": 1, "learning_rate": 5e-3},
            "evaluation": {"max_documents": 60},
        },
        batches=(128, 256, 512, 1024, 2048),
        rates=(0.5, 1.0, 2.0),
        methods=("bf16", "packing", "attention"),
    ),
}


def smaller(workload: Workload) -> Workload:
    """Return a workload whose grid takes minutes: fewer records, and two methods instead of three."""
    data = {**workload.recipe["data"], "max_records": 120}
    return Workload({**workload.recipe, "data": data}, workload.batches[1:], workload.rates, workload.methods[:2])


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    batch_tokens: int
    learning_rate: float
    on: On
    outcome: Measurement

    @property
    def loss(self) -> float:
        """The final validation loss."""
        assert self.outcome.loss is not None
        return self.outcome.loss


class Bench:
    """The workload's place, laboratory and factors."""

    def __init__(self, workload: Workload, folder: Path) -> None:
        self.workload = workload
        self.recipe = recipe_from_mapping(workload.recipe)
        self.tuning = Tuning(self.recipe, Options(), folder / "grid", trains_at_the_end=False)
        self.tuning.open()
        place = self.tuning.place
        self.space = self._space(place.recipe)

    def _space(self, recipe: Recipe) -> FactorSpace:
        place = self.tuning.place
        space = factor_space(recipe, place.plan.config, place.machine, place.predictor(recipe))
        present = space.of_base()
        self.methods = tuple(name for name in self.workload.methods if name in space.names)
        others = [name for name in space.names if name not in self.methods]
        return space.holding(name for name in others if name in present).without(
            name for name in others if name not in present
        )

    def cells(self) -> list[tuple[int, float, On]]:
        """Every batch x learning rate x combination of methods, in an order that mixes slow and fast ones."""
        rate = self.tuning.place.recipe.training.learning_rate
        assert rate is not None
        combinations = [
            frozenset(chosen)
            for size in range(len(self.methods) + 1)
            for chosen in itertools.combinations(self.methods, size)
        ]
        own = self.tuning.place.batch_tokens
        return [
            (batch, float(f"{rate * (batch / own) ** 0.5 * factor:.4g}"), on)
            for batch in self.workload.batches
            for factor in self.workload.rates
            for on in combinations
        ]

    def train(self, recipe: Recipe, batch: int, rate: float, label: str, repeat: int = 0) -> Measurement:
        """Train a recipe to the end of the run's tokens."""
        beta2 = half_life_kept(beta2_of(recipe.methods or ()), batch / self.tuning.place.batch_tokens)
        spec = ArmSpec(2, batch, rate, beta2, recipe.seed, self.tuning.place.run_tokens)
        return self._learn(arm_recipe(recipe, spec), label, batch, rate, repeat)

    def train_again(self, recipe: Recipe, label: str, repeat: int) -> Measurement:
        """Train a tuned recipe as the grid's runs are trained; its batch, rate and beta2 are its own."""
        batch, rate = recipe.batch.supervised_tokens, recipe.training.learning_rate
        assert batch is not None
        assert rate is not None
        spec = ArmSpec(2, batch, rate, beta2_of(recipe.methods or ()), recipe.seed, self.tuning.place.run_tokens)
        return self._learn(arm_recipe(recipe, spec), label, batch, rate, repeat)

    def _learn(self, recipe: Recipe, label: str, batch: int, rate: float, repeat: int) -> Measurement:
        outcome = self.tuning.laboratory.run(
            "batch size",
            Trial.of("learn", recipe, repeat=repeat),
            params={"batch_tokens": batch, "learning_rate": rate, "repeat": repeat},
            role=label,
            expected_seconds=60.0,
        )
        if not isinstance(outcome, Measurement):
            raise SystemExit(f"{label}: {outcome.reason}")
        return outcome


def run_grid(bench: Bench, deadline: float) -> list[Cell]:
    """Train the whole grid, or end this call when the time is over."""
    found: list[Cell] = []
    for batch, rate, on in bench.cells():
        if time.monotonic() > deadline:
            print(f"{len(found)} of {len(bench.cells())} runs done; call again to go on")
            raise SystemExit(3)
        label = f"{batch} tokens, {rate:g}, {bench.space.label(on)}"
        found.append(Cell(batch, rate, on, bench.train(bench.space.recipe(on), batch, rate, label)))
    return found


def run_tuning(bench: Bench, folder: Path, seconds: float) -> Tuning:
    """Search as `tunewise tune` does, without the final training."""
    tuning = Tuning(bench.recipe, Options(budget_seconds=seconds), folder / "tuning", trains_at_the_end=False)
    tuning.open()
    try:
        tuning.measure_throughput()
        left = tuning.search_seconds()
        tuning.study_batch(BATCH_SHARE * left)
        tuning.study_methods(METHODS_SHARE * left)
        tuning.confirm(CONFIRM_SHARE * left)
    finally:
        tuning.close()
    return tuning


def compare(bench: Bench, cells: list[Cell], tuned: Recipe) -> dict[str, Any]:
    """Train the grid's best recipe and the tuned one again, in turns, with fresh seeds, and compare time and loss."""
    lowest = min(cell.loss for cell in cells)
    best = min((c for c in cells if c.loss <= lowest + BAND), key=lambda c: c.outcome.training_seconds)
    ours: dict[str, list[Measurement]] = {"grid": [], "tuned": []}
    for repeat in range(1, REPEATS + 1):
        of_grid = fresh(bench.space.recipe(best.on), repeat)
        ours["grid"].append(bench.train(of_grid, best.batch_tokens, best.learning_rate, "grid's best", repeat))
        ours["tuned"].append(bench.train_again(fresh(tuned, repeat), "tuned", repeat))
    seconds = {name: [each.training_seconds for each in runs] for name, runs in ours.items()}
    losses = {name: [each.loss for each in runs if each.loss is not None] for name, runs in ours.items()}
    gap = statistics.mean(losses["tuned"]) - statistics.mean(losses["grid"])
    return {
        "best": {
            "batch_tokens": best.batch_tokens,
            "learning_rate": best.learning_rate,
            "methods": bench.space.label(best.on),
            "loss_in_grid": best.loss,
            "losses": losses["grid"],
            "seconds": seconds["grid"],
        },
        "tuned": {"losses": losses["tuned"], "seconds": seconds["tuned"], "recipe": tuned.to_mapping()},
        "regret": statistics.median(seconds["tuned"]) / statistics.median(seconds["grid"]) - 1,
        "reaches_target": gap <= BAND,
        "loss_gap": gap,
        "seed_noise": math.sqrt(statistics.mean(statistics.variance(each) for each in losses.values())),
        "gap_to_lowest_of_grid": statistics.mean(losses["tuned"]) - lowest,
    }


def fresh(recipe: Recipe, repeat: int) -> Recipe:
    """Return the recipe with a seed that neither grid nor tuning has used."""
    return recipe.model_copy(update={"seed": recipe.seed + 5000 + repeat})


def main() -> int:
    """Run the grid, the tuning and the comparison; write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", required=True, choices=sorted(WORKLOADS))
    parser.add_argument("--json", type=Path, required=True, metavar="OUT")
    parser.add_argument("--small", action="store_true", help="a grid of 48 runs over 120 records")
    parser.add_argument("--folder", type=Path, default=None, help="default: runs/regret-WORKLOAD")
    parser.add_argument("--seconds", type=float, default=1e9, help="end this call after so long")
    arguments = parser.parse_args()
    folder = arguments.folder or Path("runs") / f"regret-{arguments.workload}"
    workload = WORKLOADS[arguments.workload]
    bench = Bench(smaller(workload) if arguments.small else workload, folder)
    try:
        cells = run_grid(bench, time.monotonic() + arguments.seconds)
        grid_seconds = sum(cell.outcome.trial_seconds for cell in cells)
        tuning = run_tuning(bench, folder, max(SHORTEST_SEARCH, SEARCH_SHARE * grid_seconds))
        compared = compare(bench, cells, tuning.best_recipe())
    finally:
        bench.tuning.close()
    summary = {
        "regret": compared["regret"],
        "reaches_target": compared["reaches_target"],
        "loss_gap": compared["loss_gap"],
        "seed_noise": compared["seed_noise"],
        "gap_to_lowest_of_grid": compared["gap_to_lowest_of_grid"],
        "search_cost_ratio": tuning.laboratory.spent_seconds / grid_seconds,
        "grid_size": len(cells),
        "grid_seconds": grid_seconds,
        "search_seconds": tuning.laboratory.spent_seconds,
    }
    result = {
        "command": "benchmarks/regret/run.py " + " ".join(sys.argv[1:]),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "methods": bench.methods,
        "summary": summary,
        **compared,
        "batch_verdict": tuning.batch.sentences if tuning.batch else (),
        "grid": [
            [c.batch_tokens, c.learning_rate, bench.space.label(c.on), round(c.loss, 5),
             round(c.outcome.training_seconds, 3), round(c.outcome.trial_seconds, 3)]
            for c in cells
        ],
    }  # fmt: skip
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
