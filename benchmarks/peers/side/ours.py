"""tunewise's own training loop on the records of the setting."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import record
from benchmarks.peers import problem

from tunewise.engine.assemble import assemble, settle
from tunewise.engine.run_folder import RunFolder
from tunewise.engine.train import Training
from tunewise.methods.reading import recipe_from_mapping
from tunewise.workload.corpus import Corpus


def train(setting: dict[str, Any], steps: record.Steps) -> tuple[Any, str]:
    documents = [(row["input_ids"], [label != -100 for label in row["labels"]]) for row in setting["train"]]
    corpus = Corpus.from_documents(documents, [f"made:{number}" for number in range(len(documents))])
    mapping = problem.recipe_mapping(setting["method"], setting["model"], setting["methods"])
    # All of a step in one row: a second row with the few tokens that are left over costs a tenth of the speed.
    room = 2 * setting["tokens_per_step"]
    mapping["methods"]["packing"] = {"row_tokens": max(setting["row_tokens"], setting["longest"], room)}
    mapping["batch"] = {"documents": setting["documents"]}
    mapping["training"] |= {"epochs": 1, "learning_rate": setting["learning_rate"], "warmup": 0}
    plan = settle(recipe_from_mapping(mapping), problem.prepared(corpus, corpus.take([])))
    built = assemble(plan)
    folder = RunFolder(Path("run").resolve())
    folder.open()

    def observe(entry: dict[str, Any]) -> None:
        if entry["event"] == "step":
            steps.tokens.append(entry["tokens"])
            steps.seconds.append(entry["seconds"])

    Training(built, plan.data.train, plan.data.validation, plan.num_steps, folder, observe, saves=False).run()
    folder.close()
    built.model.eval()
    built.documents.lengths = None
    built.documents.kernels = None
    return lambda ids: built.model(input_ids=ids, use_cache=False).logits, f"tunewise {version('tunewise')}"


if __name__ == "__main__":
    record.run(train)
