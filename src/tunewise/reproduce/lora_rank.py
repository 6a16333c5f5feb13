"""LoRA's rank and target modules: the rank hardly matters, where the update sits does."""

from __future__ import annotations

from typing import Any

from tunewise.reproduce.bench import Bench
from tunewise.reproduce.claim import Claim, Finding, Mark
from tunewise.reproduce.learning import FUSED, Arm, arm, column, differences, mean, over_seeds
from tunewise.reproduce.reproduction import Evidence, Reproduction, Table

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
RATE = 2e-3

CLAIMS = (
    Claim(key="rank", says="rank 1 does about as well as 64 (WikiSQL 73.4 and 73.5 on q and v): the spread over ranks, "
          "over that of a 16 times different learning rate", mark=Mark.MEMORY, expects="below", neutral=1.0),
    Claim(key="qv over q", says="q and v together beat q alone at one budget (73.7 against 70.4)", mark=Mark.MEMORY,
          unit="nats", expects="below", neutral=0.0),
    Claim(key="v over q", says="v alone beats q alone at one budget (73.0 against 70.4)", mark=Mark.MEMORY, unit="nats",
          expects="below", neutral=0.0),
    Claim(key="all", says="all four attention weights do as well as q and v at one budget (73.7 both)",
          mark=Mark.MEMORY, published=0.0, unit="nats", tolerance=0.02),
    Claim(key="mlp", says="the MLP is where LoRA should be: better than attention alone (LoRA Without Regret)",
          mark=Mark.READ, unit="nats", expects="below", neutral=0.0),
)  # fmt: skip


def measure(bench: Bench) -> Evidence:
    """Train ranks, targets of one budget and learning rates, over seeds."""
    steps, seeds = bench.pick(tiny=1, short=18, full=120), bench.pick(tiny=1, short=3, full=5)
    qv = ("q_proj", "v_proj")
    arms: dict[str, Arm] = {f"q, v; rank {rank}": _arm(qv, rank, RATE, steps) for rank in (1, 4, 16, 64)}
    arms |= {
        "q; rank 16": _arm(("q_proj",), 16, RATE, steps),
        "v; rank 16": _arm(("v_proj",), 16, RATE, steps),
        "q, v; rank 8": _arm(qv, 8, RATE, steps),
        "q, k, v, o; rank 4": _arm(ATTENTION, 4, RATE, steps),
        "attention; rank 16": _arm(ATTENTION, 16, RATE, steps),
        "MLP; rank 8": _arm(MLP, 8, RATE, steps),
        "q, v; rank 16; rate / 4": _arm(qv, 16, RATE / 4, steps),
        "q, v; rank 16; rate x 4": _arm(qv, 16, RATE * 4, steps),
    }
    found = over_seeds(bench, arms, seeds=seeds)
    loss = {name: column(rows) for name, rows in found.items()}
    ranks = list(zip(*(loss[f"q, v; rank {rank}"] for rank in (1, 4, 16, 64)), strict=True))
    rates = list(
        zip(loss["q, v; rank 16; rate / 4"], loss["q, v; rank 16"], loss["q, v; rank 16; rate x 4"], strict=True)
    )
    spread = [(max(r) - min(r)) / (max(s) - min(s)) for r, s in zip(ranks, rates, strict=True)]
    findings = {
        "rank": Finding.of(spread),
        "qv over q": Finding.of(differences(loss["q, v; rank 8"], loss["q; rank 16"])),
        "v over q": Finding.of(differences(loss["v; rank 16"], loss["q; rank 16"])),
        "all": Finding.of(differences(loss["q, k, v, o; rank 4"], loss["q, v; rank 8"])),
        "mlp": Finding.of(differences(loss["MLP; rank 8"], loss["attention; rank 16"])),
    }
    table = Table(
        title=f"validation loss (nats), alpha = 2 x rank, {steps} steps, {seeds} seeds",
        columns=("arm", "trainable", "loss"),
        rows=tuple((name, int(rows[0]["trained"]), round(mean(column(rows)), 4)) for name, rows in found.items()),
    )
    return Evidence(findings, (table,))


def _arm(targets: tuple[str, ...], rank: int, rate: float, steps: int) -> Arm:
    def recipe(seed: int) -> dict[str, Any]:
        return arm({"lora": {"rank": rank, "target_modules": targets}, **FUSED}, seed=seed, steps=steps, rate=rate)

    return recipe


REPRODUCTION = Reproduction(
    name="lora-rank",
    title="LoRA's rank matters less than its learning rate; q and v beat q alone; the MLP matters most",
    source="Hu et al. 2021, LoRA (arXiv 2106.09685), tables 5 and 6; LoRA Without Regret (2025) for the MLP",
    setting="GPT-3 175B on WikiSQL and MultiNLI, budgets of 18 M parameters",
    here="the embedded model (4 M parameters) on functions of the standard library; losses instead of accuracies",
    claims=CLAIMS,
    measure=measure,
)
