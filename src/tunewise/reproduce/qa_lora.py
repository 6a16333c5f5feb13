"""QA-LoRA: an adapter that merges into the same few bits without a loss, and what requantizing QLoRA loses."""

from __future__ import annotations

from typing import Any

import torch

from tunewise.layers.group_quantized import GroupKind, GroupQuantizedLinear
from tunewise.layers.lora import lora_layers
from tunewise.layers.qalora import QALoRALinear
from tunewise.methods.method import Run
from tunewise.reproduce.bench import Bench
from tunewise.reproduce.claim import Claim, Finding, Mark
from tunewise.reproduce.learning import Learnt, arm, differences, held_out, learn, rounded, same_draws
from tunewise.reproduce.reproduction import Evidence, Reproduction, Table
from tunewise.reproduce.true_shapes import llama, trained_parameters

KINDS: tuple[GroupKind, ...] = ("int4", "int3", "int2")
RANK = 16
PAPER_RANK = 64

_PAPER = {"int4": (39.4, 36.0), "int3": (37.4, 34.0), "int2": (27.5, 25.8)}
"""MMLU, 5-shot, LLaMA-7B on Alpaca: QA-LoRA, and QLoRA followed by GPTQ."""

CLAIMS = (
    *(
        Claim(key=f"merge {kind}", says=f"{kind}: the merged layer computes what the unmerged one does (largest "
              "relative difference of outputs)", mark=Mark.FORMULA, published=0.0, unit="", tolerance=1e-5)
        for kind in KINDS
    ),
    Claim(key="bits", says="merging keeps the number of bits: bytes after over before", mark=Mark.FORMULA,
          published=1.0, tolerance=0.0),
    *(
        Claim(key=f"loss {kind}", says=f"{kind}: QA-LoRA merged is better than QLoRA requantized (MMLU {ours} against "
              f"{theirs}); here the difference of losses", mark=Mark.MEMORY, unit="nats", expects="below", neutral=0.0)
        for kind, (ours, theirs) in _PAPER.items()
    ),
    Claim(key="lora size", says="QLoRA's adapter of LLaMA-7B, rank 64 on all linear layers", mark=Mark.MEMORY,
          published=160.0, unit="M parameters", tolerance=0.5),
    Claim(key="qalora size", says="QA-LoRA's adapter of LLaMA-7B, rank 64 on all linear layers", mark=Mark.MEMORY,
          published=89.0, unit="M parameters", tolerance=0.5),
)  # fmt: skip


def measure(bench: Bench) -> Evidence:
    """Train both adapters over 4, 3 and 2 bits, merge them into these bits, and compare."""
    findings = {"bits": Finding.exact(_bytes_ratio())}
    for kind in KINDS:
        findings[f"merge {kind}"] = Finding.exact(_merge_error(kind, bench.pick(tiny=1, short=5, full=20)))
    seeds = range(bench.pick(tiny=1, short=3, full=5))
    rows: list[tuple[Any, ...]] = []
    for kind in KINDS:
        found = [bench.once(f"{kind} seed {seed}", _losses, kind, seed, bench) for seed in seeds]
        columns = {key: [each[key] for each in found] for key in found[0]}
        findings[f"loss {kind}"] = Finding.of(differences(columns["qalora merged"], columns["lora requantized"]))
        means = [sum(column) / len(column) for column in columns.values()]
        rows.append((kind, *rounded(means)))
    for method, millions in bench.once("sizes", _adapter_sizes).items():
        findings[f"{method} size"] = Finding.exact(millions)
    table = Table(
        title=f"validation loss (nats) over {len(seeds)} seeds; requantized by rounding to nearest in the same groups",
        columns=("base", "LoRA", "LoRA merged and requantized", "QA-LoRA", "QA-LoRA merged"),
        rows=tuple(rows),
    )
    return Evidence(findings, (table,))


def _losses(kind: GroupKind, seed: int, bench: Bench) -> dict[str, float]:
    found, documents = {}, bench.pick(tiny=2, short=100, full=200)
    for method in ("lora", "qalora"):
        learnt = _trained(method, kind, seed, bench)
        found[method] = held_out(learnt, most=documents).mean
        _merge_into_bits(learnt.run, kind)
        found["qalora merged" if method == "qalora" else "lora requantized"] = held_out(learnt, most=documents).mean
    return {key: found[key] for key in ("lora", "lora requantized", "qalora", "qalora merged")}


def _trained(method: str, kind: GroupKind, seed: int, bench: Bench) -> Learnt:
    methods = {method: {"rank": RANK}, "quantize": {"kind": kind}}
    steps = bench.pick(tiny=1, short=10, full=80)
    judged_later = {"max_documents": 2}
    return learn(arm(methods, seed=seed, steps=steps, rate=2e-3, evaluation=judged_later))


def _merge_into_bits(run: Run, kind: GroupKind) -> None:
    """Replace every adapter by a layer of the base's bits: QA-LoRA's exactly, LoRA's by rounding again."""
    for name, layer in lora_layers(run.model).items():
        merged, base = layer.merge(), layer.base_layer
        assert isinstance(base, GroupQuantizedLinear)
        is_exact = isinstance(merged, GroupQuantizedLinear)
        run.model.set_submodule(name, merged if is_exact else GroupQuantizedLinear(merged, kind, base.group_size))


def _layer(kind: GroupKind, seed: int) -> QALoRALinear:
    """A layer of 256 inputs and outputs with an update of the size that training makes."""
    generator = same_draws(seed)
    dense = torch.nn.Linear(256, 256, bias=False)
    with torch.no_grad():
        dense.weight.copy_(torch.randn(256, 256, generator=generator) / 16)
    layer = QALoRALinear(GroupQuantizedLinear(dense, kind, 32), RANK, 2.0)
    layer.initialize("kaiming", generator)
    with torch.no_grad():
        layer.lora_B.weight.copy_(torch.randn(256, RANK, generator=generator) / 64)
    return layer


@torch.no_grad()
def _merge_error(kind: GroupKind, draws: int) -> float:
    worst = 0.0
    for seed in range(draws):
        layer = _layer(kind, seed).double().eval()
        input_TI = torch.randn(32, 256, generator=same_draws(100 + seed), dtype=torch.float64)
        unmerged, merged = layer(input_TI), layer.merge()(input_TI)
        worst = max(worst, float((merged - unmerged).abs().max() / unmerged.abs().max()))
    return worst


def _bytes_ratio() -> float:
    layers = [_layer(kind, 0) for kind in KINDS]
    return sum(layer.merge().stored_bytes for layer in layers) / sum(layer.base_layer.stored_bytes for layer in layers)


def _adapter_sizes() -> dict[str, float]:
    """Count the trainable parameters of both adapters at LLaMA-7B's shape, in millions."""
    shape, found = llama(4096, 11008, 32, 32), {}
    for method in ("lora", "qalora"):
        methods = {method: {"rank": PAPER_RANK}, "quantize": {"kind": "int4"}}
        found[method] = trained_parameters(shape, methods) / 1e6
    return found


REPRODUCTION = Reproduction(
    name="qa-lora",
    title="QA-LoRA merges exactly into 4, 3 and 2 bits, where QLoRA has to be rounded again",
    source="Xu et al. 2023, QA-LoRA (arXiv 2309.14717), algorithm 1 and table 1",
    setting="LLaMA-7B on Alpaca, GPTQ bases in groups of 32, MMLU 5-shot",
    here="the embedded model (4 M parameters) on functions of the standard library, bases rounded to nearest in groups "
    "of 32; the adapters' sizes at LLaMA-7B's shape by a dry run",
    claims=CLAIMS,
    measure=measure,
)
