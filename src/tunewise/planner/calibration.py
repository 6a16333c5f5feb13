"""What training took on this machine before, and how far predictions were off: a file to read, correct or delete.

`calibration.json` in the cache folder maps a machine and a kind of work ("lora bf16") to the ratios measured over
predicted of past runs. A prediction is multiplied by their median; their spread becomes its interval.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

from tunewise.engine.run_folder import read_metrics
from tunewise.errors import InputError
from tunewise.machine.catalogue import CATALOGUE, find
from tunewise.planner import cache
from tunewise.workload.places import cache_folder

MAX_RATIOS = 50
"""Of each kind so many of the newest are kept."""

FEW = 3
"""From so many measurements on, their own spread is the interval."""

WARMING_STEPS = 3
"""The first steps of a run are slower: kernels are chosen, memory is fetched."""

FEWEST_STEPS = 5
"""A run with fewer steps says nothing about speed."""

CATALOGUED = (1.0, 1.24, 1.6)
"""Measured over predicted time where only the catalogue is known: about the 5th, 50th and 95th percentile of 142
published rows on A100 and H100 (benchmarks/estimate/throughput.py). A roofline is a bound; this is how far steps stay
behind it."""

MEASURED = (0.85, 1.0, 1.25)
"""The same where the ceilings were measured on the machine itself. Not yet validated: a guess until runs correct it."""


@dataclass(frozen=True)
class Correction:
    """What a predicted time is multiplied with.

    Attributes:
        factor: for the middle.
        low, high: for the ends of the interval.
        reason: where they are from.
    """

    factor: float
    low: float
    high: float
    reason: str


def calibration_file() -> Path:
    """Return where the ratios are kept."""
    return cache_folder() / "calibration.json"


def ratios(machine: str, kind: str) -> list[float]:
    """Return measured over predicted seconds of past runs, the newest last.

    Raises:
        InputError: the file is damaged.
    """
    return list(_read().get(machine, {}).get(kind, []))


def record_measurement(machine: str, kind: str, measured_seconds: float, predicted_seconds: float) -> None:
    """Keep one more ratio; where the folder cannot be written, nothing is kept.

    Args:
        machine: `Machine.name`.
        kind: `predict.kind_of(recipe)`.
        measured_seconds, predicted_seconds: of the same step; predicted without any correction.
    """
    if not (measured_seconds > 0 and predicted_seconds > 0):
        raise ValueError("a measurement needs positive times")
    content = _read()
    kept = content.setdefault(machine, {}).setdefault(kind, [])
    kept.append(round(measured_seconds / predicted_seconds, 4))
    del kept[:-MAX_RATIOS]
    file = calibration_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1), encoding="utf-8")
        part.replace(file)
    except OSError:
        return


@dataclass(frozen=True)
class Foretold:
    """What was predicted for a recipe: seconds for each real token, before any correction."""

    machine: str
    kind: str
    seconds_per_token: float


def note_prediction(recipe_id: str, foretold: Foretold) -> None:
    """Remember a prediction, so that a training of this very recipe can be compared with it."""
    cache.write(f"foretold-{recipe_id}", vars(foretold))


def learn_from_run(recipe_id: str, metrics: Path) -> float | None:
    """Compare a finished run with what was predicted for its recipe, keep the ratio and return it.

    The middle of the steps' seconds for each token counts, without the first steps, which warm up. Returns None where
    nothing was predicted, it was for another machine, or the run was too short.

    Args:
        recipe_id: of the recipe as it was planned.
        metrics: the run's `metrics.jsonl`.
    """
    known = cache.read(f"foretold-{recipe_id}")
    if known is None or not metrics.is_file():
        return None
    foretold = Foretold(**known)
    if not is_here(foretold.machine):
        return None
    steps = [each for each in read_metrics(metrics) if each["event"] == "step" and each["tokens"]][WARMING_STEPS:]
    if len(steps) < FEWEST_STEPS:
        return None
    measured: float = statistics.median(each["seconds"] / each["tokens"] for each in steps)
    record_measurement(foretold.machine, foretold.kind, measured, foretold.seconds_per_token)
    return measured / foretold.seconds_per_token


def is_here(machine: str) -> bool:
    """Say whether this process runs on `machine`: a measured processor, or the GPU of that name."""
    if not torch.cuda.is_available():
        return all(known.name != machine for known in CATALOGUE)
    name = torch.cuda.get_device_name()
    try:
        return machine in (name, find(name).name)
    except InputError:
        return machine == name


def correction(machine: str, kind: str, *, is_measured: bool) -> Correction:
    """Return how to correct a prediction.

    A kind of work without past runs takes the middle of the machine's other kinds, so that kinds stay comparable; a
    machine without any takes the documented band.

    Raises:
        InputError: the file is damaged.
    """
    low, middle, high = MEASURED if is_measured else CATALOGUED
    kinds = {name: past for name, past in _read().get(machine, {}).items() if past}
    if not kinds:
        ceilings = "measured" if is_measured else "catalogued"
        reason = f"{ceilings} ceilings times {low:g} to {high:g}, as no run on this machine is known yet"
        return Correction(middle, low, high, reason)
    if kind not in kinds:
        known = statistics.median(statistics.median(past) for past in kinds.values())
        reason = f"corrected by past runs on this machine, of other kinds than {kind}"
        return Correction(known, known * low / middle, known * high / middle, reason)
    past = kinds[kind]
    known = statistics.median(past)
    reason = f"corrected by {len(past)} past runs of {kind} on this machine"
    if len(past) < FEW:
        return Correction(known, known * MEASURED[0], known * MEASURED[2], reason)
    deciles = statistics.quantiles(past, n=10, method="inclusive")
    return Correction(known, min(deciles[0], known * 0.97), max(deciles[-1], known * 1.03), reason)


def _read() -> dict[str, dict[str, list[float]]]:
    file = calibration_file()
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {error}. It may be deleted.") from None
    if not _is_calibration(content):
        raise InputError(f"{file} must map machines to kinds of work to lists of numbers. It may be deleted.")
    checked: dict[str, dict[str, list[float]]] = content
    return checked


def _is_calibration(content: object) -> bool:
    if not isinstance(content, dict):
        return False
    kinds = [kind for kind in content.values() if isinstance(kind, dict)]
    lists = [values for kind in kinds for values in kind.values() if isinstance(values, list)]
    numbers = [value for values in lists for value in values]
    return (
        len(kinds) == len(content)
        and sum(map(len, kinds)) == len(lists)
        and all(isinstance(value, int | float) and value > 0 for value in numbers)
    )
