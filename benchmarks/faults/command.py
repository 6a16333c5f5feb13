"""A small tuning and the command that runs it, to be started, killed and started again."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import torch
import yaml
from benchmarks.faults.witness import MARK
from transformers import LlamaConfig, LlamaForCausalLM

from tunewise.workload.model import EMBEDDED_FOLDER

STEP = 0.05
"""The longest that one look at the clock counts, in seconds: this process may itself be paused for a while."""

LONGEST_SECONDS = 600.0


class TuningCommand:
    """One command that is started again and again."""

    def __init__(self, recipe: Path, folder: Path, budget: str) -> None:
        self.folder, self.mark, self.log = folder, uuid.uuid4().hex, folder.with_suffix(".log")
        self.lived = 0.0
        self.command = [sys.executable, "-m", "tunewise.cli", "tune", str(recipe), "--budget", budget]
        self.command += ["--out", str(folder)]

    def start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, MARK: self.mark, "OMP_NUM_THREADS": "1"},
            )

    def finish(self) -> int:
        """Run the command to its end."""
        code = self.live(math.inf)
        assert code is not None
        return code

    def live(self, moment: float, aim: float | None = None) -> int | None:
        """Run the command for `moment` seconds, then kill it; return its exit code when it ended by itself.

        With `aim` the kill waits for the next time that the storage is written, and for so long after its beginning.
        `lived` is how long the command ran.
        """
        process = self.start()
        self.lived, last = 0.0, time.monotonic()
        while process.poll() is None and (self.lived < moment or (aim is not None and not self.writes)):
            time.sleep(0.002 if self.lived < moment else 0.0001)
            now = time.monotonic()
            self.lived, last = self.lived + min(now - last, STEP), now
            if moment == math.inf and self.lived > LONGEST_SECONDS:
                process.kill()
        time.sleep(aim or 0.0)
        if process.poll() is not None:
            return process.returncode
        process.kill()
        process.wait()
        return None

    @property
    def writes(self) -> bool:
        """Whether the storage is being written now."""
        return (self.folder / "study.db-journal").exists()

    def findings(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "findings.json").read_text(encoding="utf-8"))
        return found

    def tail(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")[-600:]


def write_recipe(folder: Path) -> Path:
    """Write a model of 137K parameters, 80 short records, and a recipe over them: a trial takes about a second."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    words, chooser = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"], random.Random(0)
    with (folder / "data.jsonl").open("w") as stream:
        for number in range(80):
            answer = " ".join(chooser.choices(words, k=chooser.randint(3, 12)))
            stream.write(json.dumps({"prompt": f"Say {number}", "completion": answer}) + "\n")
    recipe = {
        "model": {"name": str(folder / "model"), "tokenizer": str(EMBEDDED_FOLDER)},
        "data": {"source": str(folder / "data.jsonl"), "validation_fraction": 0.1},
        "methods": {"lora": {"rank": 4}, "packing": {"row_tokens": 64}},
        "batch": {"documents": 4, "micro_batch_size": 2},
        "training": {"epochs": 2, "learning_rate": 1e-3},
        "checkpoints": {"every": 5},
        "quality": "off",
        "device": "cpu",
        "seed": 5,
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file
