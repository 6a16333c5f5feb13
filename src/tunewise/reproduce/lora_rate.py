"""LoRA's learning rate against full fine-tuning's, and what each loses at a large batch."""

from __future__ import annotations

import math
from typing import Any

from tunewise.lab.rates import lowest_rate
from tunewise.reproduce.bench import Bench
from tunewise.reproduce.claim import Claim, Finding, Mark
from tunewise.reproduce.learning import FUSED, Arm, arm, column, differences, mean, over_seeds
from tunewise.reproduce.reproduction import Evidence, Reproduction, Table

RATES = {"full": (3e-5, 1e-4, 3e-4, 1e-3), "lora": (3e-4, 1e-3, 3e-3, 1e-2)}
BATCHES = (4, 32)

CLAIMS = (
    Claim(key="ratio", says="the best rate of LoRA is ten times that of full fine-tuning: log10 of the ratio "
          "(accepted: "
          "5 to 20 times)", mark=Mark.READ, published=1.0, unit="decades", expects="above", neutral=0.0, tolerance=0.3),
    Claim(key="penalty", says="LoRA loses more at a large batch than full fine-tuning does, each at its best rate",
          mark=Mark.READ, unit="nats", expects="above", neutral=0.0),
    Claim(key="full penalty", says="at equal samples the large batch is worse for full fine-tuning", mark=Mark.READ,
          unit="nats", expects="above", neutral=0.0),
    Claim(key="rises", says="the best rate rises with the batch (LoRA, 8 times the batch): log10 of the ratio",
          mark=Mark.READ, published=0.45, unit="decades", expects="above", neutral=0.0, tolerance=0.3),
)  # fmt: skip


def measure(bench: Bench) -> Evidence:
    """Train a grid of rates for both, at two batches and equal samples."""
    samples, seeds = bench.pick(tiny=32, short=96, full=768), bench.pick(tiny=1, short=3, full=4)
    arms: dict[str, Arm] = {
        f"{way}, batch {batch}, rate {rate:g}": _arm(way, batch, rate, samples)
        for way, rates in RATES.items()
        for batch in BATCHES
        for rate in rates
    }
    found = over_seeds(bench, arms, seeds=seeds)
    best: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for way, rates in RATES.items():
        for batch in BATCHES:
            columns = [column(found[f"{way}, batch {batch}, rate {rate:g}"]) for rate in rates]
            best[way, batch] = [_lowest(rates, losses) for losses in zip(*columns, strict=True)]
    rate = {key: [each[0] for each in values] for key, values in best.items()}
    loss = {key: [each[1] for each in values] for key, values in best.items()}
    lora_penalty = differences(loss["lora", 32], loss["lora", 4])
    full_penalty = differences(loss["full", 32], loss["full", 4])
    findings = {
        "ratio": Finding.of(differences(rate["lora", 4], rate["full", 4])),
        "penalty": Finding.of(differences(lora_penalty, full_penalty)),
        "full penalty": Finding.of(full_penalty),
        "rises": Finding.of(differences(rate["lora", 32], rate["lora", 4])),
    }
    table = Table(
        title=f"validation loss (nats) after {samples} records, {seeds} seeds",
        columns=("training", "batch", "rate", "loss"),
        rows=tuple(
            (way, batch, f"{each:g}", round(mean(column(found[f"{way}, batch {batch}, rate {each:g}"])), 4))
            for way, rates in RATES.items()
            for batch in BATCHES
            for each in rates
        ),
    )
    return Evidence(findings, (table,))


def _lowest(rates: tuple[float, ...], losses: tuple[float, ...]) -> tuple[float, float]:
    """Return log10 of the best rate, between those tried, and its loss."""
    rate, loss = lowest_rate(dict(zip(rates, losses, strict=True)))
    return math.log10(rate), loss


def _arm(way: str, batch: int, rate: float, samples: int) -> Arm:
    def recipe(seed: int) -> dict[str, Any]:
        methods = {"lora": {"rank": 16}, **FUSED} if way == "lora" else FUSED
        return arm(methods, seed=seed, steps=math.ceil(samples / batch), rate=rate, documents=batch)

    return recipe


REPRODUCTION = Reproduction(
    name="lora-rate",
    title="LoRA wants about ten times the learning rate, and loses more at large batches",
    source="Schulman et al. 2025, LoRA Without Regret, as told by the Tinker and TRL documentation",
    setting="Llama-3 1B to 8B on Tulu 3 and OpenThoughts",
    here="the embedded model (4 M parameters) on functions of the standard library, batches of 4 and 32",
    claims=CLAIMS,
    measure=measure,
)
