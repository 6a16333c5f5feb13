"""Bekman's precisions: how much faster half precision is, and that it learns the same."""

from __future__ import annotations

from typing import Any

from tunewise.reproduce.bench import Bench
from tunewise.reproduce.claim import Claim, Finding, Mark
from tunewise.reproduce.learning import Arm, arm, column, differences, mean, over_seeds, ratios
from tunewise.reproduce.reproduction import Evidence, Reproduction, Table

CLAIMS = (
    Claim(key="bf16 speed", says="bf16 over fp32, samples a second (224.09 over 93.68, A100)", mark=Mark.READ,
          published=2.39, expects="above", neutral=1.0),
    Claim(key="fp16 speed", says="fp16 over fp32 (217.75 over 93.68, A100)", mark=Mark.READ, published=2.32,
          expects="above", neutral=1.0),
    Claim(key="tf32 speed", says="TF32 over fp32 (210.53 over 93.68, A100)", mark=Mark.READ, published=2.25,
          expects="above", neutral=1.0),
    Claim(key="bf16 loss", says="bf16 learns the same: loss over fp32's (2.22 - 2.21)", mark=Mark.READ, published=0.01,
          unit="nats", tolerance=0.02),
    Claim(key="fp16 loss", says="fp16 with loss scaling learns the same (2.21 - 2.21)", mark=Mark.READ, published=0.0,
          unit="nats", tolerance=0.02),
)  # fmt: skip


def measure(bench: Bench) -> Evidence:
    """Train the same seeds in fp32 and bf16."""
    steps, seeds = bench.pick(tiny=1, short=24, full=100), bench.pick(tiny=1, short=3, full=5)
    arms: dict[str, Arm] = {compute: _arm(compute, steps) for compute in ("fp32", "bf16")}
    found = over_seeds(bench, arms, seeds=seeds)
    plain = found["fp32"]
    gpu = "TF32 is a mode of a GPU's matrix units"
    slow = "a CPU emulates fp16, a hundred times slower; needs a GPU"
    findings = {
        "bf16 speed": Finding.of(ratios(column(plain, "seconds"), column(found["bf16"], "seconds"))),
        "fp16 speed": Finding.untested(slow),
        "tf32 speed": Finding.untested(gpu),
        "bf16 loss": Finding.of(differences(column(found["bf16"]), column(plain))),
        "fp16 loss": Finding.untested(slow),
    }
    table = Table(
        title=f"full fine-tuning of the embedded model, {steps} steps, {seeds} seeds",
        columns=("precision", "validation loss", "seconds"),
        rows=tuple((n, round(mean(column(r)), 4), round(mean(column(r, "seconds")), 1)) for n, r in found.items()),
    )
    return Evidence(findings, (table,))


def _arm(compute: str, steps: int) -> Arm:
    def recipe(seed: int) -> dict[str, Any]:
        return arm({"precision": {"compute": compute}}, seed=seed, steps=steps, rate=3e-4)

    return recipe


REPRODUCTION = Reproduction(
    name="precision",
    title="Half precision is more than twice as fast and learns the same",
    source="S. Bekman, transformers issue 15026, table of precisions",
    setting="T5-base, wmt16 ro-en, batch 32, one epoch, A100",
    here="the embedded model (4 M parameters), full fine-tuning, the same seeds in every precision, on the CPU",
    claims=CLAIMS,
    measure=measure,
    needs_bf16=True,
)
