"""TRL's side of `curves.py`; runs in an environment of its own that has trl and peft but not tunewise."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


@torch.no_grad()
def validation_loss(model: Any, records: list[dict[str, list[int]]]) -> float:
    """Loss per supervised token, document by document: nothing to get wrong."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for record in records:
        ids = torch.tensor([record["input_ids"]])
        labels = torch.tensor([record["labels"][1:]])
        logits = model(input_ids=ids).logits[:, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits[0], labels[0], ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    model.train(was_training)
    return total / count


class Curve(TrainerCallback):
    def __init__(self, records: list[dict[str, list[int]]], every: int, num_steps: int) -> None:
        self.records, self.every, self.num_steps = records, every, num_steps
        self.losses: dict[int, float] = {}

    def note(self, step: int, model: Any) -> None:
        if step % self.every == 0 or step == self.num_steps:
            self.losses[step] = validation_loss(model, self.records)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.note(0, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.note(state.global_step, model)


def main(setting_file: Path, out: Path) -> None:
    setting = json.loads(setting_file.read_text())
    curve = Curve(setting["validation"], setting["every"], setting["num_steps"])
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(setting["model"], dtype=torch.float32),
        args=SFTConfig(
            output_dir="trl-out",
            per_device_train_batch_size=16,
            max_steps=setting["num_steps"],
            learning_rate=setting["learning_rate"],
            lr_scheduler_type="linear",
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            adam_beta1=0.9,
            adam_beta2=0.999,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            max_length=None,
            packing=False,
            save_strategy="no",
            report_to="none",
            logging_steps=50,
            seed=0,
        ),
        train_dataset=Dataset.from_list(setting["train"]),
        processing_class=AutoTokenizer.from_pretrained(setting["model"]),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=setting["targets"], task_type="CAUSAL_LM"),
        callbacks=[curve],
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    out.write_text(json.dumps({"version": trl.__version__, "validation_loss": curve.losses, "seconds": seconds}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
