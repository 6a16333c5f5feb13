"""What every side writes down; needs nothing but torch.

A side trains on `setting["train"]` once, `setting["documents"]` records a step, and is judged by the loss per
supervised token on `setting["validation"]`, document by document."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Record = dict[str, list[int]]


class Steps:
    """Seconds and real tokens of every step."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.seconds: list[float] = []
        self._started = 0.0

    def begin(self) -> None:
        self._started = time.perf_counter()

    def end(self, tokens: int) -> None:
        self.seconds.append(time.perf_counter() - self._started)
        self.tokens.append(tokens)


@torch.no_grad()
def validation_loss(logits_of: Callable[[Tensor], Tensor], records: list[Record]) -> float:
    """Loss per supervised token in nats; `logits_of` maps ids (1, L) to logits (1, L, V)."""
    total, count = 0.0, 0
    for record in records:
        ids, labels = torch.tensor([record["input_ids"]]), torch.tensor(record["labels"][1:])
        logits = logits_of(ids)[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


def peak_resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def padded(records: list[Record], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, attention mask and labels, (R, L), padded on the right."""
    width = max(len(record["input_ids"]) for record in records)
    ids = torch.full((len(records), width), pad_id)
    labels = torch.full((len(records), width), -100)
    mask = torch.zeros(len(records), width, dtype=torch.int64)
    for row, record in enumerate(records):
        length = len(record["input_ids"])
        ids[row, :length] = torch.tensor(record["input_ids"])
        labels[row, :length] = torch.tensor(record["labels"])
        mask[row, :length] = 1
    return ids, mask, labels


def run(train: Callable[[dict[str, Any], Steps], tuple[Callable[[Tensor], Tensor], str]]) -> None:
    """Read the setting, let the side train, and write the result: `side.py setting.json result.json`."""
    setting = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(setting["threads"])
    steps = Steps()
    logits_of, version = train(setting, steps)
    peak = peak_resident_bytes()  # before the validation, which is no part of training
    result = {
        "tokens": steps.tokens,
        "seconds": [round(seconds, 5) for seconds in steps.seconds],
        "peak_resident_bytes": peak,
        "validation_loss": validation_loss(logits_of, setting["validation"]),
        "version": version,
    }
    Path(sys.argv[2]).write_text(json.dumps(result))
