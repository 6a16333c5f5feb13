"""What is tuned and where: the recipe completed, data prepared and kept on disk, the machine measured, all of it fixed.

Whatever an outcome depends on besides its recipe is gathered here once (`circumstances`), so that a tuning that is
continued finds its trials again, and one of another model, other data or other versions does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tunewise.engine.assemble import Plan, settle
from tunewise.engine.checkpoint import storage_errors
from tunewise.engine.run_folder import versions, write_whole
from tunewise.errors import InputError
from tunewise.lab import corpora
from tunewise.machine.machine import Machine, read_machine
from tunewise.planner.case import HERE, find_machine
from tunewise.planner.choose import SAFETY_MARGIN
from tunewise.planner.load import Load
from tunewise.planner.predict import Predictor, profile_of
from tunewise.quality.general_text import GeneralText, general_text
from tunewise.recipe import Recipe
from tunewise.workload.batches import GlobalBatches
from tunewise.workload.model import context_length, model_fingerprint

GENERAL_TOKENS = 2048
"""Of general text, on which a trial measures forgetting: 16 windows, the same in each trial."""

HOST_SHARE = 0.9
"""Of the host's memory that is free at the start, what a trial may take at most."""


@dataclass(frozen=True)
class Workplace:
    """Everything that stays as it is during a tuning.

    Attributes:
        plan: the complete recipe, the model's configuration and the data.
        machine: measured, or the user's description of this one.
        data_folder: where trials find the data.
        limit_bytes: what tensors may take, the safety margin taken off.
        host_bytes: what a trial's process may allocate on the host.
        circumstances: what outcomes depend on besides the recipe.
        measures_forgetting: whether trials measure it: the gate is on, and the base knows something.
    """

    plan: Plan
    machine: Machine
    data_folder: Path
    limit_bytes: int
    host_bytes: int
    circumstances: dict[str, Any]
    measures_forgetting: bool = False

    @property
    def recipe(self) -> Recipe:
        """The user's recipe, completed."""
        return self.plan.recipe

    @property
    def supervised_per_document(self) -> float:
        """Supervised tokens of a training document, on average."""
        return float(self.plan.data.train.num_supervised.mean())

    @property
    def batch_tokens(self) -> int:
        """Supervised tokens a step of the user's recipe, on average."""
        batch = self.recipe.batch
        if batch.supervised_tokens is not None:
            return batch.supervised_tokens
        return max(1, round((batch.documents or 1) * self.supervised_per_document))

    @property
    def run_tokens(self) -> int:
        """Supervised tokens of the whole training."""
        steps = GlobalBatches(self.plan.data.train, self.recipe.batch, self.recipe.seed).from_step(0)
        counts = self.plan.data.train.num_supervised
        return int(sum(counts[next(steps)[1]].sum() for _ in range(self.plan.num_steps)))

    def predictor(self, recipe: Recipe, machine: Machine | None = None) -> Predictor:
        """Return a predictor for `recipe` on this machine, or on another one."""
        load = Load.of_corpus(self.plan.data.train, recipe, self.plan.num_steps, self.recipe.data.source)
        return Predictor(recipe, self.plan.config, machine or self.machine, load)


def open_workplace(recipe: Recipe, folder: Path, machine: str, memory_bytes: int | None) -> Workplace:
    """Prepare everything that trials need.

    Args:
        recipe: the user's.
        folder: of the tuning; gets `data/` and `machine.yaml`.
        machine: "here", or the file of a measured machine.
        memory_bytes: use no more than this; None for what is there.

    Raises:
        InputError: recipe, data or machine are wrong, or there is nothing to compare by (no validation data).
    """
    plan = settle(recipe)
    if len(plan.data.validation) == 0:
        raise InputError(
            "data.validation_fraction: tuning compares recipes by their validation loss, and there are no validation "
            "documents. Set it above 0, or name a validation file with data.validation."
        )
    data_folder = folder / "data"
    if corpora.fingerprint(data_folder) != _fingerprint(plan):
        with storage_errors(f"cannot write to the tuning's folder {folder}"):
            corpora.store(plan.data, data_folder)
    general = _general_text(plan, data_folder)
    where = _machine(machine, folder)
    if where.kind != plan.device.type:
        raise InputError(
            f"--machine: trials run on this machine, whose device is '{plan.device.type}', and {where.name} is a "
            f"'{where.kind}'. Leave --machine out, or plan for it with: tunewise plan"
        )
    usable, host = where.usable_memory_bytes, int(HOST_SHARE * psutil.virtual_memory().available)
    if memory_bytes is not None:
        usable = min(usable, memory_bytes - profile_of(where).context_bytes)
        if plan.device.type == "cpu":
            host = min(host, memory_bytes)
    if usable <= 0:
        raise InputError(f"--memory: {memory_bytes} bytes are less than the device's own context takes.")
    return Workplace(
        plan=plan,
        machine=where,
        data_folder=data_folder,
        limit_bytes=int(usable * (1 - SAFETY_MARGIN)),
        host_bytes=host,
        circumstances={
            "data": _fingerprint(plan),
            "model": model_fingerprint(plan.recipe.model),
            "versions": versions(),
            "memory": memory_bytes,
            "general text": None if general is None else general.corpus.fingerprint,
        },
        measures_forgetting=general is not None,
    )


def _general_text(plan: Plan, folder: Path) -> GeneralText | None:
    """Lay the text ready on which trials measure forgetting; None where the gate would not ask for it either.

    Raises:
        InputError: the user's own text cannot be read.
    """
    recipe = plan.recipe
    if not recipe.quality.gate or recipe.model.weights != "pretrained" or recipe.objective == "pretrain":
        return None
    text = general_text(recipe.quality, plan.tokenizer, context_length(plan.config), GENERAL_TOKENS)
    with storage_errors(f"cannot write to {folder}"):
        corpora.store_general(text, folder)
    return text


def _fingerprint(plan: Plan) -> str:
    return plan.data.data_fingerprint


def _machine(name: str, folder: Path) -> Machine:
    """Return the machine; the present one is measured once for each tuning, so that predictions stay comparable."""
    kept = folder / "machine.yaml"
    if name == HERE and kept.is_file():
        return read_machine(kept)
    found = find_machine(name)
    if not math.isfinite(found.usable_memory_bytes):
        raise InputError(f"--machine: {name} has no memory size.")
    with storage_errors(f"cannot write to the tuning's folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(kept, found.to_yaml())
    return found
