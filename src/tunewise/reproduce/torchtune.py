"""torchtune's memory ladder: one method after another, and how much of the speed packing alone gives."""

from __future__ import annotations

from tunewise.reproduce.bench import Bench
from tunewise.reproduce.claim import Claim, Finding, Mark
from tunewise.reproduce.ladder_claims import findings_of, measured, memory_claims, speed_claim, table_of
from tunewise.reproduce.ladders import torchtune
from tunewise.reproduce.reproduction import Evidence, Reproduction

LADDER = torchtune.ladder("cpu")
ROWS = ("+ packed", "+ chunked loss", "+ checkpointing", "+ 8-bit AdamW", "+ LoRA", "+ QLoRA")

CLAIMS = (
    *memory_claims(),
    *(speed_claim(LADDER, row) for row in ROWS),
    Claim(key="compile", says="torch.compile: 8998 over 7075 "
          "tokens/s", mark=Mark.READ, published=1.272, expects="above",
          neutral=1.0),
)  # fmt: skip


def measure(bench: Bench) -> Evidence:
    """Measure every row that has a counterpart here."""
    results = measured(LADDER, bench, bench.pick(tiny=1, short=1, full=3))
    findings = findings_of(LADDER, results, ROWS)
    findings["compile"] = Finding.untested("torch.compile has no counterpart in tunewise")
    return Evidence(findings, (table_of(LADDER, results),))


REPRODUCTION = Reproduction(
    name="torchtune",
    title="torchtune's ladder: memory falls with each method, and packing gives most of the speed",
    source=LADDER.source,
    setting=LADDER.setting,
    here="a random Llama of 17 M parameters on the CPU: " + "; ".join(LADDER.differences),
    claims=CLAIMS,
    measure=measure,
    needs_bf16=True,
)
