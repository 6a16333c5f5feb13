"""QLoRA: adapters over a 4-bit base learn what adapters over a 16-bit base learn."""

from __future__ import annotations

from typing import Any

from tunewise.reproduce.bench import Bench
from tunewise.reproduce.claim import Claim, Finding, Mark
from tunewise.reproduce.learning import Arm, arm, column, differences, mean, over_seeds, ratios
from tunewise.reproduce.reproduction import Evidence, Reproduction, Table
from tunewise.reproduce.true_shapes import gigabytes, llama

CLAIMS = (
    Claim(key="nf4", says="after training NF4 is as good as 16 bits (MMLU 53.1 against 53.0): difference of losses",
          mark=Mark.MEMORY, published=0.0, unit="nats", tolerance=0.02),
    Claim(key="recovered", says="... what rounding lost is won back: the gap after training over the gap before",
          mark=Mark.MEMORY, published=0.0, expects="below", neutral=1.0, tolerance=0.5),
    Claim(key="fp4", says="FP4 stays behind NF4 (52.2 against 53.1): difference of losses", mark=Mark.MEMORY,
          unit="nats", expects="above", neutral=0.0),
    Claim(key="48 GB", says="65B can be fine-tuned on one 48 GB GPU: bytes that the step needs, by a dry run",
          mark=Mark.READ, unit="GB", expects="below", neutral=48.0),
    Claim(key="speed", says="4 bits are slower: tokens a second over LoRA's (torchtune 8035 over 8210, RTX 4090 2413 "
          "over 3083)", mark=Mark.READ, published=0.98, expects="below", neutral=1.0),
)  # fmt: skip


def measure(bench: Bench) -> Evidence:
    """Train LoRA over the base in 16 bits, NF4 and FP4."""
    steps, seeds = bench.pick(tiny=1, short=24, full=120), bench.pick(tiny=1, short=3, full=5)
    kinds = {"16 bits": None, "NF4": "nf4", "FP4": "fp4"}
    arms: dict[str, Arm] = {name: _arm(kind, steps) for name, kind in kinds.items()}
    found = over_seeds(bench, arms, seeds=seeds)
    plain, nf4, fp4 = found["16 bits"], found["NF4"], found["FP4"]
    before = differences(column(fp4, "first"), column(plain, "first"))
    after = differences(column(fp4), column(plain))
    findings = {
        "nf4": Finding.of(differences(column(nf4), column(plain))),
        "recovered": Finding.of(ratios(after, before), "FP4's gap, which is the one that can be seen"),
        "fp4": Finding.of(differences(column(fp4), column(nf4))),
        "48 GB": Finding.exact(bench.once("65B", _needs_65b)),
        "speed": Finding.of(ratios(column(plain, "seconds"), column(nf4, "seconds"))),
    }
    table = Table(
        title=f"LoRA of rank 16 on all linear layers, {steps} steps, {seeds} seeds; losses in nats",
        columns=("base", "before", "after", "seconds"),
        rows=tuple(
            (name, *(round(mean(column(rows, key)), 4) for key in ("first", "loss")),
             round(mean(column(rows, "seconds")), 1))
            for name, rows in found.items()
        ),
    )  # fmt: skip
    return Evidence(findings, (table,))


def _arm(kind: str | None, steps: int) -> Arm:
    def recipe(seed: int) -> dict[str, Any]:
        methods = {"lora": {"rank": 16}, **({"quantize": {"kind": kind}} if kind else {})}
        return arm(methods, seed=seed, steps=steps, rate=2e-3)

    return recipe


def _needs_65b() -> float:
    """QLoRA's setting at LLaMA-65B's shape: NF4, rank 64 on all linear layers, one row of 512 tokens."""
    methods: dict[str, Any] = {
        "quantize": {"kind": "nf4"}, "lora": {"rank": 64, "alpha": 16}, "checkpointing": {},
        "precision": {"compute": "bf16", "trainable": "same"}, "adamw_8bit": {},
    }  # fmt: skip
    return gigabytes(llama(8192, 22016, 80, 64), methods, rows=1, length=512)


REPRODUCTION = Reproduction(
    name="qlora",
    title="Adapters over 4 bits learn what adapters over 16 bits learn, and 65B fit into 48 GB",
    source="Dettmers et al. 2023, QLoRA (arXiv 2305.14314), tables 3 and 4; torchtune's documentation for the speed",
    setting="LLaMA 7B to 65B on Alpaca and FLAN v2, MMLU 5-shot",
    here="the embedded model (4 M parameters) on functions of the standard library; LLaMA-65B's shape by a dry run",
    claims=CLAIMS,
    measure=measure,
    needs_bf16=True,
)
