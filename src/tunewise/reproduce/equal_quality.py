"""Bekman's "almost 3x": what is left of it when the faster setting has to learn as much from the same samples."""

from __future__ import annotations

from typing import Any

from tunewise.reproduce.bench import Bench
from tunewise.reproduce.claim import Claim, Finding, Mark
from tunewise.reproduce.learning import Arm, arm, column, differences, mean, over_seeds, ratios, scratch
from tunewise.reproduce.reproduction import Evidence, Reproduction, Table

BATCH, ACCUMULATED = 8, 8
BETA2 = 0.999
LARGE, ROOT = BATCH * ACCUMULATED, ACCUMULATED**0.5
RATES = {"fine-tuned": 2e-4, "from scratch": 2e-3}

CLAIMS = (
    Claim(key="raw", says="samples a second of bf16, fused AdamW and 8 accumulated micro-batches over fp32 (267.21 "
          "over 92.15, A100)", mark=Mark.READ, published=2.90, expects="above", neutral=1.0),
    Claim(key="gap", says="... but its loss after the same samples is higher (2.62 - 2.21); here: a model that knows "
          "the "
          "domain, fine-tuned", mark=Mark.READ, published=0.41, unit="nats", expects="above", neutral=0.0),
    Claim(key="gap from scratch", says="... its loss after the same samples is higher; here: a model from scratch",
          mark=Mark.READ, published=0.41, unit="nats", expects="above", neutral=0.0),
    Claim(key="retuned", says="from scratch, the gap shrinks when the learning rate follows the root of the batch",
          mark=Mark.READ, unit="nats", expects="below", neutral=0.0),
    Claim(key="half-life", says="... and further with beta2's half-life kept in samples (0.999^8)", mark=Mark.READ,
          unit="nats", expects="below", neutral=0.0),
    Claim(key="left", says="after both the small batch still learns more from the same samples: the best large-batch "
          "loss minus the small batch's", mark=Mark.READ, unit="nats", expects="above", neutral=0.0),
)  # fmt: skip

SETTINGS: dict[str, tuple[str, int, float, float]] = {
    "fp32, batch 8": ("fp32", BATCH, 1.0, BETA2),
    "bf16, batch 64": ("bf16", LARGE, 1.0, BETA2),
    "bf16, batch 64, rate x sqrt 8": ("bf16", LARGE, ROOT, BETA2),
    "bf16, batch 64, rate x sqrt 8, beta2^8": ("bf16", LARGE, ROOT, BETA2**ACCUMULATED),
}
"""Precision, batch, factor on the rate, beta2."""


def measure(bench: Bench) -> Evidence:
    """Train the slow setting, the fast one, and the fast one with its options moved to its batch."""
    seeds = bench.pick(tiny=1, short=3, full=5)
    samples = {
        "fine-tuned": bench.pick(tiny=64, short=128, full=640),
        "from scratch": bench.pick(tiny=64, short=384, full=2048),
    }
    arms: dict[str, Arm] = {
        f"{world}, {name}": _arm(world, name, samples[world], bench) for world in RATES for name in SETTINGS
    }
    found = over_seeds(bench, arms, seeds=seeds)
    loss = {name: column(rows) for name, rows in found.items()}
    tuned, (slow, fast, rooted, halved) = (
        [loss[f"{world}, {name}"] for name in SETTINGS] for world in ("fine-tuned", "from scratch")
    )
    seconds = [column(found[f"fine-tuned, {name}"], "seconds") for name in SETTINGS]
    best = [min(each) for each in zip(fast, rooted, halved, strict=True)]
    findings = {
        "raw": Finding.of(ratios(seconds[0], seconds[1]), "fine-tuning, evaluation included"),
        "gap": Finding.of(differences(tuned[1], tuned[0])),
        "gap from scratch": Finding.of(differences(fast, slow)),
        "retuned": Finding.of(differences(rooted, fast)),
        "half-life": Finding.of(differences(halved, rooted)),
        "left": Finding.of(differences(best, slow)),
    }
    table = Table(
        title=f"validation loss (nats) after {samples['fine-tuned']} and {samples['from scratch']} records, {seeds} "
        f"seeds",
        columns=("setting", "loss", "seconds"),
        rows=tuple(
            (name, round(mean(loss[name]), 4), round(mean(column(rows, "seconds")), 1)) for name, rows in found.items()
        ),
    )
    return Evidence(findings, (table,))


def _arm(world: str, name: str, samples: int, bench: Bench) -> Arm:
    compute, batch, factor, beta2 = SETTINGS[name]

    def recipe(seed: int) -> dict[str, Any]:
        methods = {"precision": {"compute": compute}, "adamw": {"beta2": beta2, "fused": compute == "bf16"}}
        steps, rate = samples // batch, factor * RATES[world]
        if world == "fine-tuned":
            return arm(methods, seed=seed, steps=steps, rate=rate, documents=batch)
        made = {"model": scratch(bench.folder / "shape"), "objective": "pretrain"}
        data = {"max_length": 64, "max_records": 60, "too_long": "split"}
        return arm(methods, seed=seed, steps=steps, rate=rate, documents=batch, data=data, **made)

    return recipe


REPRODUCTION = Reproduction(
    name="three-times-faster",
    title='"Almost 3 times faster" is not at equal quality: eight times fewer steps learn less',
    source="S. Bekman, transformers issue 15026; Marek et al. 2025 (arXiv 2507.07101) for beta2",
    setting="T5-base, wmt16 ro-en, one epoch on an A100: fp32 against bf16, fused AdamW and accumulation of 8",
    here="batch 8 against 8 x 8 on the CPU: the embedded model (4 M parameters) fine-tuned on functions of the "
    "standard "
    "library, and a Llama of 0.5 M parameters from scratch on its text",
    claims=CLAIMS,
    measure=measure,
    needs_bf16=True,
)
