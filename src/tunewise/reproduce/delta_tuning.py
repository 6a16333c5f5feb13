"""Delta Tuning's combinations: does a second and a third small method add to the best one?"""

from __future__ import annotations

from typing import Any

from tunewise.reproduce.bench import Bench
from tunewise.reproduce.claim import Claim, Finding, Mark
from tunewise.reproduce.learning import Arm, arm, column, differences, mean, over_seeds
from tunewise.reproduce.reproduction import Evidence, Reproduction, Table

ADAPTER = {"bottleneck": {"size": 16}}
NORMS = {"freeze": {"train": ["*norm*"]}}
PROMPT = {"peft": {"kind": "PROMPT_TUNING", "options": {"num_virtual_tokens": 16}}}
COMBINATIONS: dict[str, tuple[dict[str, Any], float]] = {
    "adapter": (ADAPTER, 87.4),
    "BitFit": (NORMS, 86.6),
    "adapter and BitFit": (ADAPTER | NORMS, 87.1),
    "prompt": (PROMPT, 77.7),
    "prompt and adapter": (PROMPT | ADAPTER, 86.6),
    "prompt and BitFit": (PROMPT | NORMS, 86.5),
    "all three": (PROMPT | ADAPTER | NORMS, 87.0),
}
"""Methods, and the published mean of GLUE."""

CLAIMS = (
    Claim(key="adapter", says="the adapter is the best single method: loss below BitFit's (87.4 against 86.6)",
          mark=Mark.READ, unit="nats", expects="below", neutral=0.0),
    Claim(key="prompt", says="the prompt is the worst one: loss above BitFit's (77.7 against 86.6)", mark=Mark.READ,
          unit="nats", expects="above", neutral=0.0),
    Claim(key="prompt repaired", says="a prompt is much better with BitFit beside it (86.5 against 77.7)",
          mark=Mark.READ, unit="nats", expects="below", neutral=0.0),
    Claim(key="two", says="adding BitFit to the adapter does not help (87.1 against 87.4): difference of losses",
          mark=Mark.READ, published=0.0, unit="nats", tolerance=0.02),
    Claim(key="three", says="all three do not help either (87.0 against 87.4)", mark=Mark.READ, published=0.0,
          unit="nats", tolerance=0.02),
)  # fmt: skip


def measure(bench: Bench) -> Evidence:
    """Train every combination over seeds."""
    steps, seeds = bench.pick(tiny=1, short=18, full=120), bench.pick(tiny=1, short=3, full=5)
    arms: dict[str, Arm] = {name: _arm(methods, steps) for name, (methods, _) in COMBINATIONS.items()}
    found = over_seeds(bench, arms, seeds=seeds)
    loss = {name: column(rows) for name, rows in found.items()}
    findings = {
        "adapter": Finding.of(differences(loss["adapter"], loss["BitFit"])),
        "prompt": Finding.of(differences(loss["prompt"], loss["BitFit"])),
        "prompt repaired": Finding.of(differences(loss["prompt and BitFit"], loss["prompt"])),
        "two": Finding.of(differences(loss["adapter and BitFit"], loss["adapter"])),
        "three": Finding.of(differences(loss["all three"], loss["adapter"])),
    }
    table = Table(
        title=f"validation loss (nats), {steps} steps, {seeds} seeds; norms stand for BitFit, as there are no biases",
        columns=("methods", "trainable", "loss", "published GLUE mean"),
        rows=tuple(
            (name, int(rows[0]["trained"]), round(mean(column(rows)), 4), COMBINATIONS[name][1])
            for name, rows in found.items()
        ),
    )
    return Evidence(findings, (table,))


def _arm(methods: dict[str, Any], steps: int) -> Arm:
    def recipe(seed: int) -> dict[str, Any]:
        mapping = arm({**methods, "whole_loss": {}}, seed=seed, steps=steps, rate=3e-3)
        if "peft" in methods:  # a prompt stands before every row, so each document needs one
            del mapping["methods"]["packing"]
        return mapping

    return recipe


REPRODUCTION = Reproduction(
    name="delta-tuning",
    title="Adding small methods to the best one does not help",
    source="Ding et al. 2023, Delta Tuning (Nature Machine Intelligence; arXiv 2203.06904), table 2; which column is "
    "which combination was inferred from the share of tuned parameters",
    setting="RoBERTa-large, mean of GLUE, all data",
    here="the embedded model (4 M parameters, a decoder) on functions of the standard library; losses",
    claims=CLAIMS,
    measure=measure,
)
