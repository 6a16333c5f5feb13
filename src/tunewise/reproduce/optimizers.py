"""Optimizers: the bytes of their states, that 8 bits learn the same, and what one fused kernel saves."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tunewise.reproduce.bench import Bench
from tunewise.reproduce.claim import Claim, Finding, Mark
from tunewise.reproduce.learning import column, differences, mean, same_draws
from tunewise.reproduce.optimizer_states import bytes_of, state_bytes, train
from tunewise.reproduce.reproduction import Evidence, Reproduction, Table
from tunewise.reproduce.timing import in_turns, median_ratio

BYTES = {"bf16": 8.0, "adamw_8bit": 2.0, "adafactor": 4.0, "lion": 4.0, "sgd, momentum": 4.0}
NAMES = {"bf16": "AdamW", "adamw_8bit": "8-bit AdamW", "adafactor": "Adafactor", "lion": "Lion"}

CLAIMS = (
    *(
        Claim(key=f"{variant} bytes", says=f"{NAMES.get(variant, 'SGD with momentum')}: bytes of state a parameter",
              mark=Mark.READ, published=size, unit="bytes", tolerance=0.05 if size == 8.0 else 0.5)
        for variant, size in BYTES.items()
    ),
    Claim(key="8-bit loss", says="8-bit AdamW learns what AdamW learns (T5-base: about 2.20 both)", mark=Mark.READ,
          published=0.0, unit="nats", tolerance=0.02),
    Claim(key="adafactor loss", says="Adafactor learns what AdamW learns (about 2.20 both)", mark=Mark.READ,
          published=0.0, unit="nats", tolerance=0.02),
    Claim(key="fused", says="one fused kernel: the update is faster than tensor by tensor (314.2 over 288.5 samples/s "
          "end to end, A100)", mark=Mark.READ, published=1.09, expects="above", neutral=1.0),
    Claim(key="adafactor speed", says="Adafactor is slower than AdamW (89.2 against 113.0 samples/s, RTX 3090)",
          mark=Mark.READ, expects="above", neutral=1.0),
)  # fmt: skip


def measure(bench: Bench) -> Evidence:
    """Count tensors, train over seeds, and time updates in turns."""
    steps, seeds = bench.pick(tiny=1, short=28, full=120), range(bench.pick(tiny=1, short=3, full=5))
    trained = ("bf16", "adamw_8bit", "adafactor")
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in trained}
    for seed in seeds:
        for variant in trained:
            found[variant].append(bench.once(f"{variant}, seed {seed}", train, variant, seed, steps))
    sizes = {variant: state_bytes(bench.once(f"bytes of {variant}", bytes_of, variant)) for variant in BYTES}
    times = bench.once("updates", _update_times, bench.pick(tiny=2, short=16, full=60))
    plain = column(found["bf16"])
    findings = {
        **{f"{variant} bytes": Finding.exact(size) for variant, size in sizes.items()},
        "8-bit loss": Finding.of(differences(column(found["adamw_8bit"]), plain)),
        "adafactor loss": Finding.of(differences(column(found["adafactor"]), plain), "torch's Adafactor, its own rule"),
        "fused": median_ratio(times["for loop"], times["fused"]),
        "adafactor speed": median_ratio(times["adafactor"], times["for loop"]),
    }
    bytes_table = Table(
        title="bytes of state a parameter",
        columns=("optimizer", "ours", "published"),
        rows=tuple((NAMES.get(v, v), round(size, 3), BYTES[v]) for v, size in sizes.items()),
    )
    loss_table = Table(
        title=f"0.5 M parameters from scratch, {steps} steps at one learning rate, {len(seeds)} seeds",
        columns=("optimizer", "validation loss (nats)"),
        rows=tuple((NAMES[v], round(mean(column(rows)), 4)) for v, rows in found.items()),
    )
    return Evidence(findings, (bytes_table, loss_table))


def _update_times(turns: int) -> dict[str, list[float]]:
    """Time updates of 24 tensors of 64 K numbers, as a small model's blocks have."""

    def update(make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]) -> Callable[[], None]:
        generator = same_draws(0)
        parameters = [torch.nn.Parameter(torch.randn(256, 256, generator=generator)) for _ in range(24)]
        for parameter in parameters:
            parameter.grad = torch.randn(256, 256, generator=generator)
        optimizer = make(parameters)
        return optimizer.step

    return in_turns(
        {
            "for loop": update(lambda parameters: torch.optim.AdamW(parameters, foreach=False, fused=False)),
            "fused": update(lambda parameters: torch.optim.AdamW(parameters, fused=True)),
            "adafactor": update(lambda parameters: torch.optim.Adafactor(parameters)),
        },
        turns,
        warm_up=3,
    )


REPRODUCTION = Reproduction(
    name="optimizers",
    title="Bytes of optimizer states, 8 bits that learn the same, and a fused update",
    source="Hugging Face's single-GPU guide (bytes); S. Bekman, transformers issue 14744, pytorch issue 96755",
    setting="T5-base on A100 and RTX 3090",
    here="a Llama of 0.5 M parameters from scratch; updates of 1.6 M numbers in 24 tensors on the CPU",
    claims=CLAIMS,
    measure=measure,
    needs_bf16=True,
)
