"""Does a model that was taught to abstain (`data.abstain`) refuse what it cannot know, and still say what it knows?

    python benchmarks/quality/abstaining.py --json benchmarks/results/cpu-2core/abstaining.json --minutes 1.5

R-Tuning (Zhang et al. 2023, arXiv 2311.09677) in the small, with the made-up facts of `unknown_facts.py`: the embedded
model is taught 240 facts; then it is fine-tuned on 160, half of them known and half never seen, once as they are and
once with `data.abstain`, which asks the base and changes the answers that it does not know. Asked are three sets that
no fine-tuning saw: facts that the base was taught, and questions of the same forms whose answers nobody ever told it.

right, refused, wrong are shares of greedy answers. A call ends after `--minutes` and the next one goes on.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from unknown_facts import NUM_HELD, NUM_KNOWN, SEEDS, asked, recipe_of, teach, write

from tunewise import api
from tunewise.engine.assemble import settle
from tunewise.engine.finished import open_finished
from tunewise.engine.generate import Sampling, generate
from tunewise.machine.probe import device_name
from tunewise.methods.method import Run
from tunewise.methods.reading import recipe_from_mapping
from tunewise.quality.prompts import prompts_of
from tunewise.quality.refusals import Refusals
from tunewise.reproduce.unknown_facts import facts

ANSWER = "I do not know."
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "abstain": {"abstain": {"answer": ANSWER, "prompts": 1, "shots": 0, "samples": 0}},
}
NUM_KNOWN_TRAINED, NUM_UNKNOWN_TRAINED, NUM_UNKNOWN_ASKED = 80, 80, 60
EPOCHS, RATE = 10, 3e-4


def sets_of(seed: int) -> dict[str, list[dict[str, str]]]:
    """Return the facts of each part; those that are asked are in no training but the base's own."""
    every = facts(seed, NUM_KNOWN + NUM_UNKNOWN_TRAINED + NUM_UNKNOWN_ASKED)
    return {
        "known": every[:NUM_HELD],
        "practised": every[NUM_HELD : NUM_HELD + NUM_KNOWN_TRAINED],
        "new": every[NUM_KNOWN : NUM_KNOWN + NUM_UNKNOWN_TRAINED],
        "unknowable": every[NUM_KNOWN + NUM_UNKNOWN_TRAINED :],
    }


def answered(run: Run, tokenizer: Any, model: str, file: Path) -> dict[str, float]:
    """Return which shares of a file's questions are answered rightly, refused and answered wrongly."""
    corpus = settle(recipe_from_mapping(recipe_of(model, file, 1, RATE, 0, "constant"))).data.train
    prompts = prompts_of(corpus, range(len(corpus)), tokenizer)
    said = [texts[0].text for texts in generate(run, tokenizer, [prompt.ids for prompt in prompts], Sampling(16))]
    refusals = Refusals()
    refused = [refusals.matches(text) for text in said]
    right = [text.strip() == prompt.reference.strip() for text, prompt in zip(said, prompts, strict=True)]
    shares = {"right": statistics.mean(right), "refused": statistics.mean(refused)}
    return {**shares, "wrong": 1.0 - shares["right"] - shares["refused"]}


def fine_tune(seed: int, arm: str, folder: Path) -> dict[str, Any]:
    """Fine-tune the taught model and ask it."""
    model, sets, home = str(teach(seed, folder)), sets_of(seed), folder / arm
    shutil.rmtree(home, ignore_errors=True)
    mapping = recipe_of(
        model, write(home / "train.jsonl", sets["practised"] + sets["new"]), EPOCHS, RATE, seed, "constant"
    )
    mapping["data"] |= ARMS[arm]
    mapping["quality"] = "off"
    api.train(recipe_from_mapping(mapping), out=home / "run")
    finished = open_finished(home / "run", "asked")
    found = {
        name: answered(finished.run, finished.plan.tokenizer, model, write(home / f"{name}.jsonl", sets[name]))
        for name in ("known", "unknowable")
    }
    said = next(
        (line for line in (home / "run" / "data.json").read_text(encoding="utf-8").split('"') if "abstain: " in line),
        "",
    )
    return {"seed": seed, "arm": arm, **found, "said": said}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the means over seeds."""
    found: dict[str, Any] = {}
    for arm in ARMS:
        mine = [row for row in rows if row["arm"] == arm]
        if mine:
            found[arm] = {
                name: {kind: round(statistics.mean(row[name][kind] for row in mine), 3) for kind in mine[0][name]}
                for name in ("known", "unknowable")
            } | {"seeds": len(mine)}
    return found


def main() -> int:
    """Do what is not done yet."""
    arguments, rows = asked(__doc__, "abstaining")
    end = time.monotonic() + 60 * arguments.minutes
    done = {(row["seed"], row["arm"]) for row in rows}
    left = [(seed, arm) for seed in SEEDS for arm in ARMS if (seed, arm) not in done]
    for number, (seed, arm) in enumerate(left):
        if time.monotonic() > end:
            print(f"{len(left) - number} of {len(left)} left; the same command goes on")
            break
        rows.append(fine_tune(seed, arm, arguments.folder / str(seed)))
        print(json.dumps(rows[-1]), flush=True)
        content = {
            "command": "python benchmarks/quality/abstaining.py --json OUT", "machine": device_name("cpu"),
            "torch": torch.__version__, "summary": summary(rows), "rows": rows,
        }  # fmt: skip
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary(rows), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
