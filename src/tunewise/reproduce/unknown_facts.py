"""Facts that a model does not know are learnt later than those it knows, and as they are learnt it loses known ones.

Rebuilt in the small, with facts that no model can have met: "The mayor of Zaborin is Keldu Marat." with names drawn at
random. The embedded model is taught some facts until it knows nearly all of them: its pre-training. Fine-tuning takes a
part of these, facts that it never saw, or half of both; the rest of the taught facts is the test. A fact is recalled
when every token of its answer is the likeliest, which is the same as that greedy decoding gives the answer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunewise.methods.method import Run
from tunewise.reproduce.bench import Bench
from tunewise.reproduce.claim import Claim, Finding, Mark
from tunewise.reproduce.learning import FAST, differences, learn, mean, plan_of
from tunewise.reproduce.reproduction import Evidence, Reproduction, Table
from tunewise.workload.batches import Layout
from tunewise.workload.corpus import Corpus

RELATIONS = ("mayor", "river", "founder", "anthem")
SYLLABLES = ("ba", "ke", "li", "mo", "nu", "ra", "se", "ti", "vo", "za", "do", "fe", "gi", "ha", "jo", "ku", "la", "me")
MIXES = {"half unknown": 0.5, "known only": 0.0, "unknown only": 1.0}
LEARNT = 0.9
"""A set counts as learnt when so much of it is recalled."""

CLAIMS = (
    Claim(key="later", says="unknown facts are learnt later than known ones: epochs to recall 90 % of each, difference",
          mark=Mark.READ, unit="epochs", expects="above", neutral=0.0),
    Claim(key="falls", says="as unknown facts are learnt, known ones that are not practised fall: recall at the end, "
          "half "
          "unknown minus known only", mark=Mark.READ, published=-0.041, unit="", expects="below", neutral=0.0),
    Claim(key="linear", says="the more unknown ones, the deeper the fall: unknown only minus half unknown",
          mark=Mark.READ, published=-0.041, unit="", expects="below", neutral=0.0),
    Claim(key="early", says="stopping early recovers known facts: best moment by a development set, minus the end "
          "(43.5 against 41.8 % of the natural mix)", mark=Mark.MEMORY, published=0.017, unit="", expects="above",
          neutral=0.0),
)  # fmt: skip


def measure(bench: Bench) -> Evidence:
    """Teach, fine-tune on three mixes, and follow what is recalled."""
    seeds = range(bench.pick(tiny=1, short=3, full=3))
    found = [bench.once(f"seed {seed}", _one, seed, bench) for seed in seeds]
    end = {mix: [each[mix][-1]["held"] for each in found] for mix in MIXES}
    start = [each["half unknown"][0]["held"] for each in found]
    early = [max(each["half unknown"][1:], key=lambda p: (p["dev"], p["epoch"]))["held"] for each in found]
    halves = [each["half unknown"] for each in found]
    findings = {
        "later": Finding.of([learnt_at(curve, "unknown") - learnt_at(curve, "practised") for curve in halves]),
        "falls": Finding.of(differences(end["half unknown"], end["known only"])),
        "linear": Finding.of(differences(end["unknown only"], end["half unknown"])),
        "early": Finding.of(differences(early, end["half unknown"])),
    }
    rows = [(mix, round(mean(start), 3), round(mean(each), 3)) for mix, each in end.items()]
    rows.append(("half unknown, stopped early", round(mean(start), 3), round(mean(early), 3)))
    table = Table(
        title=f"known facts that are not practised: share recalled, {len(seeds)} seeds",
        columns=("fine-tuned on", "before", "after"),
        rows=tuple(rows),
    )
    return Evidence(findings, (table,))


def facts(seed: int, num: int) -> list[dict[str, str]]:
    """Return `num` different facts."""
    chooser = random.Random(seed)

    def name(syllables: int) -> str:
        return "".join(chooser.choices(SYLLABLES, k=syllables)).capitalize()

    places: dict[str, None] = {}
    while len(places) < num:
        places[name(3)] = None
    return [
        {"prompt": f"The {chooser.choice(RELATIONS)} of {place} is", "completion": f" {name(2)} {name(2)}."}
        for place in places
    ]


@torch.no_grad()
def recalled(run: Run, corpus: Corpus) -> list[bool]:
    """Say of each document whether every supervised token is the likeliest one at its place."""
    was_training = run.model.training
    run.model.eval()
    layout = Layout(micro_batch_size=80)
    found: dict[int, bool] = {}
    for rows in layout.micro_batches(range(len(corpus)), corpus.lengths):
        batch = layout.build(rows, corpus)
        run.documents.lengths = batch.document_lengths
        output = run.model(input_ids=batch.input_ids_RL, position_ids=batch.position_ids_RL, use_cache=False)
        is_right_RL = (output.logits.argmax(-1) == batch.labels_RL) | (batch.labels_RL < 0)
        found |= dict(zip(batch.documents, is_right_RL.all(1).tolist(), strict=True))
    run.model.train(was_training)
    return [found[index] for index in range(len(corpus))]


def learnt_at(curve: Sequence[Mapping[str, float]], name: str) -> float:
    """Return the first epoch at which a set is learnt; the last one where it never is."""
    return next((point["epoch"] for point in curve if point[name] >= LEARNT), curve[-1]["epoch"])


def _one(seed: int, bench: Bench) -> dict[str, list[dict[str, float]]]:
    num = bench.pick(tiny=4, short=32, full=80)
    every = facts(seed, 5 * num)
    sets = {"dev": every[:num], "held": every[num : 2 * num]}
    taught, unknown = every[: 3 * num], every[4 * num :]
    folder = bench.folder / f"facts-{seed}"
    model = learn(
        _mapping(_write(folder, "taught", taught), bench.pick(tiny=1, short=40, full=40), 2e-3, seed, "cosine")
    )
    state = {name: tensor.clone() for name, tensor in model.run.model.state_dict().items()}
    found = {}
    for mix, share in MIXES.items():
        new = round(share * num)
        parts = {**sets, "practised": every[2 * num + new : 3 * num], "unknown": unknown[:new]}
        found[mix] = _curve(folder, mix.replace(" ", "-"), parts, state, seed, bench)
    return found


def _curve(
    folder: Path,
    mix: str,
    parts: Mapping[str, list[dict[str, str]]],
    state: Mapping[str, Tensor],
    seed: int,
    bench: Bench,
) -> list[dict[str, float]]:
    epochs = bench.pick(tiny=2, short=30, full=40)
    corpora = {
        name: plan_of(_mapping(_write(folder, f"{mix}-{name}", part), 1, 1e-3, seed, "constant")).data.train
        for name, part in parts.items()
        if part
    }
    curve: list[dict[str, float]] = []

    def look(run: Run, epoch: float) -> None:
        curve.append({"epoch": epoch, **{name: mean(recalled(run, corpus)) for name, corpus in corpora.items()}})

    def restore(run: Run) -> None:
        run.model.load_state_dict(state)
        look(run, 0.0)

    mapping = _mapping(_write(folder, mix, [*parts["practised"], *parts["unknown"]]), epochs, 5e-4, seed, "constant")
    steps_an_epoch = -(-len(parts["practised"] + parts["unknown"]) // mapping["batch"]["documents"])

    def watch(run: Run, entry: dict[str, Any]) -> None:
        if entry["event"] == "step" and entry["step"] % (2 * steps_an_epoch) == 0:
            look(run, entry["step"] / steps_an_epoch)

    learn(mapping, change=restore, watch=watch)
    return curve


def _write(folder: Path, name: str, records: list[dict[str, str]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def _mapping(data: Path, epochs: int, rate: float, seed: int, schedule: str) -> dict[str, Any]:
    """A full fine-tuning: where facts are stored is no question of rank."""
    return {
        "model": "embedded",
        "data": {"source": str(data), "validation_fraction": 0.0},
        "methods": {**FAST, "fused": {}},
        "batch": {"documents": 16},
        "training": {"epochs": epochs, "learning_rate": rate, "schedule": schedule, "spike": None},
        "evaluation": {"every": 10**6, "keep_best": False, "max_documents": 1},
        "seed": seed,
    }


REPRODUCTION = Reproduction(
    name="unknown-facts",
    title="Unknown facts are learnt later, and learning them costs known ones; stopping early helps",
    source="Gekhman et al. 2024 (arXiv 2405.05904): Acc = 36.9 + 7.3 N_known / D - 8.3 N_unknown / D from memory",
    setting="PaLM 2-M, EntityQuestions, closed-book questions",
    here="the embedded model (4 M parameters) and made-up facts, which it is taught or not",
    claims=CLAIMS,
    measure=measure,
)
