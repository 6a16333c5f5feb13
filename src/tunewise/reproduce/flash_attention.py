"""FlashAttention: exact, memory linear in the length, and the longer the sequence the more it gains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from tunewise.reproduce.bench import Bench
from tunewise.reproduce.claim import Claim, Finding, Mark
from tunewise.reproduce.learning import ratios, same_draws
from tunewise.reproduce.reproduction import Evidence, Reproduction, Table
from tunewise.reproduce.timing import in_turns, median_ratio
from tunewise.reproduce.true_shapes import estimate, llama

LENGTHS = (2048, 4096, 8192, 16384)
TIMED = (256, 2048)

CLAIMS = (
    Claim(key="exact", says="tiles and an online softmax give the plain formula's output and gradients: largest "
          "difference in fp64", mark=Mark.READ, published=0.0, unit="", tolerance=1e-12),
    Claim(key="flash memory", says="memory grows with the length: exponent of the step's peak, 4k to 16k tokens",
          mark=Mark.READ, published=1.0, unit="", tolerance=0.05),
    Claim(key="plain memory", says="... and of plain attention with its square", mark=Mark.READ, published=2.0, unit="",
          tolerance=0.15),
    Claim(key="faster", says="faster than plain attention at 2k tokens (196 over 142 TFLOP/s end to end, 1.3B, A100)",
          mark=Mark.MEMORY, published=1.38, expects="above", neutral=1.0),
    Claim(key="grows", says="the gain grows with the length (from 2k to 8k it more than doubles); here the gain at 2k "
          "over that at 256", mark=Mark.MEMORY, published=2.2, expects="above", neutral=1.0),
    Claim(key="peak", says="50 to 73 % of an A100's peak", mark=Mark.READ, unit="%", expects="above", neutral=50.0),
)  # fmt: skip


def measure(bench: Bench) -> Evidence:
    """Compare in fp64, dry-run the step's memory, and time forward and backward in turns."""
    peaks = bench.once("memory", _peaks)
    times = bench.once("times", _times, bench.pick(tiny=1, short=12, full=40))
    short, long = ([f"{kind} {length}" for kind in ("plain", "flash")] for length in TIMED)
    gain_short = ratios(times[short[0]], times[short[1]])
    gain_long = ratios(times[long[0]], times[long[1]])
    findings = {
        "exact": Finding.exact(_largest_difference()),
        "flash memory": Finding.exact(_exponent(peaks["sdpa"])),
        "plain memory": Finding.exact(_exponent(peaks["eager"])),
        "faster": median_ratio(times[long[0]], times[long[1]]),
        "grows": median_ratio(gain_long, gain_short),
        "peak": Finding.untested("needs a GPU"),
    }
    table = Table(
        title="peak of a training step by a dry run (2 layers, hidden size 256, bf16), MiB",
        columns=("tokens", "flash", "plain"),
        rows=tuple(
            (length, round(flash / 2**20, 1), round(plain / 2**20, 1))
            for length, flash, plain in zip(LENGTHS, peaks["sdpa"], peaks["eager"], strict=True)
        ),
    )
    return Evidence(findings, (table,))


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention as the formula says, (B, H, L, D), with all scores in memory."""
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ value


def tiled_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same by torch's flash kernel, which never holds more than tiles of the scores."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def _largest_difference() -> float:
    found = []
    for attend in (plain_attention, tiled_attention):
        generator = same_draws(0)
        parts = [torch.randn(2, 3, 300, 32, generator=generator, dtype=torch.float64) for _ in range(4)]
        inputs = [part.requires_grad_() for part in parts[:3]]
        output = attend(*inputs)
        found.append([output.detach(), *torch.autograd.grad(output, inputs, parts[3])])
    return max(float((one - other).abs().max()) for one, other in zip(*found, strict=True))


def _peaks() -> dict[str, list[int]]:
    shape = llama(256, 704, 2, 4, vocab_size=256)
    found: dict[str, list[int]] = {}
    for kind in ("sdpa", "eager"):
        methods = {"attention": {"kind": kind}, "precision": {"compute": "bf16"}}
        found[kind] = [estimate(shape, methods, length=length).peak_bytes for length in LENGTHS]
    return found


def _exponent(peaks: Sequence[int]) -> float:
    """Return p of a + b L^p from three lengths that double; what does not depend on the length falls out."""
    low, middle, high = peaks[-3:]
    return math.log2((high - middle) / (middle - low))


def _times(turns: int) -> dict[str, list[float]]:
    def work(attend: Callable[[Tensor, Tensor, Tensor], Tensor], length: int) -> Callable[[], None]:
        generator = same_draws(length)
        inputs = [torch.randn(1, 4, length, 64, generator=generator, requires_grad=True) for _ in range(3)]
        given = torch.randn(1, 4, length, 64, generator=generator)

        def go() -> None:
            torch.autograd.grad(attend(*inputs), inputs, given)

        return go

    ways = {"plain": plain_attention, "flash": tiled_attention}
    return in_turns({f"{name} {length}": work(way, length) for length in TIMED for name, way in ways.items()}, turns)


REPRODUCTION = Reproduction(
    name="flash-attention",
    title="FlashAttention is exact, its memory grows with the length, and it gains with the length",
    source="Dao 2023, FlashAttention-2 (arXiv 2307.08691), sections 3 and 4, table 1",
    setting="A100; GPT-style models of 1.3B and 2.7B at 2k and 8k tokens",
    here="torch's flash kernel on the CPU: 4 heads of 64, forward and backward; a step's memory by a dry run",
    claims=CLAIMS,
    measure=measure,
)
