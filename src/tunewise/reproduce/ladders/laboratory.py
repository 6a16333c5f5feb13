"""The laboratory of a ladder: a random model of its shape, documents of random tokens, and trials of its rows."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tunewise.engine.run_folder import versions
from tunewise.lab import corpora
from tunewise.lab.executor import Executor
from tunewise.lab.laboratory import Laboratory
from tunewise.lab.outcome import Failed, Measurement, OutOfMemory
from tunewise.lab.storage import Storage
from tunewise.lab.trial import Trial
from tunewise.methods.reading import recipe_from_mapping
from tunewise.reproduce.ladders.ladder import Ladder, Row
from tunewise.workload.corpus import Corpus
from tunewise.workload.diagnosis import Diagnosis, Statistics
from tunewise.workload.model import EMBEDDED_FOLDER
from tunewise.workload.prepare import Prepared

DOCUMENTS = 512
SEED = 0
EXPECTED_SECONDS = 30.0


@dataclass(frozen=True)
class Bench:
    """Where the rows of a ladder are measured; everything lies in `folder`, and finished trials are found again there.

    Attributes:
        laboratory: runs the trials, each in a process of its own.
        num_parameters: of the model, as trained in full.
    """

    ladder: Ladder
    device: str
    folder: Path
    laboratory: Laboratory

    def measure(self, number: int, row: Row, repeat: int) -> Measurement | OutOfMemory | Failed:
        """Measure a row once, or find the measurement."""
        return self.laboratory.run(
            "methods",
            self._trial(row, repeat),
            params={"row": number + 1, "repeat": repeat + 1},
            role=f"{row.name}, turn {repeat + 1}",
            expected_seconds=EXPECTED_SECONDS,
        )

    def is_measured(self, row: Row, repeat: int) -> bool:
        """Say whether this has been measured before."""
        key = self._trial(row, repeat).key(self.laboratory.circumstances)
        return self.laboratory.storage.find(key) is not None

    def _trial(self, row: Row, repeat: int) -> Trial:
        assert row.recipe is not None
        mapping = {
            "model": {
                "name": str(self.folder / "config.json"),
                "weights": "random",
                "tokenizer": str(EMBEDDED_FOLDER),
            },
            "data": {"source": "random tokens", "max_length": max(self.ladder.document_lengths)},
            "training": self.ladder.training,
            "device": self.device,
            "seed": SEED,
            **row.recipe,
        }
        recipe = recipe_from_mapping(mapping)
        return Trial.of("measure", recipe, warm_up=1, steps=row.steps, repeat=repeat)


def open_bench(ladder: Ladder, device: str, folder: Path, executor: Executor) -> Bench:
    """Write the model's shape and the documents, and open the storage."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    config = llama_config(ladder)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    data = documents(ladder)
    corpora.store(data, folder / "data")
    circumstances = {
        "data": data.data_fingerprint,
        "model": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16],
        "versions": versions(),
    }
    laboratory = Laboratory(Storage.in_folder(folder), executor, folder / "trials", folder / "data", circumstances)
    return Bench(ladder, device, folder, laboratory)


def llama_config(ladder: Ladder) -> dict[str, Any]:
    """Return a config.json of the ladder's shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **ladder.config,
    }


def documents(ladder: Ladder) -> Prepared:
    """Return documents of random tokens, all learnt, whose lengths repeat in the order in which steps take them.

    That order is `GlobalBatches.epoch(0)`'s, so that every step of packed documents fills its rows exactly.
    """
    chooser = np.random.default_rng(SEED)
    order = np.random.default_rng([SEED, 0]).permutation(DOCUMENTS)
    lengths = np.empty(DOCUMENTS, dtype=np.int64)
    lengths[order] = np.resize(ladder.document_lengths, DOCUMENTS)
    made = [
        (chooser.integers(2, ladder.config["vocab_size"], length, dtype=np.int32), np.ones(length, dtype=np.bool_))
        for length in lengths
    ]
    train = Corpus.from_documents(made, [f"random:{number}" for number in range(DOCUMENTS)])
    validation = Corpus.from_documents([], [])
    statistics = Statistics(DOCUMENTS, DOCUMENTS, len(train.token_ids), int(train.is_supervised.sum()), (), 0.0)
    return Prepared(train, validation, [], Diagnosis((), statistics), train.fingerprint)
