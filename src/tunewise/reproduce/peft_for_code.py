"""Parameter-efficient tuning for code: LoRA, IA3, prompt, prefix, QLoRA, full, and examples in the prompt."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from tunewise.engine.assemble import assemble
from tunewise.quality.losses import document_losses
from tunewise.reproduce.bench import Bench
from tunewise.reproduce.claim import Claim, Finding, Mark
from tunewise.reproduce.learning import FAST, Arm, column, differences, mean, over_seeds, plan_of
from tunewise.reproduce.reproduction import Evidence, Reproduction, Table
from tunewise.reproduce.true_shapes import gigabytes, llama

DATA = "code/mbpp.jsonl.gz"
NO_PACKING = ("prompt", "prefix")


def _peft(kind: str, **options: Any) -> dict[str, Any]:
    return {"peft": {"kind": kind, "options": options}, "whole_loss": {}}


ARMS: dict[str, tuple[dict[str, Any], float]] = {
    "LoRA": ({"lora": {"rank": 16}}, 2e-3),
    "QLoRA": ({"lora": {"rank": 16}, "quantize": {"kind": "nf4"}}, 2e-3),
    "IA3": (_peft("IA3"), 5e-3),
    "prompt": (_peft("PROMPT_TUNING", num_virtual_tokens=20), 1e-2),
    "prefix": (_peft("PREFIX_TUNING", num_virtual_tokens=20), 5e-3),
    "full": ({}, 3e-4),
}
"""Methods and a learning rate of the usual size for each."""

CLAIMS = (
    *(
        Claim(key=f"LoRA over {name}", says=f"LoRA is the best small method: difference of losses to {name}",
              mark=Mark.READ, unit="nats", expects="below", neutral=0.0)
        for name in ("IA3", "prompt", "prefix")
    ),
    Claim(key="LoRA over examples", says="LoRA beats examples in the prompt (exact match 23 to 150 % higher); here its "
          "loss minus that with two examples before each task", mark=Mark.READ, unit="nats", expects="below",
          neutral=0.0),
    Claim(key="QLoRA", says="4 bits do as well or better: difference of losses to LoRA", mark=Mark.READ, published=0.0,
          unit="nats", tolerance=0.02),
    Claim(key="memory", says="QLoRA needs about half of LoRA's memory; CodeLlama-7B by a dry run", mark=Mark.READ,
          published=0.5, expects="below", neutral=1.0, tolerance=0.1),
    Claim(key="34B", says="CodeLlama-34B can be tuned in 24 GB; gigabytes by a dry run", mark=Mark.READ, unit="GB",
          expects="below", neutral=24.0),
    Claim(key="exact match", says="tuned large models beat fully tuned small ones by 39.8 to 72.3 % exact match",
          mark=Mark.READ, published=39.8, unit="%", expects="above", neutral=0.0),
)  # fmt: skip


def measure(bench: Bench) -> Evidence:
    """Tune on MBPP by every method, and dry-run the true shapes."""
    steps, seeds = bench.pick(tiny=1, short=30, full=160), bench.pick(tiny=1, short=3, full=5)
    file = _records(bench)
    arms: dict[str, Arm] = {name: _arm(name, file, steps, bench) for name in ARMS}
    found = over_seeds(bench, arms, seeds=seeds)
    loss = {name: column(rows) for name, rows in found.items()}
    examples = [bench.once(f"examples, seed {seed}", _with_examples, file, seed, bench) for seed in range(seeds)]
    sizes = bench.once("memory", _memory)
    findings = {
        **{
            f"LoRA over {name}": Finding.of(differences(loss["LoRA"], loss[name]))
            for name in ("IA3", "prompt", "prefix")
        },
        "LoRA over examples": Finding.of(differences(loss["LoRA"], examples)),
        "QLoRA": Finding.of(differences(loss["QLoRA"], loss["LoRA"])),
        "memory": Finding.exact(sizes["QLoRA 7B"] / sizes["LoRA 7B"]),
        "34B": Finding.exact(sizes["QLoRA 34B"]),
        "exact match": Finding.untested("a model of 4 M parameters solves none of the tasks; needs the 7B models"),
    }
    rows = [(name, int(each[0]["trained"]), round(mean(column(each)), 4)) for name, each in found.items()]
    rows += [("two examples in the prompt", 0, round(mean(examples), 4))]
    rows += [("nothing", 0, round(mean(column(found["LoRA"], "first")), 4))]
    memory = Table(
        title="what a step needs at CodeLlama's shapes, GB (bf16, one row of 256 tokens, checkpointing)",
        columns=("setting", "GB"),
        rows=tuple((name, round(size, 1)) for name, size in sizes.items()),
    )
    losses = Table(
        title=f"loss on held-out MBPP solutions (nats), {steps} steps of 8, {seeds} seeds",
        columns=("method", "trainable", "loss"),
        rows=tuple(rows),
    )
    return Evidence(findings, (losses, memory))


def _records(bench: Bench) -> Path:
    source = bench.shared_folder(DATA)
    assert source is not None, "Reproduction.run has looked"
    with gzip.open(source, "rt", encoding="utf-8") as stream:
        read = [json.loads(line) for line in stream]
    return _write(bench, "tasks", [{"prompt": f"# {each['text']}\n", "completion": each["code"]} for each in read])


def _write(bench: Bench, name: str, records: list[dict[str, str]]) -> Path:
    bench.folder.mkdir(parents=True, exist_ok=True)
    file = bench.folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def _mapping(file: Path, methods: dict[str, Any], rate: float, steps: int, seed: int, bench: Bench) -> dict[str, Any]:
    data = {"source": str(file), "max_length": 128, "too_long": "drop", "validation_fraction": 0.1}
    return {
        "model": "embedded",
        "data": data | ({"max_records": 40} if bench.pick(tiny=True, short=False, full=False) else {}),
        "methods": {**FAST, **methods},
        "batch": {"documents": 8, "micro_batch_size": 4},
        "training": {"steps": steps, "learning_rate": rate, "spike": None},
        "evaluation": {"every": steps, "max_documents": 60, "keep_best": False},
        "seed": seed,
    }


def _arm(name: str, file: Path, steps: int, bench: Bench) -> Arm:
    methods, rate = ARMS[name]

    def recipe(seed: int) -> dict[str, Any]:
        mapping = _mapping(file, methods, rate, steps, seed, bench)
        if name in NO_PACKING:  # virtual tokens stand before every row
            del mapping["methods"]["packing"]
        return mapping

    return recipe


def _with_examples(file: Path, seed: int, bench: Bench) -> float:
    """Return the base's loss on the held-out solutions when two solved tasks stand before each task."""
    plan = plan_of(_mapping(file, {"freeze": {"train": ["*norm*"]}}, 1e-3, 1, seed, bench))
    tasks = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    held = [tasks[int(str(origin).rpartition(":")[2]) - 1] for origin in plan.data.validation.origins][:60]
    shown = [task for task in tasks if task not in held and len(task["completion"]) < 200][:2]
    before = "".join(f"{task['prompt']}{task['completion']}\n\n" for task in shown)
    records = [{"prompt": before + task["prompt"], "completion": task["completion"]} for task in held]
    mapping = _mapping(_write(bench, f"shown-{seed}", records), {"freeze": {"train": ["*norm*"]}}, 1e-3, 1, seed, bench)
    mapping["data"] |= {"validation_fraction": 0.0, "max_length": 640}
    asked = plan_of(mapping)
    return document_losses(assemble(asked), asked.data.train, range(len(asked.data.train))).mean


def _memory() -> dict[str, float]:
    small, large = llama(4096, 11008, 32, 32), llama(8192, 22016, 48, 64, num_key_value_heads=8)
    common: dict[str, Any] = {"lora": {"rank": 16, "target_modules": ("q_proj", "v_proj")}, "checkpointing": {}}
    common |= {"precision": {"compute": "bf16"}}
    nf4 = {"quantize": {"kind": "nf4"}}
    return {
        "LoRA 7B": gigabytes(small, common, rows=1, length=256),
        "QLoRA 7B": gigabytes(small, common | nf4, rows=1, length=256),
        "QLoRA 34B": gigabytes(large, common | nf4, rows=1, length=256),
    }


REPRODUCTION = Reproduction(
    name="peft-for-code",
    title="For code LoRA is the best small method, QLoRA halves its memory, and both beat examples in the prompt",
    source="Weyssow et al. 2023, Exploring PEFT for code generation (arXiv 2308.10462, TOSEM)",
    setting="CodeT5+, CodeGen, CodeGen2, CodeLlama on CoNaLa, CodeAlpacaPy and APPS; one RTX A5000 with 24 GB",
    here="the embedded model (4 M parameters, Python) on MBPP: losses; CodeLlama's shapes by a dry run",
    claims=CLAIMS,
    measure=measure,
    data=(DATA,),
)
