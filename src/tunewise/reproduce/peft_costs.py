"""PEFT's method comparison on MetaMathQA: trainable parameters and memory at Llama-3.2-3B's shape."""

from __future__ import annotations

from typing import Any

from tunewise.engine.tracking import Moment
from tunewise.reproduce.bench import Bench
from tunewise.reproduce.claim import Claim, Finding, Mark
from tunewise.reproduce.reproduction import Evidence, Reproduction, Table
from tunewise.reproduce.true_shapes import LLAMA_3_2_3B, estimate

ROWS, LENGTH = 4, 768
QV = ("q_proj", "v_proj")


def _peft(kind: str, **options: Any) -> dict[str, Any]:
    return {"peft": {"kind": kind, "options": options}, "whole_loss": {}}


ARMS: dict[str, tuple[dict[str, Any], float | None, float | None]] = {
    "full": ({}, 3.2e9, 36.2),
    "LoRA r32": ({"lora": {"rank": 32, "target_modules": QV}}, 9_175_040, 20.8),
    "LoRA r64": ({"lora": {"rank": 64, "target_modules": QV}}, 18.4e6, 21.0),
    "LoRA r10 MLP": ({"lora": {"rank": 10, "target_modules": ("gate_proj", "up_proj", "down_proj")}}, 9.5e6, 23.0),
    "DoRA r32": ({"dora": {"rank": 32, "target_modules": QV}}, 9.3e6, 22.8),
    "IA3": (_peft("IA3"), 0.3e6, 21.6),
    "prefix": (_peft("PREFIX_TUNING", num_virtual_tokens=50), 2.9e6, 19.2),
}
"""Methods, published trainable parameters, published largest memory in GiB."""


def _rounding(size: float) -> float:
    """Half of the last digit that is published, in millions: one count is exact, the others have two digits."""
    if size == 9_175_040:
        return 0.0
    return 50.0 if size >= 1e9 else 0.05


CLAIMS = (
    *(
        Claim(key=f"{name} size", says=f"{name}: trainable parameters", mark=Mark.READ, published=size / 1e6,
              unit="M", tolerance=_rounding(size))
        for name, (_, size, _) in ARMS.items() if size is not None
    ),
    Claim(key="memory", says="LoRA r32 needs this share of full fine-tuning's memory (20.8 of 36.2 GiB)",
          mark=Mark.READ, published=0.575, expects="below", neutral=1.0, tolerance=0.1),
    Claim(key="work", says="... and this share of its time (942 of 2147 s); here the share of floating-point "
          "operations",
          mark=Mark.READ, published=0.44, expects="below", neutral=1.0),
    Claim(key="accuracy", says="LoRA r32 is as accurate on GSM8K (47.8 and 47.2 %)", mark=Mark.READ, published=0.6,
          unit="points", tolerance=2.8),
)  # fmt: skip


def measure(bench: Bench) -> Evidence:
    """Dry-run every method at the true shape."""
    found = {name: bench.once(name, _figures, methods) for name, (methods, _, _) in ARMS.items()}
    full, lora = found["full"], found["LoRA r32"]
    findings = {f"{name} size": Finding.exact(found[name]["trained"] / 1e6) for name in ARMS}
    findings |= {
        "memory": Finding.exact(lora["gib"] / full["gib"]),
        "work": Finding.exact(lora["flops"] / full["flops"], "time is memory traffic too, and needs a GPU"),
        "accuracy": Finding.untested("needs the pretrained Llama-3.2-3B and a GPU"),
    }
    table = Table(
        title=f"Llama-3.2-3B's shape, bf16, {ROWS} rows of {LENGTH} tokens, by a dry run",
        columns=("method", "trainable", "published", "GiB", "published GiB"),
        rows=tuple((n, each["trained"], ARMS[n][1], round(each["gib"], 1), ARMS[n][2]) for n, each in found.items()),
    )
    return Evidence(findings, (table,))


def _figures(methods: dict[str, Any]) -> dict[str, float]:
    precision = {"compute": "bf16"} if methods else {"compute": "bf16", "trainable": "same"}  # as PEFT trains them
    every: dict[str, Any] = {"precision": precision, "whole_loss": {}, **methods}
    seen = estimate(LLAMA_3_2_3B, every, rows=ROWS, length=LENGTH)
    return {
        "trained": seen.trainable_parameters,
        "gib": seen.needed_bytes / 2**30,
        "flops": seen.flops(Moment.FORWARD, Moment.BACKWARD),
    }


REPRODUCTION = Reproduction(
    name="peft-costs",
    title="What PEFT's methods train and need beside full fine-tuning",
    source="Hugging Face PEFT, method_comparison/MetaMathQA (August 2026)",
    setting="Llama-3.2-3B, MetaMathQA 20k samples in batches of 4, GSM8K, bf16, L40S, one seed",
    here="the same shape by a dry run of the step, without weights; sequences of 768 tokens",
    claims=CLAIMS,
    measure=measure,
)
