"""NF4 against FP4 and 4-bit integers: the levels, the bits, the rounding error, and the loss of a rounded model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tunewise.engine.assemble import assemble
from tunewise.layers.linear import linear_layers, output_head, weight_of
from tunewise.layers.quantized import FourBitLinear
from tunewise.quality.losses import document_losses
from tunewise.quality.statistics import paired_difference
from tunewise.reproduce.bench import Bench
from tunewise.reproduce.claim import Claim, Finding, Mark
from tunewise.reproduce.learning import arm, plan_of, ratios, same_draws
from tunewise.reproduce.reproduction import Evidence, Reproduction, Table

LEVELS = (
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0, 0.0795803, 0.1609302,
    0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
)  # fmt: skip
"""NF4's sixteen numbers as published (QLoRA, appendix E)."""

BLOCK = 64
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""FP4's magnitudes with two bits of exponent and one of mantissa; bitsandbytes' "fp4" has other ones."""

KINDS = ("nf4", "e2m1", "fp4", "int4")

CLAIMS = (
    Claim(key="levels", says="NF4's 16 levels: the largest difference from the published ones", mark=Mark.READ,
          published=0.0, unit="", tolerance=1e-6),
    Claim(key="bits", says="bits a parameter with double quantization, blocks of 64 and 256", mark=Mark.COMPUTED,
          published=4.127, unit="bits", tolerance=0.001),
    Claim(key="saved", says="bits a parameter that double quantization saves", mark=Mark.READ, published=0.373,
          unit="bits", tolerance=0.001),
    Claim(key="e2m1 error", says="FP4 (E2M1) rounds normal weights worse than NF4: ratio of mean squared errors",
          mark=Mark.MEMORY, expects="above", neutral=1.0),
    Claim(key="int4 error", says="4-bit integers round normal weights worse than NF4: ratio of mean squared errors",
          mark=Mark.MEMORY, expects="above", neutral=1.0),
    Claim(key="int4 over e2m1", says="... and worse than FP4 (E2M1), as the perplexities 34.34 and 31.07 have it",
          mark=Mark.MEMORY, expects="above", neutral=1.0),
    Claim(key="int4 over fp4", says="... and worse than what bitsandbytes calls FP4", mark=Mark.MEMORY, expects="above",
          neutral=1.0),
    Claim(key="e2m1 loss", says="a model rounded to FP4 (E2M1) has a higher perplexity than in NF4 (31.07 over 27.41)",
          mark=Mark.MEMORY, published=0.125, unit="nats", expects="above", neutral=0.0),
    Claim(key="int4 loss", says="a model rounded to 4-bit integers has a higher perplexity than in NF4 (34.34 over "
          "27.41)", mark=Mark.MEMORY, published=0.225, unit="nats", expects="above", neutral=0.0),
)  # fmt: skip


def measure(bench: Bench) -> Evidence:
    """Round normal numbers and the embedded model's weights, and look at what is lost."""
    findings = _format()
    draws = bench.pick(tiny=3, short=5, full=10)
    errors = {kind: [_error(kind, seed) for seed in range(draws)] for kind in KINDS}
    findings["e2m1 error"] = Finding.of(ratios(errors["e2m1"], errors["nf4"]))
    findings["int4 error"] = Finding.of(ratios(errors["int4"], errors["nf4"]))
    findings["int4 over e2m1"] = Finding.of(ratios(errors["int4"], errors["e2m1"]))
    findings["int4 over fp4"] = Finding.of(ratios(errors["int4"], errors["fp4"]))
    losses = bench.once("losses", _losses, bench.pick(tiny=8, short=200, full=600))
    plain, counts = losses["plain"], losses["counts"]
    rows = []
    for kind in KINDS:
        change = paired_difference(plain, losses[kind], counts)
        rows.append((kind, sum(errors[kind]) / draws, change.middle, f"{change.low:+.4f} to {change.high:+.4f}"))
    for kind in ("e2m1", "int4"):
        gap = paired_difference(losses["nf4"], losses[kind], counts)
        findings[f"{kind} loss"] = Finding(middle=gap.middle, low=gap.low, high=gap.high)
    table = Table(
        title="rounding in blocks of 64: the error of N(0, 1), and what the embedded model's loss rises by (nats)",
        columns=("kind", "mean squared error", "rise of the loss", "95 % interval"),
        rows=tuple(rows),
    )
    return Evidence(findings, (table,))


def _format() -> dict[str, Finding]:
    # Every level appears where a block holds the level itself: its largest magnitude is 1.
    weight = torch.tensor(LEVELS).repeat(4)[None]
    stored = _linear(weight, "nf4", double_quant=False).dense_weight(torch.float32)
    size = 1024 * 1024
    bits = {
        double: 8 * _linear(torch.randn(1024, 1024, generator=same_draws(0)), "nf4", double).stored_bytes / size
        for double in (True, False)
    }
    return {
        "levels": Finding.exact(float((stored - weight).abs().max())),
        "bits": Finding.exact(bits[True]),
        "saved": Finding.exact(bits[False] - bits[True]),
    }


def _linear(weight_OI: Tensor, kind: str, double_quant: bool) -> FourBitLinear:
    layer = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False)
    layer.weight = nn.Parameter(weight_OI, requires_grad=False)
    return FourBitLinear(layer, "nf4" if kind == "nf4" else "fp4", BLOCK, double_quant)


def rounded_weight(weight_OI: Tensor, kind: str) -> Tensor:
    """Return a weight as it comes back from 4 bits in blocks of 64; "int4" are the integers -7 to 7, "e2m1" is FP4."""
    if kind in ("nf4", "fp4"):
        return _linear(weight_OI, kind, double_quant=False).dense_weight(torch.float32)
    blocks = weight_OI.reshape(-1, BLOCK)
    largest = blocks.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    if kind == "int4":
        scale = largest / 7
        return ((blocks / scale).round().clamp(-7, 7) * scale).view_as(weight_OI)
    scale = largest / max(E2M1)
    levels = torch.tensor(sorted({sign * level for level in E2M1 for sign in (-1, 1)}))
    nearest = (blocks[..., None] / scale[..., None] - levels).abs().argmin(dim=-1)
    return (levels[nearest] * scale).view_as(weight_OI)


def _error(kind: str, seed: int) -> float:
    weight = torch.randn(512, 512, generator=same_draws(seed))
    return float((rounded_weight(weight, kind) - weight).square().mean())


def _losses(documents: int) -> dict[str, list[float]]:
    methods = {"freeze": {"train": ["*norm*"]}, "precision": {"compute": "fp32"}}
    plan = plan_of(arm(methods, seed=0, steps=1, rate=1e-3, data={"validation_fraction": 0.5}))
    run = assemble(plan)
    chosen = range(min(documents, len(plan.data.validation)))

    def take() -> list[float]:
        return [float(each) for each in document_losses(run, plan.data.validation, chosen).sums]

    found = {"plain": take(), "counts": [float(n) for n in plan.data.validation.num_supervised[list(chosen)]]}
    weights = {name: weight_of(layer).detach().clone() for name, layer in _frozen(run.model).items()}
    for kind in KINDS:
        with torch.no_grad():
            for name, layer in _frozen(run.model).items():
                weight_of(layer).copy_(rounded_weight(weights[name].float(), kind))
        found[kind] = take()
    return found


def _frozen(model: nn.Module) -> dict[str, nn.Module]:
    head = output_head(model)
    return {name: layer for name, layer in linear_layers(model).items() if layer is not head}


REPRODUCTION = Reproduction(
    name="nf4",
    title="NF4 loses less than FP4 and 4-bit integers, and double quantization makes it 4.127 bits",
    source="Dettmers et al. 2023, QLoRA (arXiv 2305.14314), sections 2 and 3, table 2, appendix E",
    setting="mean perplexity of 125M to 13B OPT, BLOOM, LLaMA and Pythia models after rounding",
    here="normal numbers, and the embedded model (4 M parameters) on functions of the standard library; no training",
    claims=CLAIMS,
    measure=measure,
)
