"""TRL's SFTTrainer and transformers' Trainer, each with its defaults and with the best settings that we know."""

from __future__ import annotations

from typing import Any

import datasets
import record
import torch
import transformers
import trl
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments


class Clock(TrainerCallback):
    def __init__(self, steps: record.Steps, counts: list[int]) -> None:
        self.steps, self.counts, self.used = steps, counts, 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        taken = self.counts[self.used : self.used + args.gradient_accumulation_steps]
        self.used += len(taken)
        self.steps.end(sum(taken))


def counting(collate: Any, counts: list[int]) -> Any:
    """Wrap a collator: note the real tokens of every micro-batch."""

    def call(features: list[dict[str, Any]]) -> Any:
        counts.append(sum(len(feature["input_ids"]) for feature in features))
        return collate(features)

    return call


def lora(setting: dict[str, Any]) -> LoraConfig | None:
    if setting["method"] not in ("lora", "qlora"):
        return None
    return LoraConfig(r=16, lora_alpha=32, target_modules=setting["targets"], task_type="CAUSAL_LM")


def model_of(setting: dict[str, Any], dtype: torch.dtype) -> Any:
    if setting["method"] == "scratch":
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(setting["model"]), dtype=dtype)
    quantization = None
    if setting["method"] == "qlora":
        quantization = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return AutoModelForCausalLM.from_pretrained(setting["model"], dtype=dtype, quantization_config=quantization)


def common(setting: dict[str, Any], micro_batch: int, accumulation: int) -> dict[str, Any]:
    return {
        "output_dir": "out",
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": 1,
        "learning_rate": setting["learning_rate"],
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1000,
        "seed": 0,
    }


def train(setting: dict[str, Any], steps: record.Steps) -> tuple[Any, str]:
    """Train as `setting["peer"]` says: trl-default, trl-best, trainer-default, trainer-best."""
    tool, _, how = setting["peer"].partition("-")
    is_best = how == "best"
    tokenizer = AutoTokenizer.from_pretrained(setting["model"])
    data = datasets.Dataset.from_list(setting["train"])
    documents = setting["documents"]
    micro = min(8, documents)  # transformers' and TRL's default
    counts: list[int] = []
    clock = Clock(steps, counts)
    dtype = torch.bfloat16 if is_best and setting["method"] in ("lora", "qlora") else torch.float32
    model = model_of(setting, dtype)
    if tool == "trl":
        extra: dict[str, Any] = {"max_length": setting["max_length"]}
        if is_best:
            rows = max(1, round(setting["tokens_per_step"] / setting["row_tokens"]))
            micro, documents = 1, rows
            extra = {
                "packing": True,
                "max_length": max(setting["row_tokens"], setting["longest"]),
                "gradient_checkpointing": False,
                "bf16": dtype != torch.bfloat16,
            }
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(**common(setting, micro, max(1, documents // micro)), **extra),
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=lora(setting),
            callbacks=[clock],
        )
    else:
        if setting["method"] == "qlora":
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        config = lora(setting)
        model = model if config is None else get_peft_model(model, config)
        extra = {"bf16": dtype != torch.bfloat16, "train_sampling_strategy": "group_by_length"} if is_best else {}
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**common(setting, micro, max(1, documents // micro)), **extra),
            train_dataset=data,
            data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
            callbacks=[clock],
        )
    trainer.data_collator = counting(trainer.data_collator, counts)
    trainer.train()
    model = trainer.model.eval()
    return lambda ids: model(input_ids=ids).logits, f"trl {trl.__version__}, transformers {transformers.__version__}"


if __name__ == "__main__":
    record.run(train)
