"""(Q)DyLoRA: every rank from one run, against a LoRA of the largest rank that is cut."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from tunewise.layers.dylora import DyLoRALinear
from tunewise.layers.lora import LoRALinear, lora_layers
from tunewise.reproduce.bench import Bench
from tunewise.reproduce.claim import Claim, Finding, Mark
from tunewise.reproduce.learning import arm, differences, held_out, learn, mean
from tunewise.reproduce.reproduction import Evidence, Reproduction, Table

RANKS = (1, 2, 4, 8, 16)

CLAIMS = (
    *(
        Claim(key=f"rank {rank}", says=f"cut to rank {rank}, DyLoRA is better than a LoRA of rank 16 that is cut",
              mark=Mark.READ, unit="nats", expects="below", neutral=0.0)
        for rank in (1, 2, 4)
    ),
    Claim(key="sorted", says="more ranks are better (\"semi-sorted\"): share of the four doublings that lower the loss",
          mark=Mark.READ, published=1.0, unit="", expects="above", neutral=0.5, tolerance=0.25),
    Claim(key="whole", says="at the largest rank it loses little against LoRA: difference of losses", mark=Mark.READ,
          published=0.0, unit="nats", tolerance=0.02),
)  # fmt: skip


def measure(bench: Bench) -> Evidence:
    """Train both once over an NF4 base, and take the loss at every rank."""
    seeds = range(bench.pick(tiny=1, short=3, full=5))
    steps = bench.pick(tiny=1, short=32, full=160)
    loss: dict[str, list[dict[str, float]]] = {"dylora": [], "lora": []}
    for seed, method in itertools.product(seeds, loss):
        loss[method].append(bench.once(f"{method}, seed {seed}", _losses, method, seed, steps))
    both = {(method, rank): [row[str(rank)] for row in rows] for method, rows in loss.items() for rank in RANKS}
    falls = [
        mean([float(row[str(high)] < row[str(low)]) for low, high in itertools.pairwise(RANKS)])
        for row in loss["dylora"]
    ]
    findings = {f"rank {rank}": Finding.of(differences(both["dylora", rank], both["lora", rank])) for rank in (1, 2, 4)}
    findings["sorted"] = Finding.of(falls)
    findings["whole"] = Finding.of(differences(both["dylora", 16], both["lora", 16]))
    table = Table(
        title=f"validation loss (nats) when cut, over an NF4 base, {steps} steps, {len(seeds)} seeds",
        columns=("rank", "DyLoRA", "LoRA of rank 16, its first ranks"),
        rows=tuple((rank, round(mean(both["dylora", rank]), 4), round(mean(both["lora", rank]), 4)) for rank in RANKS),
    )
    return Evidence(findings, (table,))


def cut_first(layer: LoRALinear, rank: int) -> LoRALinear:
    """Return a layer of the first ranks, at the scale that it was trained with."""
    if isinstance(layer, DyLoRALinear):
        return layer.cut(rank)
    cut = LoRALinear(layer.base_layer, rank, layer.scale)
    with torch.no_grad():
        cut.lora_A.weight.copy_(layer.lora_A.weight[:rank])
        cut.lora_B.weight.copy_(layer.lora_B.weight[:, :rank])
    return cut


def _losses(method: str, seed: int, steps: int) -> dict[str, float]:
    rank = max(RANKS)
    options = {"rank": rank} if method == "dylora" else {"rank": rank, "alpha": rank}
    methods: dict[str, Any] = {method: options, "quantize": {"kind": "nf4"}}
    learnt = learn(arm(methods, seed=seed, steps=steps, rate=2e-3, evaluation={"max_documents": 2}))
    whole, found = lora_layers(learnt.run.model), {}
    for each in RANKS:
        for name, layer in whole.items():
            learnt.run.model.set_submodule(name, cut_first(layer, each))
        found[str(each)] = held_out(learnt, most=80).mean
    return found


REPRODUCTION = Reproduction(
    name="qdylora",
    title="One QDyLoRA run serves every rank, and at low ranks beats a QLoRA that is cut",
    source="Rajabzadeh et al. 2024, QDyLoRA (arXiv 2402.10462); Valipour et al. 2022, DyLoRA (arXiv 2210.07558)",
    setting="Falcon-40B and LLaMA, ranks 1 to 64, one V100 with 32 GB",
    here="the embedded model (4 M parameters) in NF4 on functions of the standard library, ranks 1 to 16",
    claims=CLAIMS,
    measure=measure,
)
