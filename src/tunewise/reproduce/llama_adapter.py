"""LLaMA-Adapter: prompts behind a gate of zero start from the base model; without the gate they disturb it."""

from __future__ import annotations

from typing import Any

import torch

from tunewise.engine.assemble import assemble
from tunewise.methods.method import Run
from tunewise.quality.base import adapter_off
from tunewise.quality.losses import logit_chunks
from tunewise.reproduce.bench import Bench
from tunewise.reproduce.claim import Claim, Finding, Mark
from tunewise.reproduce.learning import arm, differences, learn, mean, plan_of
from tunewise.reproduce.reproduction import Evidence, Reproduction, Table
from tunewise.reproduce.true_shapes import llama, trained_parameters

CLAIMS = (
    Claim(key="start", says="before the first step the model computes what the base does: largest difference of logits",
          mark=Mark.FORMULA, published=0.0, unit="", tolerance=0.0),
    Claim(key="size", says="10 prompts in the top 30 layers of LLaMA-7B", mark=Mark.READ, published=1.2288,
          unit="M parameters", tolerance=0.01),
    Claim(key="jump", says="without the gate of zero training starts from a worse loss", mark=Mark.MEMORY, unit="nats",
          expects="above", neutral=0.0),
    Claim(key="end", says="... and ends worse (ScienceQA 40.77 against 83.85)", mark=Mark.MEMORY, unit="nats",
          expects="above", neutral=0.0),
    Claim(key="learns", says="the adapter learns: loss after training below the loss before", mark=Mark.READ,
          unit="nats", expects="below", neutral=0.0),
)  # fmt: skip


def measure(bench: Bench) -> Evidence:
    """Compare logits at the start, and train with gates of zero and of one."""
    steps, seeds = bench.pick(tiny=1, short=30, full=160), range(bench.pick(tiny=1, short=3, full=5))
    rows = {
        gate: [bench.once(f"gate {gate}, seed {seed}", _losses, gate, seed, steps) for seed in seeds] for gate in (0, 1)
    }
    first, last = ({gate: [row[place] for row in found] for gate, found in rows.items()} for place in (0, 1))
    findings = {
        "start": Finding.exact(bench.once("start", _difference_at_the_start)),
        "size": Finding.exact(bench.once("size", _millions)),
        "jump": Finding.of(differences(first[1], first[0])),
        "end": Finding.of(differences(last[1], last[0])),
        "learns": Finding.of(differences(last[0], first[0])),
    }
    table = Table(
        title=f"validation loss (nats), 10 prompts in the top 3 of 4 layers, {steps} steps, {len(seeds)} seeds",
        columns=("gate at the start", "before", "after"),
        rows=tuple((gate, round(mean(first[gate]), 4), round(mean(last[gate]), 4)) for gate in (0, 1)),
    )
    return Evidence(findings, (table,))


def _mapping(seed: int, steps: int) -> dict[str, Any]:
    methods = {"peft": {"kind": "ADAPTION_PROMPT", "options": {"adapter_len": 10, "adapter_layers": 3}}}
    return arm({**methods, "whole_loss": {}}, seed=seed, steps=steps, rate=5e-3)


def _losses(gate: int, seed: int, steps: int) -> tuple[float, float]:
    @torch.no_grad()
    def open_gates(run: Run) -> None:
        for name, parameter in run.model.named_parameters():
            if name.endswith("adaption_gate"):
                parameter.fill_(float(gate))

    learnt = learn(_mapping(seed, steps), change=open_gates)
    return learnt.first_loss, learnt.loss


def _difference_at_the_start() -> float:
    plan = plan_of(_mapping(0, 1))
    run = assemble(plan)
    documents = range(min(4, len(plan.data.validation)))
    with adapter_off(run):
        base = [chunk.logits_CV for chunk in logit_chunks(run, plan.data.validation, documents)]
    adapted = [chunk.logits_CV for chunk in logit_chunks(run, plan.data.validation, documents)]
    return max(float((one - other).abs().max()) for one, other in zip(base, adapted, strict=True))


def _millions() -> float:
    options = {"adapter_len": 10, "adapter_layers": 30}
    methods = {"peft": {"kind": "ADAPTION_PROMPT", "options": options}, "whole_loss": {}}
    return trained_parameters(llama(4096, 11008, 32, 32), methods) / 1e6


REPRODUCTION = Reproduction(
    name="llama-adapter",
    title="LLaMA-Adapter's gate of zero starts from the base model; without it training starts, and ends, worse",
    source="Zhang et al. 2023, LLaMA-Adapter (arXiv 2303.16199), section 3 and the ablation of the gate",
    setting="LLaMA-7B on 52K instructions, 8 A100; ScienceQA for the ablation",
    here="the embedded model (4 M parameters) with peft's adapter; LLaMA-7B's shape by a dry run",
    claims=CLAIMS,
    measure=measure,
)
