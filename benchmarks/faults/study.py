"""Kill a tuning at random moments, repeat the same command each time, and check that nothing finished is lost.

    python benchmarks/faults/study.py --kills 30 --json study.json

A round is one `tunewise tune` of a tiny model: batch study, method study, confirmation, final training. Its process is
killed with SIGKILL at a moment drawn over the whole of an undisturbed run, or, for some kills, in the first transaction
of the storage after that moment; then the same command goes on, is killed again, and so on until it ends by itself.
After each kill, and at the end:

- every trial that had finished is in the storage, once, and is not run again (its outcome on the disk is the same
  file), the one whose outcome was written but not yet kept included,
- no process of the tuning is alive,
- the next life begins as if nothing had happened, whatever half-written files the kill left.

Timings differ from run to run, and with them what is decided. So the decision is compared with the one that an
undisturbed pass takes over the very same outcomes: the command is repeated once more on the finished folder, runs no
trial, and must find the same in every figure.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.faults.command import TuningCommand, write_recipe
from benchmarks.faults.witness import Seen, Stamp, look, marked, orphans

BUDGET = "30s"
AIMED = 0.4
"""The share of kills that wait for the storage to be written."""

WRITING_SECONDS = 0.01
"""About how long a transaction of the storage takes."""

UNFINISHED = 75
"""Exit code: the same command goes on (EX_TEMPFAIL of sysexits.h)."""


@dataclass
class Round:
    """What became of one tuning.

    Attributes:
        kills: what the tuning was doing at each of them.
        resumed: kills after which the next life went on without an error.
        lost: trials that had finished and then were not in the storage, or were run again, or stand there twice.
        adopted: trials that had an outcome on the disk and not yet in the storage when a kill came.
        orphans: processes that outlived a kill.
        same_decision: whether the undisturbed pass over the same outcomes found the same.
        new_trials: that this pass ran although all had been kept.
        problems: whatever else went wrong.
    """

    kills: list[str] = field(default_factory=list)
    resumed: int = 0
    lost: list[str] = field(default_factory=list)
    adopted: list[str] = field(default_factory=list)
    orphans: int = 0
    half_written: dict[str, int] = field(default_factory=dict)
    trials: int = 0
    seconds: float = 0.0
    last_life_seconds: float = 0.0
    decision: dict[str, Any] = field(default_factory=dict)
    same_decision: bool = False
    new_trials: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass
class Ledger:
    """Every trial of a tuning that was ever seen finished.

    Attributes:
        kept: keys that were in the storage.
        stamps: the first sight of each outcome on the disk.
    """

    kept: set[str] = field(default_factory=set)
    stamps: dict[str, Stamp] = field(default_factory=dict)

    def lost(self, seen: Seen) -> list[str]:
        """Return what was lost since the last look, and remember what is there now.

        Lost is what was kept and is not any more, stands in the storage twice, was written and is nowhere, or was
        written again, which means that it was run again.
        """
        gone = self.kept - set(seen.kept) | (set(self.stamps) - set(seen.finished) - set(seen.kept))
        twice = {key for key, count in seen.kept.items() if count > 1}
        again = {key for key, stamp in seen.finished.items() if self.stamps.get(key, stamp) != stamp}
        self.kept |= set(seen.kept)
        self.stamps |= seen.finished
        return sorted(gone | twice | again)


def play_round(tuning: TuningCommand, kills: int, chooser: random.Random, lifetime: float) -> Round:
    """Kill one tuning up to `kills` times, let it end, and judge it; `lifetime` is that of an undisturbed one."""
    result, begun = Round(), time.monotonic()
    ledger = Ledger()
    code: int | None = None
    while code is None and len(result.kills) < kills:
        aim = chooser.uniform(0.0, WRITING_SECONDS) if chooser.random() < AIMED else None
        code = tuning.live(chooser.uniform(0.0, lifetime), aim)
        if code is None:
            _judge_kill(result, tuning, ledger)
    if code is None:
        code = tuning.finish()
    result.last_life_seconds = round(tuning.lived, 1)
    result.resumed = len(result.kills) if code == 0 else len(result.kills) - 1
    if code != 0:
        result.problems.append(f"the command ended with exit code {code}: {tuning.tail()}")
    else:
        _judge_end(result, tuning, ledger)
    result.seconds = round(time.monotonic() - begun, 1)
    return result


def _judge_kill(result: Round, tuning: TuningCommand, ledger: Ledger) -> None:
    result.orphans += len(orphans(tuning.mark))
    seen = look(tuning.folder)
    result.kills.append(seen.phase)
    result.half_written = dict(Counter(result.half_written) + Counter(seen.partial))
    result.lost += ledger.lost(seen)
    result.adopted += sorted(set(seen.finished) - set(seen.kept))


def _judge_end(result: Round, tuning: TuningCommand, ledger: Ledger) -> None:
    """Look at the finished folder, then let the command pass over it once more."""
    seen = look(tuning.folder)
    result.lost += ledger.lost(seen) + sorted(set(ledger.stamps) - set(seen.kept))
    result.trials = len(seen.kept)
    found = tuning.findings()
    result.decision = decision(found)
    if marked(tuning.mark):
        result.problems.append("a process of the tuning outlived its end")
    code = tuning.finish()
    if code != 0:
        result.problems.append(f"the pass over the finished folder ended with exit code {code}: {tuning.tail()}")
        return
    after, again = look(tuning.folder), tuning.findings()
    result.new_trials = sum(cost["num_trials"] - cost["num_reused"] for cost in again["costs"])
    result.new_trials += len(after.kept) - len(seen.kept)
    differing = [key for key in found if comparable(found)[key] != comparable(again)[key]]
    result.same_decision = not differing and result.new_trials == 0
    if differing:
        result.problems.append(f"another pass over the same outcomes finds other {', '.join(differing)}")


def decision(findings: dict[str, Any]) -> dict[str, Any]:
    """Return what was decided."""
    batch, methods = findings["batch"], findings["methods"]
    return {
        "batch_tokens": batch["chosen_tokens"],
        "learning_rate": batch["learning_rate"],
        "micro_batch_size": batch["micro_batch_size"],
        "methods": methods["chosen"],
        "confirmed": findings["confirmation"]["winner"]["label"],
        "recipe": findings["recipe"],
    }


def comparable(findings: dict[str, Any]) -> dict[str, Any]:
    """Return the findings without what may differ from one pass to the next.

    That is the date, how much was found again, and the largest size of the process that ended the training: a pass over
    a finished training only loads it.
    """
    training = {key: value for key, value in findings["training"].items() if key != "peak_memory_bytes"}
    costs = [{key: value for key, value in cost.items() if key != "num_reused"} for cost in findings["costs"]]
    return {**findings, "date": None, "costs": costs, "training": training}


def summarize(rounds: list[Round], seed: int) -> dict[str, Any]:
    phases = Counter(phase for part in rounds for phase in part.kills)
    return {
        "kills": sum(len(part.kills) for part in rounds),
        "resumed": sum(part.resumed for part in rounds),
        "trials_lost": sum(len(set(part.lost)) for part in rounds),
        "same_decision": all(part.same_decision for part in rounds),
        "orphans": sum(part.orphans for part in rounds),
        "trials": sum(part.trials for part in rounds),
        "outcomes_not_yet_kept": sum(len(part.adopted) for part in rounds),
        "killed_while": dict(sorted(phases.items())),
        "problems": [problem for part in rounds for problem in part.problems],
        "seconds": round(sum(part.seconds for part in rounds), 1),
        "seed": seed,
    }


def play(folder: Path, kills: int, seed: int, budget: str, seconds: float | None) -> list[Round] | None:
    """Play the undisturbed round and then others until so many kills are done; None when the time was over before.

    Finished rounds are kept in `folder`, and a later call goes on after them.
    """
    started, file = time.monotonic(), folder / "rounds.json"
    rounds = [Round(**part) for part in json.loads(file.read_text())] if file.exists() else []
    recipe = folder / "recipe.yaml" if rounds else write_recipe(folder)
    while not rounds or (left := kills - sum(len(part.kills) for part in rounds)) > 0:
        if seconds is not None and time.monotonic() - started > seconds:
            return None
        number = len(rounds)
        shutil.rmtree(folder / f"round-{number}", ignore_errors=True)  # of a call that was stopped
        tuning = TuningCommand(recipe, folder / f"round-{number}", budget)
        chooser = random.Random(f"{seed}, round {number}")
        number_of_kills, lifetime = (left, rounds[0].last_life_seconds) if rounds else (0, 0.0)
        part = play_round(tuning, number_of_kills, chooser, lifetime)
        rounds.append(part)
        file.write_text(json.dumps([asdict(each) for each in rounds]))
        print(
            f"round {number}: {len(part.kills)} kills, {part.trials} trials, lost {len(part.lost)}, same decision: "
            f"{part.same_decision}, {part.seconds:.0f} s, {part.last_life_seconds:.0f} of them the last life",
            *part.problems,
            flush=True,
        )
    return rounds


def main(arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        rounds = play(folder, arguments.kills, arguments.seed, arguments.budget, arguments.seconds)
    if rounds is None:
        print("Not all kills are done; the same command goes on.")
        return UNFINISHED
    summary = summarize(rounds, arguments.seed)
    if arguments.json is not None:
        content = {
            "summary": summary,
            "undisturbed": asdict(rounds[0]),
            "rounds": [asdict(part) for part in rounds[1:]],
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(summary))
    is_good = summary["same_decision"] and not summary["trials_lost"] and not summary["orphans"]
    return 0 if is_good and summary["resumed"] == summary["kills"] and not summary["problems"] else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", default=BUDGET, help="of each tuning")
    parser.add_argument("--folder", type=Path, default=None, help="where finished rounds are kept")
    parser.add_argument("--seconds", type=float, default=None, help="begin no further round after so long")
    sys.exit(main(parser.parse_args()))
