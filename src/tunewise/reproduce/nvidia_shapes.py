"""NVIDIA's guides on matrix products: arithmetic intensity, where it suffices, waves, and alignment."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tunewise.machine.shapes import arithmetic_intensity, tokens_to_be_math_bound, waves
from tunewise.reproduce.bench import Bench
from tunewise.reproduce.claim import Claim, Finding, Mark
from tunewise.reproduce.learning import same_draws
from tunewise.reproduce.reproduction import Evidence, Reproduction, Table
from tunewise.reproduce.timing import in_turns, median_ratio

H200_RIDGE = 206.0
"""989 TFLOP/s over 4.8 TB/s; from memory of the data sheet."""

TOKENS = {768: 445, 2048: 258, 4096: 229}

CLAIMS = (
    Claim(key="thin", says="8192 x 128 x 8192 in fp16: FLOP per byte", mark=Mark.READ, published=124.1, unit="FLOP/B",
          tolerance=0.05),
    Claim(key="cube", says="8192 x 8192 x 8192 in fp16: FLOP per byte", mark=Mark.READ, published=2730.0,
          unit="FLOP/B", tolerance=1.0),
    Claim(key="bound", says="... so the thin one is bound by memory on a V100 (138.9 FLOP/B)", mark=Mark.READ,
          published=124.1, unit="FLOP/B", expects="below", neutral=138.9, tolerance=0.05),
    *(
        Claim(key=f"tokens {hidden}", says=f"tokens at which a square layer of {hidden} is bound by arithmetic on an "
              "H200", mark=Mark.COMPUTED, published=float(tokens), unit="tokens", tolerance=1.0)
        for hidden, tokens in TOKENS.items()
    ),
    Claim(key="waves", says="one tile too many for 108 multiprocessors makes a second wave: waves of 109 tiles over "
          "those of 108", mark=Mark.READ, published=2.0, tolerance=0.0),
    Claim(key="aligned", says="a product whose inner size is a multiple of 8 is faster than one beside it: speed of "
          "1024 "
          "over that of 1023, bf16", mark=Mark.READ, expects="above", neutral=1.0),
    Claim(key="thin is slow", says="a thin product reaches fewer FLOP/s: 2048 rows over 4 rows", mark=Mark.READ,
          expects="above", neutral=1.0),
    Claim(key="cliff", says="the time jumps at the boundary of a wave, up to twice", mark=Mark.READ, published=2.0,
          expects="above", neutral=1.0),
)  # fmt: skip


def measure(bench: Bench) -> Evidence:
    """Compute the guide's examples, and time what a CPU can show."""
    times = bench.once("times", _times, bench.pick(tiny=2, short=24, full=80))
    per_row = {name: [second / int(name.split(" x ")[0]) for second in seconds] for name, seconds in times.items()}
    fixed = {name: [second / int(name.split(" x ")[1]) for second in seconds] for name, seconds in times.items()}
    findings = {
        "thin": Finding.exact(arithmetic_intensity(8192, 128, 8192)),
        "cube": Finding.exact(arithmetic_intensity(8192, 8192, 8192)),
        "bound": Finding.exact(arithmetic_intensity(8192, 128, 8192)),
        **{f"tokens {h}": Finding.exact(tokens_to_be_math_bound(H200_RIDGE, h)) for h in TOKENS},
        "waves": Finding.exact(waves(109 * 256, 128, 108) / waves(108 * 256, 128, 108)),
        "aligned": median_ratio(fixed["512 x 1023"], fixed["512 x 1024"]),
        "thin is slow": median_ratio(per_row["4 x 1024"], per_row["2048 x 1024"]),
        "cliff": Finding.untested("a CPU has no waves of thread blocks; needs a GPU"),
    }
    table = Table(
        title="GFLOP/s of (rows, inner) x (inner, 1024) in bf16 on this CPU",
        columns=("rows x inner", "GFLOP/s"),
        rows=tuple((name, round(_gigaflops(name, min(seconds)), 1)) for name, seconds in times.items()),
    )
    return Evidence(findings, (table,))


def _times(turns: int) -> dict[str, list[float]]:
    def product(rows: int, inner: int) -> Callable[[], torch.Tensor]:
        left = torch.randn(rows, inner, generator=same_draws(0)).bfloat16()
        right = torch.randn(inner, 1024, generator=same_draws(1)).bfloat16()
        return lambda: left @ right

    return in_turns(
        {f"{m} x {k}": product(m, k) for m, k in ((512, 1023), (512, 1024), (4, 1024), (2048, 1024))}, turns
    )


def _gigaflops(name: str, seconds: float) -> float:
    rows, inner = map(int, name.split(" x "))
    return 2 * rows * inner * 1024 / seconds / 1e9


REPRODUCTION = Reproduction(
    name="nvidia-shapes",
    title="Arithmetic intensity, waves and alignment of matrix products",
    source="NVIDIA, Matrix Multiplication Background and Linear/Fully-Connected Layers User's Guides; S. Bekman, "
    "ml-engineering, on waves",
    setting="V100 and A100, fp16",
    here="the formulas as `tunewise plan` advises by them, and bf16 products on the CPU",
    claims=CLAIMS,
    measure=measure,
    needs_bf16=True,
)
