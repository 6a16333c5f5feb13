"""The same fine-tuning in tunewise and in TRL, side by side: does the validation loss fall by the same margin?

    python benchmarks/peers/curves.py --trl-python TRLVENV/bin/python --json curves.json

Both get the same model, the same token ids and labels, the same LoRA (rank, alpha, targets), optimizer, schedule,
batch size and number of steps, in fp32; only the order of the records and the initial A differ. Both are judged by the
same function on the same validation documents: loss per supervised token. Data: Alpaca-format records on a small real
story model, from `../shared/data`; nothing is copied from there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tunewise.engine.assemble import assemble, settle
from tunewise.engine.run_folder import RunFolder
from tunewise.engine.train import Training
from tunewise.methods.reading import recipe_from_mapping
from tunewise.workload.corpus import Corpus

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
EVALUATIONS = 6


def recipe_mapping(model: str, data: str, records: int) -> dict[str, Any]:
    return {
        "model": str(SHARED / "models" / model),
        "data": {"source": str(SHARED / data), "max_records": records, "validation_fraction": 0.1},
        "methods": {
            "lora": {"rank": 16, "alpha": 32},
            "packing": {"row_tokens": 1024},
            "precision": {"compute": "fp32"},
            "adamw": {"beta1": 0.9, "beta2": 0.999},
        },
        "batch": {"documents": 16},
        "training": {"epochs": 2, "learning_rate": 5e-3, "schedule": "linear", "warmup": 0, "max_grad_norm": 1.0},
        "device": "cpu",
    }


def as_lists(corpus: Corpus) -> list[dict[str, list[int]]]:
    """Write a corpus as TRL's pre-tokenized records."""
    records = []
    for index in range(len(corpus)):
        ids, marks = corpus.document(index)
        labels = [int(token) if mark else -100 for token, mark in zip(ids, marks, strict=True)]
        records.append({"input_ids": ids.tolist(), "labels": labels})
    return records


def main(trl_python: str, model: str, data: str, records: int, json_file: Path | None) -> int:
    torch.manual_seed(0)
    plan = settle(recipe_from_mapping(recipe_mapping(model, data, records)))
    every = max(1, plan.num_steps // EVALUATIONS)
    plan = settle(plan.recipe.replace(evaluation=plan.recipe.evaluation.model_copy(update={"every": every})))
    run = assemble(plan)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folder = RunFolder(work / "run")
        folder.open()
        ours: dict[int, float] = {}

        def observe(entry: dict[str, Any]) -> None:
            if entry["event"] == "evaluation":
                ours[entry["step"]] = entry["validation_loss"]

        outcome = Training(run, plan.data.train, plan.data.validation, plan.num_steps, folder, observe).run()
        folder.close()
        setting = {
            "model": str(SHARED / "models" / model),
            "targets": sorted({key.split(".")[-3] for key, _ in run.trainable()}),
            "learning_rate": plan.recipe.training.learning_rate,
            "num_steps": plan.num_steps,
            "every": every,
            "train": as_lists(plan.data.train),
            "validation": as_lists(plan.data.validation.take(range(min(500, len(plan.data.validation))))),
        }
        (work / "setting.json").write_text(json.dumps(setting))
        script = Path(__file__).with_name("trl_curve.py")
        command = [trl_python, str(script), str(work / "setting.json"), str(work / "trl.json")]
        subprocess.run(command, check=True, cwd=work, stdout=sys.stderr)
        peer = json.loads((work / "trl.json").read_text())
    theirs = {int(step): loss for step, loss in peer["validation_loss"].items()}
    print(f"{'step':>6} {'tunewise':>10} {'TRL':>10}   validation loss, nats per supervised token")
    for step in sorted(ours.keys() | theirs.keys()):
        print(f"{step:>6} {ours.get(step, float('nan')):>10.4f} {theirs.get(step, float('nan')):>10.4f}")
    falls = {
        "tunewise": ours[0] - min(ours.values()),
        "trl": theirs[0] - min(theirs.values()),
    }
    ratio = falls["tunewise"] / falls["trl"]
    print(f"fall: tunewise {falls['tunewise']:.4f}, TRL {falls['trl']:.4f}, ratio {ratio:.3f}")
    if json_file is not None:
        setting_small = {k: v for k, v in setting.items() if k not in ("train", "validation")}
        result = {
            "summary": {"fall": falls, "ratio": ratio},
            "setting": {**setting_small, "data": data, "records": records},
            "tunewise": {"validation_loss": ours, "seconds": outcome.seconds},
            "trl": peer,
        }
        json_file.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", required=True, help="the Python of an environment with trl and peft")
    parser.add_argument("--model", default="stories260k")
    parser.add_argument("--data", default="gpteacher/toolformer_sim06.jsonl.gz")
    parser.add_argument("--records", type=int, default=1200)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    sys.exit(main(arguments.trl_python, arguments.model, arguments.data, arguments.records, arguments.json))
