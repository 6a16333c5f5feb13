"""Hugging Face's single-GPU guide: nine rows of methods, their memory and speed, and that effects do not multiply."""

from __future__ import annotations

from tunewise.reproduce.bench import Bench
from tunewise.reproduce.claim import Claim, Mark
from tunewise.reproduce.ladder_claims import findings_of, measured, memory_claims, speed_claim, synergy, table_of
from tunewise.reproduce.ladders import hugging_face
from tunewise.reproduce.reproduction import Evidence, Reproduction

LADDER = hugging_face.ladder("cpu")
ROWS = (
    "batch 1 x 4", "batch 1 x 4, checkpointing", "half precision, batch 4", "Adafactor, batch 4", "8-bit Adam, batch 4",
)  # fmt: skip

CLAIMS = (
    *memory_claims(),
    *(speed_claim(LADDER, row) for row in ROWS),
    Claim(key="synergy", says="effects do not multiply: the speed of all together over the product of the single ones "
          "(10.09 over 12.60)", mark=Mark.COMPUTED, published=0.80, expects="below", neutral=1.0, tolerance=0.1),
)  # fmt: skip


def measure(bench: Bench) -> Evidence:
    """Measure every row in turns."""
    results = measured(LADDER, bench, bench.pick(tiny=1, short=1, full=3))
    findings = findings_of(LADDER, results, ROWS) | {"synergy": synergy(LADDER, results)}
    return Evidence(findings, (table_of(LADDER, results),))


REPRODUCTION = Reproduction(
    name="hf-single-gpu",
    title="Hugging Face's single-GPU ladder: memory in the published order, and effects that do not multiply",
    source=LADDER.source,
    setting=f"{LADDER.setting}; its memory without the 1343 MB of CUDA context",
    here="a random Llama-like decoder of 17 M parameters, 4 x 512 tokens, on the CPU: " + "; ".join(LADDER.differences),
    claims=CLAIMS,
    measure=measure,
    needs_bf16=True,
)
