"""Forgetting: what fine-tuning on another domain costs, and what replay, a divergence and a factor on the update "
"save."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path
from typing import Any

import numpy as np

from tunewise.engine.evaluate import validation_loss
from tunewise.engine.scaling import WeightLine
from tunewise.methods.method import Run
from tunewise.quality.forgetting import drift
from tunewise.reproduce.bench import Bench
from tunewise.reproduce.claim import Claim, Finding, Mark
from tunewise.reproduce.learning import FAST, Learnt, differences, learn, mean
from tunewise.reproduce.reproduction import Evidence, Reproduction, Table

TEXT = "tinyshakespeare/input.txt.gz"
EXCERPT = 300_000
"""Characters."""

FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0)
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "replay 1 %": {"replay": 0.01},
    "replay 25 %": {"replay": 0.25},
    "KL to the base": {"methods": {"kl_to_base": {"beta": 0.5}}},
    "rate / 3": {"rate": 1 / 3},
}

CLAIMS = (
    Claim(key="forgets", says="fine-tuning on another domain forgets: loss on the old one after minus before",
          mark=Mark.READ, unit="nats", expects="above", neutral=0.0),
    Claim(key="replay 1 %", says="1 % of replay prevents forgetting: the share of it that is gone (most: above one "
          "half)",
          mark=Mark.READ, published=1.0, unit="", expects="above", neutral=0.5),
    Claim(key="replay 25 %", says="25 % of replay: the share of forgetting that is gone", mark=Mark.READ, unit="",
          expects="above", neutral=0.5),
    Claim(key="KL", says="a divergence to the base retains: forgetting minus the plain run's", mark=Mark.READ,
          unit="nats", expects="below", neutral=0.0),
    Claim(key="rate", says="a lower rate forgets less", mark=Mark.READ, unit="nats", expects="below", neutral=0.0),
    Claim(key="drift", says="KL(base, tuned) on the new task foretells forgetting: R^2 of a parabola over runs and "
          "factors (0.71 of language models, 0.96 of a toy)", mark=Mark.READ, published=0.71, unit="",
          expects="above", neutral=0.7),
    Claim(key="task convex", says="from the base to the tuned model the task's loss is convex: middle minus mean of "
          "the "
          "ends", mark=Mark.READ, unit="nats", expects="below", neutral=0.0),
    Claim(key="general convex", says="... and so is the loss on the old domain", mark=Mark.READ, unit="nats",
          expects="below", neutral=0.0),
)  # fmt: skip


def measure(bench: Bench) -> Evidence:
    """Train every arm, and walk from the base to the plain run's end."""
    seeds = range(bench.pick(tiny=1, short=3, full=5))
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
    for seed, name in itertools.product(seeds, ARMS):
        found[name].append(bench.once(f"{name}, seed {seed}", _one, name, seed, bench))
    lost = {name: [row["points"][-1][1] - row["points"][0][1] for row in rows] for name, rows in found.items()}
    gain = {name: [row["points"][0][0] - row["points"][-1][0] for row in rows] for name, rows in found.items()}
    gone = {name: [1 - a / b for a, b in zip(lost[name], lost["plain"], strict=True)] for name in ARMS}
    curves = [row["points"] for row in found["plain"]]
    bends = {place: [c[2][place] - (c[0][place] + c[-1][place]) / 2 for c in curves] for place in (0, 1)}
    findings = {
        "forgets": Finding.of(lost["plain"]),
        "replay 1 %": Finding.of(gone["replay 1 %"]),
        "replay 25 %": Finding.of(gone["replay 25 %"]),
        "KL": Finding.of(differences(lost["KL to the base"], lost["plain"])),
        "rate": Finding.of(differences(lost["rate / 3"], lost["plain"])),
        "drift": Finding.of([_explained([row[seed] for row in found.values()]) for seed in seeds]),
        "task convex": Finding.of(bends[0]),
        "general convex": Finding.of(bends[1]),
    }
    table = Table(
        title=f"nats; LoRA of rank 16 on the embedded model learns Shakespeare, {len(seeds)} seeds",
        columns=("arm", "gain on the task", "forgetting", "forgetting that is gone"),
        rows=tuple((n, *(round(mean(each[n]), 4) for each in (gain, lost, gone))) for n in ARMS),
    )
    return Evidence(findings, (table,))


def _explained(rows: list[dict[str, Any]]) -> float:
    """Return R^2 of forgetting as a parabola of KL through zero, over all arms and factors of one seed."""
    points = [
        (kl, point[1] - row["points"][0][1]) for row in rows for kl, point in zip(row["kl"], row["points"], strict=True)
    ]
    x, y = np.array(points).T
    basis = np.stack([x, x**2], axis=1)
    residual = y - basis @ np.linalg.lstsq(basis, y, rcond=None)[0]
    return 1 - float((residual**2).sum() / ((y - y.mean()) ** 2).sum())


def _one(name: str, seed: int, bench: Bench) -> dict[str, Any]:
    lines: list[WeightLine] = []

    def remember(run: Run) -> None:
        lines.append(WeightLine(run))

    learnt = learn(_mapping(name, seed, bench), change=remember)
    lines[0].reached()
    factors = FACTORS if name == "plain" else (0.0, 1.0)
    points, kl = [], []
    documents = range(min(bench.pick(tiny=2, short=16, full=48), len(learnt.plan.data.validation)))
    for factor in factors:
        lines[0].move_to(factor)
        points.append(_losses(learnt, bench))
        lines[0].move_to(1.0)
        kl.append(_drift_at(learnt, lines[0], factor, documents))
    return {"points": points, "kl": kl}


def _drift_at(learnt: Learnt, line: WeightLine, factor: float, documents: range) -> float:
    """KL of the model at `factor` from the base, on the new task's held-out documents; 0 at the base itself."""
    if factor == 0.0:
        return 0.0
    line.move_to(factor)
    found = drift(learnt.run, learnt.plan.data.validation, documents).kl.middle
    line.move_to(1.0)
    return found


def _losses(learnt: Learnt, bench: Bench) -> tuple[float, float]:
    data, layout = learnt.plan.data, learnt.run.layout
    assert data.general is not None
    on_task = validation_loss(learnt.run, data.validation, range(min(40, len(data.validation))), layout)
    on_general = validation_loss(learnt.run, data.general, range(len(data.general)), layout)
    assert on_task is not None
    assert on_general is not None
    return on_task, on_general


def _excerpt(bench: Bench) -> Path:
    """Write the beginning of the text, which is more than an arm learns from, into the bench's folder."""
    source, file = bench.shared_folder(TEXT), bench.folder / "shakespeare.txt"
    assert source is not None, "Reproduction.run has looked"
    if not file.is_file():
        bench.folder.mkdir(parents=True, exist_ok=True)
        with gzip.open(source, "rt", encoding="utf-8") as stream:
            file.write_text(stream.read(EXCERPT), encoding="utf-8")
    return file


def _mapping(name: str, seed: int, bench: Bench) -> dict[str, Any]:
    arm = ARMS[name]
    share, steps = arm.get("replay", 0.0), bench.pick(tiny=1, short=20, full=80)
    data: dict[str, Any] = {
        "source": str(_excerpt(bench)), "format": "text", "max_length": 96, "too_long": "split",
        "validation_fraction": 0.02,
    }  # fmt: skip
    if share:
        data["replay"] = {"fraction": share, "source": "default"}
    return {
        "model": "embedded",
        "data": data,
        "objective": "continue",
        "methods": {
            **FAST, "lora": {"rank": 16}, "packing": {"row_tokens": 384},
            **arm.get("methods", {}),
        },
        "batch": {"documents": 8},
        "training": {"steps": round(steps / (1 - share)), "learning_rate": 3e-3 * arm.get("rate", 1.0), "spike": None},
        "evaluation": {
            "every": 10**6, "max_documents": 2, "keep_best": False, "general_text": "default", "general_tokens": 4096,
        },
        "seed": seed,
    }  # fmt: skip


REPRODUCTION = Reproduction(
    name="forgetting",
    title="Fine-tuning forgets; a little replay cures most of it; drift on the new task foretells it",
    source="Bethune et al. 2025 (replay); Shenfeld et al. 2025, RL's Razor (arXiv 2509.04259); Wortsman et al. 2021, "
    "WiSE-FT (arXiv 2109.01903); Biderman et al. 2024 (arXiv 2405.09673)",
    setting="language models from 100M to 8B",
    here="the embedded model (4 M parameters, Python's standard library) learns tinyshakespeare; equal tokens of it in "
    "every arm",
    claims=CLAIMS,
    measure=measure,
    data=(TEXT,),
)
