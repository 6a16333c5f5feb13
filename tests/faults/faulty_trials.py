"""Trials of studies that end in every way a trial can end in, and otherwise measure by a formula.

The executor's server imports this module by name. Which trial fails how is decided by its number: each trial leaves a
file in the data folder, so the numbers go on after a restart.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.unit.lab import faulty
from tests.unit.lab.synthetic import SyntheticLab
from tunewise.lab.outcome import Interval, Measurement

MEBIBYTE = 2**20
LAB = SyntheticLab(critical_batch=4096.0, t0_seconds=1e-5, t1_seconds=1e-8)

Fault = Callable[[str], object]

FAULTS: dict[str, Fault] = {
    "runs out of memory": lambda folder: faulty.run_out_of_memory(4 * 2**30),
    "is killed by the system": lambda folder: faulty.vanish(),
    "hangs": lambda folder: faulty.hang(),
    "crashes the interpreter": lambda folder: faulty.crash(),
    "raises": lambda folder: faulty.break_down(),
    "fills the disk": faulty.fill_disk,
}


def plan_faults(data_folder: Path, faults: dict[int, str]) -> None:
    """Say which trial, counted from 1, fails how."""
    data_folder.mkdir(parents=True, exist_ok=True)
    for number, fault in faults.items():
        (data_folder / f"fault-{number}").write_text(fault)


def num_run(data_folder: Path) -> int:
    """Return how many trials have been started so far."""
    return len(list(data_folder.glob("trial-*")))


def arm(trial: dict[str, Any], data_folder: str, folder: str) -> Measurement:
    """A "learn" trial."""
    _fail_if_planned(Path(data_folder), folder)
    recipe = trial["recipe"]
    batch, training = recipe["batch"]["supervised_tokens"], recipe["training"]
    beta2 = recipe["methods"]["adamw"]["beta2"]
    loss, curve, seconds = LAB.train(batch, training["learning_rate"], beta2, training["tokens"], recipe["seed"])
    rate = training["tokens"] / seconds
    return Measurement(
        loss=loss,
        curve=curve,
        steps=training["tokens"] // batch,
        training_seconds=seconds,
        tokens_per_second=Interval(middle=rate, low=rate, high=rate),
    )


FACTORS = {"packing": (0.7, 0.9), "supervised_loss": (0.9, 0.6), "checkpointing": (1.3, 0.5), "lora": (0.8, 0.4)}
"""What each method does to seconds and bytes."""


def combination(trial: dict[str, Any], data_folder: str, folder: str) -> Measurement:
    """A "measure" trial."""
    _fail_if_planned(Path(data_folder), folder)
    seconds, num_bytes = 1.0, 1e8
    for name in trial["recipe"]["methods"]:
        time, memory = FACTORS.get(name, (1.0, 1.0))
        seconds, num_bytes = seconds * time, num_bytes * memory
    rate = 1000 / seconds
    return Measurement(
        step_seconds=Interval(middle=seconds, low=seconds, high=seconds),
        tokens_per_second=Interval(middle=rate, low=rate, high=rate),
        peak_tensor_bytes=round(num_bytes),
        loss=2.0,
        steps=3,
        supervised_tokens=300,
    )


def _fail_if_planned(data_folder: Path, folder: str) -> None:
    number = num_run(data_folder) + 1
    (data_folder / f"trial-{number}").touch()
    planned = data_folder / f"fault-{number}"
    if planned.exists():
        FAULTS[planned.read_text()](folder)
