"""What is planned for: model, load, machine and limits, read and checked before any combination is looked at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PretrainedConfig

from tunewise.engine.dry_run import TraceAll, one_by_one
from tunewise.engine.schedule import total_steps
from tunewise.errors import InputError
from tunewise.machine import catalogue
from tunewise.machine.machine import Machine, read_machine
from tunewise.machine.probe import measure_machine
from tunewise.methods import complete
from tunewise.methods.reading import recipe_from_mapping, with_settings
from tunewise.planner.choose import Limits
from tunewise.planner.load import Load
from tunewise.planner.predict import Prediction, Predictor, profile_of
from tunewise.planner.space import Wishes
from tunewise.recipe import OWN_SOURCES, Fidelity, Recipe
from tunewise.units import format_bytes, parse_bytes, parse_seconds
from tunewise.workload.batches import GlobalBatches
from tunewise.workload.general_text import DEFAULT
from tunewise.workload.model import context_length, load_config, load_tokenizer
from tunewise.workload.prepare import prepare

NO_DATA = "your-data.jsonl"
"""What stands in a recipe that was planned for a length only, until the user names the data."""

HERE = "here"
"""The machine's name that stands for the present one, measured."""

MEASURE_SECONDS = 4.0
"""How long the present machine is measured for a plan; `tunewise machine` takes longer and is more exact."""


@dataclass(frozen=True)
class Question:
    """What a user asks; see `plan.plan` for each field."""

    model: str
    data: str | None = None
    length: int | None = None
    machine: str | Machine = HERE
    memory: str | int | None = None
    time: str | float | None = None
    cost: float | None = None
    price: float | None = None
    wanted: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()
    quality: str = "learning"
    num_documents: int | None = None
    settings: tuple[str, ...] = ()
    measures: bool = False


@dataclass(frozen=True)
class Case:
    """What is planned for: everything that is settled before combinations are looked at."""

    base: Recipe
    config: PretrainedConfig
    machine: Machine
    load: Load
    limits: Limits
    wishes: Wishes
    run: str
    num_runs: float

    def recipe(self, prediction: Prediction) -> Recipe:
        """Return the complete recipe of a prediction, ready to train."""
        recipe = prediction.choice.recipe(self.base, prediction.micro_batch_size)
        return complete(recipe, self.config, torch.device(self.machine.kind))

    def predictor(self, trace_all: TraceAll = one_by_one) -> Predictor:
        """Return a predictor for this case, which runs its traces by `trace_all`."""
        return Predictor(self.base, self.config, self.machine, self.load, trace_all)


def settle(question: Question) -> Case:
    """Read and check everything.

    Raises:
        InputError: an argument, the model or the data are wrong.
    """
    if (question.data is None) == (question.length is None):
        raise InputError("Give either data or a length: --data FILE, or --length N for documents of N tokens.")
    if question.quality not in list(Fidelity):
        raise InputError(f"quality must be exact, rounding or learning, not '{question.quality}'.")
    where = find_machine(question.machine)
    if question.price is not None:
        where = where.replace(price_per_hour=question.price)
    profile = profile_of(where)
    base, config = _base_recipe(question, where)
    load = _load_of(base, config, question)
    usable = where.usable_memory_bytes
    if question.memory is not None:
        usable = min(usable, parse_bytes(question.memory) - profile.context_bytes)
    if usable <= 0:
        raise InputError(
            f"memory: {question.memory} is less than the device's own context takes "
            f"({format_bytes(profile.context_bytes)}). A number without a unit counts bytes; write 24GB."
        )
    if (question.time is not None or question.cost is not None) and load.num_steps is None:
        raise InputError(
            "A limit of time or cost needs to know how long the run is: give --data, or --documents with --length."
        )
    if question.cost is not None and where.price_per_hour is None:
        raise InputError("A limit of cost needs the machine's price per hour: --price 2.50")
    limits = Limits(
        usable_bytes=usable,
        time_seconds=None if question.time is None else parse_seconds(question.time),
        cost=question.cost,
        run_steps=load.num_steps,
        price_per_hour=where.price_per_hour,
    )
    if load.num_steps is None:
        run, num_runs = "a million tokens", 1e6 / load.tokens_per_step
    else:
        run, num_runs = f"{load.num_steps} steps, {load.description}", float(load.num_steps)
    wishes = Wishes(question.wanted, question.unwanted, Fidelity(question.quality))
    return Case(base, config, where, load, limits, wishes, run, num_runs)


def find_machine(machine: str | Machine) -> Machine:
    """Return the machine that a name, a file or "here" stands for.

    Raises:
        InputError: there is none.
    """
    if isinstance(machine, Machine):
        return machine
    if machine == HERE:
        return measure_machine(seconds=MEASURE_SECONDS)
    if machine.endswith((".yaml", ".yml", ".json")) or Path(machine).is_file():
        return read_machine(Path(machine))
    return catalogue.find(machine)


def _base_recipe(question: Question, machine: Machine) -> tuple[Recipe, PretrainedConfig]:
    """Return the complete recipe without chosen methods, and the model's configuration."""
    length = question.length
    mapping = with_settings({"model": question.model, "data": question.data or NO_DATA}, question.settings)
    mapping = {**mapping, "device": machine.kind}
    if mapping.get("methods") is not None:
        raise InputError("methods are what the planner chooses; say --with METHOD or --without METHOD instead.")
    recipe = recipe_from_mapping({**mapping, "methods": {"precision": {}}}, "plan")
    config = load_config(recipe.model)
    context = context_length(config)
    if length is not None:
        if not 2 <= length <= context:
            raise InputError(f"length must be 2 to {context} (the model's context), not {length}.")
        recipe = recipe.replace(data=recipe.data.model_copy(update={"max_length": length}))
    base = complete(recipe, config, torch.device(machine.kind))
    # The default learning rate depends on the methods, so it is filled in when they are known (`Case.recipe`).
    training = base.training.model_copy(update={"learning_rate": recipe.training.learning_rate})
    return base.replace(training=training), config


def _without_asking(base: Recipe) -> Recipe:
    """Return a recipe whose data need no weights: planning loads none.

    Replayed text is as many pieces of the same length whatever it says, so the default stands for the base's own;
    answers that would become "I am not sure." keep their length.
    """
    replay = base.data.replay
    if replay is not None and replay.source in OWN_SOURCES:
        replay = replay.model_copy(update={"source": DEFAULT})
    return base.replace(data=base.data.model_copy(update={"replay": replay, "abstain": None}))


def _load_of(base: Recipe, config: PretrainedConfig, question: Question) -> Load:
    length, num_documents = question.length, question.num_documents
    if length is not None:
        per_step = base.batch.documents or 1
        epochs = base.training.epochs or 1.0
        steps = base.training.steps
        if steps is None and num_documents is not None:
            steps = max(1, math.ceil(math.ceil(num_documents / per_step) * epochs))
        return Load.uniform(length, base, num_documents, steps)
    if num_documents is not None:
        raise InputError("--documents says how many documents of --length there are; with --data they are counted.")
    tokenizer = load_tokenizer(base.model)
    vocab_size = max(config.get_text_config().vocab_size, len(tokenizer) if base.model.resize_vocabulary else 0)
    prepared = prepare(_without_asking(base), tokenizer, context_length(config), vocab_size)
    steps = total_steps(GlobalBatches(prepared.train, base.batch, base.seed), base.training)
    lengths = prepared.train.lengths
    description = (
        f"{len(prepared.train)} documents of {base.data.source}, {int(np.median(lengths))} tokens in the middle, "
        f"{int(lengths.max())} the longest"
    )
    return Load.of_corpus(prepared.train, base, steps, description)
