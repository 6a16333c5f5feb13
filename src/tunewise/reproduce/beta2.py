"""Adam's beta2 by its half-life in tokens: small batches want a longer memory, large ones a shorter."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

from tunewise.reproduce.bench import Bench
from tunewise.reproduce.claim import Claim, Finding, Mark
from tunewise.reproduce.learning import FAST, column, differences, figures_of, mean, scratch
from tunewise.reproduce.reproduction import Evidence, Reproduction, Table

SMALL, LARGE = 1, 16
GRID: dict[int, tuple[float, ...]] = {SMALL: (0.95, 0.95 ** (1 / LARGE), 0.999), LARGE: (0.9, 0.95, 0.99, 0.999)}
"""At the small batch 0.95 ** (1 / 16) has the half-life that 0.95 has at the large one."""

CLAIMS = (
    Claim(key="small", says="at batch 1 beta2 = 0.95 is worse than the same half-life in tokens", mark=Mark.READ,
          unit="nats", expects="above", neutral=0.0),
    Claim(key="large", says="at a large batch beta2 = 0.999 is worse than 0.95 (bpb 0.9917 against 0.9826 at batch "
          "512)",
          mark=Mark.READ, unit="nats", expects="above", neutral=0.0),
    Claim(key="falls", says="the best beta2 falls as the batch grows (0.995 at batch 64, 0.95 at 512): best at the "
          "small "
          "batch minus best at the large", mark=Mark.READ, published=0.045, unit="", expects="above", neutral=0.0),
    Claim(key="batch 1", says="batch 1 trains as well as a large batch from the same tokens, once beta2 is scaled",
          mark=Mark.READ, published=0.0, unit="nats", expects="below", neutral=0.05, tolerance=0.05),
)  # fmt: skip


def measure(bench: Bench) -> Evidence:
    """Train a small model from scratch at batch 1 and 16, from the same documents."""
    documents, seeds = bench.pick(tiny=16, short=192, full=1280), range(bench.pick(tiny=1, short=3, full=5))
    grid = [(batch, beta2) for batch, values in GRID.items() for beta2 in values]
    found: dict[tuple[int, float], list[dict[str, float]]] = {each: [] for each in grid}
    for seed in seeds:
        for batch, beta2 in grid:
            key = f"batch {batch}, beta2 {beta2:.5g}, seed {seed}"
            found[batch, beta2].append(bench.once(key, _train, batch, beta2, seed, documents))
    loss = {key: column(rows) for key, rows in found.items()}
    scaled = GRID[SMALL][1]
    best = {
        batch: [min((loss[batch, beta2][seed], beta2) for beta2 in GRID[batch])[1] for seed in seeds] for batch in GRID
    }
    findings = {
        "small": Finding.of(differences(loss[SMALL, 0.95], loss[SMALL, scaled])),
        "large": Finding.of(differences(loss[LARGE, 0.999], loss[LARGE, 0.95])),
        "falls": Finding.of(differences(best[SMALL], best[LARGE]), "of the values that were tried"),
        "batch 1": Finding.of(differences(loss[SMALL, scaled], loss[LARGE, 0.95])),
    }
    table = Table(
        title=f"validation loss (nats) after {documents} documents of 64 tokens from scratch, {len(seeds)} seeds; the "
        "rate follows the root of the batch",
        columns=("batch", "beta2", "half-life (documents)", "loss"),
        rows=tuple(
            (batch, round(beta2, 5), round(_half_life(beta2) * batch, 1), round(mean(loss[batch, beta2]), 4))
            for batch, beta2 in grid
        ),
    )
    return Evidence(findings, (table,))


def _half_life(beta2: float) -> float:
    """Steps after which a gradient counts half: 0.5 = beta2 ** steps."""
    return math.log(0.5) / math.log(beta2)


def _train(batch: int, beta2: float, seed: int, documents: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        mapping: dict[str, Any] = {
            "model": scratch(Path(name)),
            "data": {"source": "stdlib", "max_length": 64, "max_records": 60, "too_long": "split"},
            "objective": "pretrain",
            "methods": {**FAST, "attention": {"kind": "sdpa"}, "adamw": {"beta2": beta2}},
            "batch": {"documents": batch, "micro_batch_size": min(batch, 4)},
            "training": {"steps": documents // batch, "learning_rate": 1e-3 * batch**0.5, "spike": None},
            "evaluation": {"every": documents // batch, "max_documents": 60, "keep_best": False},
            "seed": seed,
        }
        return figures_of(mapping)


REPRODUCTION = Reproduction(
    name="beta2-half-life",
    title="Adam's beta2 should keep its half-life in tokens when the batch changes",
    source="Marek et al. 2025 (arXiv 2507.07101); marin issue 4567 for the table of the best beta2",
    setting="30M to 1.3B models from scratch, batches 1 to 4096",
    here="a Llama of 0.5 M parameters from scratch on the standard library's text, batches of 1 and 16",
    claims=CLAIMS,
    measure=measure,
)
