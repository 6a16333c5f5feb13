"""LoRA on the E2E restaurants: does it write as well as full fine-tuning, with a thousandth of the parameters?"""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

from tunewise.reproduce.bench import Bench
from tunewise.reproduce.claim import Claim, Finding, Mark
from tunewise.reproduce.learning import FAST, Arm, column, differences, mean, over_seeds
from tunewise.reproduce.reproduction import Evidence, Reproduction, Table
from tunewise.reproduce.true_shapes import llama, trained_parameters

TRAIN, TEST, MODEL = "e2e_nlg/devset.csv.gz", "e2e_nlg/testset_w_refs.csv.gz", "models/stories260k"
RATES = {"LoRA": (5e-3, 1.5e-2), "full": (1e-3, 3e-3)}

CLAIMS = (
    Claim(key="loss", says="LoRA does not do worse than full fine-tuning (BLEU 70.4 against 68.2): best loss minus "
          "best "
          "loss", mark=Mark.READ, unit="nats", expects="below", neutral=0.0),
    Claim(key="learns", says="... and learns the task: loss after minus before", mark=Mark.READ, unit="nats",
          expects="below", neutral=0.0),
    Claim(key="size", says="rank 4 on q and v of a model of GPT-2 medium's width and depth", mark=Mark.READ,
          published=0.35, unit="M parameters", tolerance=0.05),
    Claim(key="BLEU", says="BLEU 70.4 with GPT-2 medium", mark=Mark.READ, published=70.4, unit="BLEU", tolerance=1.0),
)  # fmt: skip


def measure(bench: Bench) -> Evidence:
    """Train both at two rates each, on the development set; test on the test set, whose meanings are others."""
    steps, seeds = bench.pick(tiny=1, short=40, full=300), bench.pick(tiny=1, short=3, full=5)
    files = {name: _records(bench, source) for name, source in (("train", TRAIN), ("test", TEST))}
    arms: dict[str, Arm] = {
        f"{way}, rate {rate:g}": _arm(way, rate, files, steps, bench) for way, rates in RATES.items() for rate in rates
    }
    found = over_seeds(bench, arms, seeds=seeds)
    best = {
        way: [min(each) for each in zip(*(column(found[f"{way}, rate {rate:g}"]) for rate in rates), strict=True)]
        for way, rates in RATES.items()
    }
    first = column(next(iter(found.values())), "first")
    findings = {
        "loss": Finding.of(differences(best["LoRA"], best["full"])),
        "learns": Finding.of(differences(best["LoRA"], first)),
        "size": Finding.exact(bench.once("size", _millions)),
        "BLEU": Finding.untested("needs GPT-2 medium, which is not here"),
    }
    table = Table(
        title=f"loss on the test set (nats per token of 512), {steps} steps of 16 records, {seeds} seeds; before: "
        f"{mean(first):.3f}",
        columns=("arm", "trainable", "loss"),
        rows=tuple((name, int(rows[0]["trained"]), round(mean(column(rows)), 4)) for name, rows in found.items()),
    )
    return Evidence(findings, (table,))


def _records(bench: Bench, name: str) -> Path:
    source = bench.shared_folder(name)
    assert source is not None, "Reproduction.run has looked"
    with gzip.open(source, "rt", encoding="utf-8", newline="") as stream:
        read = list(csv.DictReader(stream))
    bench.folder.mkdir(parents=True, exist_ok=True)
    file = bench.folder / f"{Path(name).name.split('.')[0]}.jsonl"
    made = (json.dumps({"prompt": f"{each['mr']}\n", "completion": each["ref"]}) + "\n" for each in read)
    file.write_text("".join(made), encoding="utf-8")
    return file


def _arm(way: str, rate: float, files: dict[str, Path], steps: int, bench: Bench) -> Arm:
    def recipe(seed: int) -> dict[str, Any]:
        methods = dict(FAST)
        if way == "LoRA":
            methods["lora"] = {"rank": 4, "target_modules": ("q_proj", "v_proj")}
        few = {"max_records": 60} if bench.pick(tiny=True, short=False, full=False) else {}
        return {
            "model": str(bench.shared_folder(MODEL)),
            "data": {"source": str(files["train"]), "validation": str(files["test"]), "max_length": 256, **few},
            "methods": methods,
            "batch": {"documents": 16},
            "training": {"steps": steps, "learning_rate": rate, "schedule": "linear", "spike": None},
            "evaluation": {"every": steps, "max_documents": 120, "keep_best": False},
            "seed": seed,
        }

    return recipe


def _millions() -> float:
    shape = llama(1024, 4096, 24, 16, vocab_size=50257)
    return trained_parameters(shape, {"lora": {"rank": 4, "target_modules": ("q_proj", "v_proj")}}) / 1e6


REPRODUCTION = Reproduction(
    name="lora-e2e",
    title="LoRA writes the E2E restaurants as well as full fine-tuning",
    source="Hu et al. 2021, LoRA (arXiv 2106.09685), table 3",
    setting="GPT-2 medium and large on E2E NLG, BLEU",
    here="stories260k (260 thousand parameters), trained on the development set and tested on the test set; losses",
    claims=CLAIMS,
    measure=measure,
    data=(TRAIN, TEST, MODEL),
)
