"""LLaMA-Factory's own training (`run_exp`) on pre-tokenized records; "best": bf16 and neat packing."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import datasets
import record
from llamafactory.train import tuner
from transformers import AutoModelForCausalLM, TrainerCallback


class Clock(TrainerCallback):
    def __init__(self, steps: record.Steps, tokens: list[int], documents: int) -> None:
        self.steps, self.tokens, self.documents = steps, tokens, documents
        self.model: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.model = model
        self.steps.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = state.global_step
        self.steps.end(sum(self.tokens[(done - 1) * self.documents : done * self.documents]))


def train(setting: dict[str, Any], steps: record.Steps) -> tuple[Any, str]:
    if setting["method"] == "scratch":
        # Its option train_from_scratch takes the configuration of the model folder.
        extra: dict[str, Any] = {"train_from_scratch": True}
    else:
        extra = {}
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in setting["train"]]
    data = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"train": data}).save_to_disk("tokenized")
    clock = Clock(steps, [len(row["input_ids"]) for row in rows], setting["documents"])
    is_lora = setting["method"] in ("lora", "qlora")
    if setting["method"] == "qlora":
        extra |= {"quantization_bit": 4, "quantization_method": "bnb"}
    micro = min(8, setting["documents"])
    tuner.run_exp(
        {
            "model_name_or_path": setting["model"],
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora" if is_lora else "full",
            **({"lora_rank": 16, "lora_alpha": 32, "lora_target": "all"} if is_lora else {}),
            "tokenized_path": "tokenized",
            "template": "default",
            "cutoff_len": setting["longest"],
            "output_dir": "out",
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": setting["documents"] // micro,
            "learning_rate": setting["learning_rate"],
            "lr_scheduler_type": "constant",
            "num_train_epochs": 1,
            "max_grad_norm": 1.0,
            "bf16": True,
            "use_cpu": True,
            "save_strategy": "no",
            "report_to": "none",
            "disable_shuffling": True,
            "disable_gradient_checkpointing": True,
            "overwrite_output_dir": True,
            **extra,
        },
        callbacks=[clock],
    )
    model: AutoModelForCausalLM = clock.model.eval()
    return lambda ids: model(input_ids=ids).logits, f"llamafactory {version('llamafactory')}"


if __name__ == "__main__":
    record.run(train)
