"""Every kind of adapter on the same model, data, steps and rate: what is trained, what a step needs, what it learns.

    python benchmarks/adapters/run.py --json OUT [--steps 60] [--seeds 1] [--seconds N]

The embedded model learns from the standard library's docstrings, in fp32 on the CPU. One rate for all is nobody's
best: this compares sizes and shows that each kind learns; which is best is a question for `tunewise study methods`.
Finished trainings are kept beside OUT; with --seconds no training begins after so long, and the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from tunewise import api
from tunewise.engine.assemble import settle
from tunewise.engine.dry_run import BatchShape, dry_run
from tunewise.engine.run_folder import versions
from tunewise.engine.tracking import Moment
from tunewise.methods.reading import recipe_from_mapping

UNFINISHED = 75
"""Exit code: the same command goes on (EX_TEMPFAIL of sysexits.h)."""

_ALL = {"target_modules": "all-linear"}
_PROMPTS = {"num_virtual_tokens": 16}


def _peft(kind: str, **options: Any) -> dict[str, Any]:
    return {"peft": {"kind": kind, "options": options}}


_NF4 = {"quantize": {"kind": "nf4"}}
_NORMS = {"freeze": {"train": ["*norm*"]}}
ARMS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora r8": {"lora": {"rank": 8}},
    "pissa r8": {"lora": {"rank": 8, "init": "pissa"}},
    "dora r8": {"dora": {"rank": 8}},
    "lora_fa r8": {"lora_fa": {"rank": 8}},
    "dylora r8": {"dylora": {"rank": 8}},
    "adalora r8": _peft("ADALORA", init_r=12, target_r=8, **_ALL),
    "vera r64": _peft("VERA", r=64),
    "ia3": _peft("IA3"),
    "llama-adapter": _peft("ADAPTION_PROMPT", adapter_len=10, adapter_layers=4),
    "prompt": _peft("PROMPT_TUNING", **_PROMPTS),
    "prefix": _peft("PREFIX_TUNING", **_PROMPTS),
    "norms": _NORMS,
    "bottleneck 16": {"bottleneck": {"size": 16}},
    "lora r8 nf4": {"lora": {"rank": 8}, **_NF4},
    "lora r8 nf4 loftq": {"lora": {"rank": 8, "init": "loftq"}, **_NF4},
    "lora r8 int4": {"lora": {"rank": 8}, "quantize": {"kind": "int4"}},
    "qalora r8 int4": {"qalora": {"rank": 8}, "quantize": {"kind": "int4"}},
    "lora r8 int2": {"lora": {"rank": 8}, "quantize": {"kind": "int2"}},
    "qalora r8 int2": {"qalora": {"rank": 8}, "quantize": {"kind": "int2"}},
    "bottleneck and norms": {"bottleneck": {"size": 16}, **_NORMS},
    "lora, norms and prompt": {"lora": {"rank": 8}, **_NORMS, **_peft("PROMPT_TUNING", **_PROMPTS)},
}


def recipe(arm: str, seed: int, steps: int) -> dict[str, Any]:
    """Return the recipe of an arm."""
    return {
        "model": "embedded",
        "data": {"source": "stdlib", "max_records": 400, "max_length": 192},
        "methods": {**ARMS[arm], "precision": {"compute": "fp32"}},
        "batch": {"documents": 8, "micro_batch_size": 4},
        "training": {"steps": steps, "learning_rate": 2e-4 if arm == "full" else 2e-3},
        "evaluation": {"every": steps, "keep_best": False, "max_documents": 60},
        "checkpoints": {"every": steps},
        "device": "cpu",
        "seed": seed,
    }


def measure(arm: str, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """Train an arm and return its figures."""
    plan = settle(recipe_from_mapping(recipe(arm, seed, steps)))
    shapes = [BatchShape.uniform(4, 192)] * 2
    estimate = dry_run(plan.recipe, plan.config, "cpu", shapes)
    step = max(estimate.moments[moment].total_bytes for moment in (Moment.FORWARD, Moment.BACKWARD, Moment.UPDATE))
    outcome = api.train(recipe(arm, seed, steps), out=folder).outcome
    return {
        "trainable": estimate.trainable_parameters,
        "step_mib": round(step / 2**20, 1),
        "first_loss": outcome.first_loss,
        "loss": outcome.best_loss,
        "seconds": round(outcome.seconds, 1),
    }


def main() -> int:
    """Train what is not there yet, write, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="OUT")
    parser.add_argument("--folder", type=Path, help="where runs are kept; default: beside OUT")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--seconds", type=float)
    arguments = parser.parse_args()
    home = arguments.folder or arguments.json.with_suffix(".runs")
    started, found = time.monotonic(), dict[str, list[dict[str, Any]]]()
    for seed in range(arguments.seeds):
        for arm in ARMS:
            folder = home / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}-{arguments.steps}"
            kept = folder / "figures.json"
            if not kept.is_file():
                if arguments.seconds is not None and time.monotonic() - started > arguments.seconds:
                    print("not finished; call again to go on")
                    return UNFINISHED
                figures = measure(arm, seed, arguments.steps, folder)
                kept.write_text(json.dumps(figures), encoding="utf-8")
                print(f"{time.monotonic() - started:6.1f} s {arm}: {figures}", flush=True)
            found.setdefault(arm, []).append(json.loads(kept.read_text(encoding="utf-8")))
    result = {
        "command": "python benchmarks/adapters/run.py " + " ".join(sys.argv[1:]),
        "arms": found,
        "versions": versions(),
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("| adapter | trainable | a step needs, MiB | loss before | loss after |\n|---|---|---|---|---|")
    for arm, rows in found.items():
        before, after = (statistics.mean(row[key] for row in rows) for key in ("first_loss", "loss"))
        print(f"| {arm} | {rows[0]['trainable']} | {rows[0]['step_mib']} | {before:.3f} | {after:.3f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
