"""FP8-LM: 6 bytes a parameter, the loss of bf16, and which part of the state may have 8 bits."""

from __future__ import annotations

from tunewise.reproduce.bench import Bench
from tunewise.reproduce.claim import Claim, Finding, Mark
from tunewise.reproduce.learning import column, differences, mean
from tunewise.reproduce.optimizer_states import bytes_of, train
from tunewise.reproduce.reproduction import Evidence, Reproduction, Table

NOISE = 0.05
"""Nats that count as the same; the losses of two seeds differ by about as much."""

ALONE = ("gradient fp8", "first moment fp8", "second moment fp8", "master fp16")

CLAIMS = (
    Claim(key="bytes", says="gradient, moments and master weights: bytes a parameter (1 + 1 + 2 + 2)", mark=Mark.MEMORY,
          published=6.0, unit="bytes", tolerance=0.05),
    Claim(key="bf16 bytes", says="the same of mixed bf16 training (4 + 4 + 4 + 4)", mark=Mark.MEMORY, published=16.0,
          unit="bytes", tolerance=0.05),
    Claim(key="loss", says="all of it learns what bf16 learns: difference of losses", mark=Mark.READ, published=0.0,
          unit="nats", tolerance=NOISE),
    Claim(key="gradient fp8", says="gradients in FP8, scaled automatically, do no harm", mark=Mark.MEMORY,
          published=0.0, unit="nats", tolerance=NOISE),
    Claim(key="first moment fp8", says="the first moment tolerates FP8", mark=Mark.MEMORY, published=0.0, unit="nats",
          tolerance=NOISE),
    Claim(key="second moment fp8", says="the second moment does not: the loss is worse", mark=Mark.MEMORY, unit="nats",
          expects="above", neutral=0.0),
    Claim(key="master fp16", says="master weights may have 16 bits with a scale a tensor", mark=Mark.MEMORY,
          published=0.0, unit="nats", tolerance=NOISE),
    Claim(key="memory", says="GPT-175B: 39 % less memory than Megatron in bf16 (v2 of the paper)", mark=Mark.READ,
          published=0.61, expects="below", neutral=1.0),
    Claim(key="speed", says="GPT-175B on H100: 75 % faster than Megatron in bf16 (v2 of the paper)", mark=Mark.READ,
          published=1.75, expects="above", neutral=1.0),
)  # fmt: skip


def measure(bench: Bench) -> Evidence:
    """Train every variant from scratch, and count the bytes of its tensors."""
    steps, seeds = bench.pick(tiny=1, short=28, full=120), range(bench.pick(tiny=1, short=3, full=5))
    variants = ("bf16", "fp8_lm", *ALONE)
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    for seed in seeds:
        for variant in variants:
            found[variant].append(bench.once(f"{variant}, seed {seed}", train, variant, seed, steps))
    plain = column(found["bf16"])
    parts = {variant: bytes_of(variant) for variant in ("bf16", "fp8_lm")}
    gpu = "needs GPUs: the share of activations and of communication decides"
    findings = {
        "bytes": Finding.exact(_without_copy(parts["fp8_lm"])),
        "bf16 bytes": Finding.exact(_without_copy(parts["bf16"])),
        "loss": Finding.of(differences(column(found["fp8_lm"]), plain)),
        **{variant: Finding.of(differences(column(found[variant]), plain)) for variant in ALONE},
        "memory": Finding.untested(gpu),
        "speed": Finding.untested(gpu),
    }
    rows = tuple(
        (variant, round(mean(column(each)), 4), round(mean(differences(column(each), plain)), 4))
        for variant, each in found.items()
    )
    return Evidence(
        findings,
        (
            Table(
                title=f"0.5 M parameters from scratch, {steps} steps, {len(seeds)} seeds; each precision alone, the "
                f"rest "
                "in fp32",
                columns=("variant", "validation loss (nats)", "above bf16"),
                rows=rows,
            ),
            Table(
                title="bytes a parameter, counted on tensors",
                columns=("variant", "part", "bytes"),
                rows=tuple((v, part, size) for v, each in parts.items() for part, size in each.items()),
            ),
        ),
    )


def _without_copy(parts: dict[str, float]) -> float:
    """The paper counts no working copy of the weights."""
    return sum(size for part, size in parts.items() if part != "computed with")


REPRODUCTION = Reproduction(
    name="fp8-lm",
    title="FP8-LM needs 6 bytes a parameter and learns as bf16 does, if the second moment keeps 16 bits",
    source="Peng et al. 2023, FP8-LM (arXiv 2310.18313), sections 2 and 3",
    setting="GPT 125M to 175B on H100",
    here="a Llama of 0.5 M parameters from scratch on the standard library's text; FP8 by arithmetic on the CPU",
    claims=CLAIMS,
    measure=measure,
    needs_bf16=True,
)
