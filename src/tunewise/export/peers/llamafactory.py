"""LLaMA-Factory: a file for `llamafactory-cli train`, and the `dataset_info.json` by which it finds the data.

Read from LLaMA-Factory 0.9.5: `hparams/*`, `data/{parser,loader,converter}.py`, `data/processor/*`,
`model/adapter.py`, `model/model_utils/*`, `train/*`; its parser refuses keys that it does not know.
"""

from __future__ import annotations

import json
from typing import Any

from tunewise.export.peers import source as sources
from tunewise.export.peers import trainer_arguments as trainer
from tunewise.export.peers.adapters import integer_alpha, is_all_linear, refuse_other_adapters
from tunewise.export.peers.config import Case, Draft
from tunewise.export.peers.ledger import Ledger
from tunewise.export.peers.rows import step_rows
from tunewise.export.peers.source import Source
from tunewise.methods import Attention, Checkpointing, LoRA, Packing, Precision, Quantize
from tunewise.methods.quantization import HEAD
from tunewise.recipe import Recipe
from tunewise.workload.places import user_path

VERSION = "0.9.5"
DATASET_INFO = "dataset_info.json"
TRAIN, VALIDATION = "tunewise", "tunewise_validation"
"""Names of the data sets in `dataset_info.json`."""

_ATTENTIONS = {"per_document": "sdpa", "sdpa": "sdpa", "eager": "disabled", "flash": "fa2"}


def draft(ledger: Ledger, case: Case) -> Draft:
    """Return the recipe in LLaMA-Factory's words.

    Raises:
        InputError: the recipe's data or its adapter mean nothing to LLaMA-Factory.
    """
    recipe, facts = case.recipe, case.facts
    refuse_other_adapters(ledger, recipe)
    source = sources.source_of(ledger, recipe, "dataset, dataset_dir", DATASET_INFO)
    ledger.take("out", "output_dir")
    written: dict[str, Any] = _model(ledger, recipe)
    stage = _stage(ledger, source)
    data_folder = f"{case.name}.llamafactory.data"
    written |= {"stage": stage, "do_train": True}
    written |= _data(ledger, recipe, source, str(case.folder / data_folder))
    rows = step_rows(ledger, recipe, facts, "per_device_train_batch_size", "gradient_accumulation_steps")
    written |= {
        "per_device_train_batch_size": rows.micro_batch_size,
        "gradient_accumulation_steps": rows.accumulation,
    }
    written |= _packing(ledger, recipe, stage)
    written |= trainer.length_arguments(ledger, recipe, facts, "num_train_epochs")
    written |= trainer.schedule_arguments(ledger, recipe, facts, "lr_scheduler_type")
    written |= trainer.warmup_argument(ledger)
    written |= trainer.optimizer_arguments(ledger, recipe)
    written |= _adapter(ledger, recipe)
    written |= _quantization(ledger, recipe)
    written |= _precision(ledger, recipe)
    written |= _memory(ledger, recipe)
    written |= trainer.evaluation_arguments(ledger, recipe, "early_stopping_steps")
    trainer.name_guards(ledger, recipe)
    written |= {
        "seed": trainer.seed_of(ledger),
        "report_to": trainer.reports(ledger),
        "output_dir": case.out("llamafactory"),
    }
    companion = (f"{data_folder}/{DATASET_INFO}", dataset_info(source))
    return Draft(written, "llamafactory-cli train FILE", companions=(companion,))


def dataset_info(source: Source) -> str:
    """Return the text of `dataset_info.json`, which says where the data lie and what their columns are."""
    entries = {TRAIN: _entry(source, source.path)}
    if source.validation is not None:
        entries[VALIDATION] = _entry(source, source.validation)
    return json.dumps(entries, indent=2) + "\n"


def _entry(source: Source, path: str) -> dict[str, Any]:
    """Say where a data set lies and what its columns are."""
    where = {"hf_hub_url": path} if source.is_hub else {"file_name": str(user_path(path).resolve())}
    columns = sources.known_columns(source)
    match source.format:
        case "text":
            return {**where, "columns": {"prompt": source.field("text")}}
        case "alpaca":
            names = {"instruction": "prompt", "input": "query", "output": "response", "system": "system"}
        case "prompt-completion":
            names = {"prompt": "prompt", "completion": "response", "system": "system"}
        case _:
            names = {"messages": "messages", "conversations": "messages", "tools": "tools", "system": "system"}
    entry = {**where, "columns": {names[ours]: theirs for ours, theirs in columns.items()}}
    if source.format == "messages":
        tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
                "observation_tag": "tool", "system_tag": "system"}  # fmt: skip
        return {"formatting": "openai", **entry, "tags": tags}
    return {"formatting": "sharegpt", **entry} if source.format == "sharegpt" else entry


def _model(ledger: Ledger, recipe: Recipe) -> dict[str, Any]:
    spec = recipe.model
    written: dict[str, Any] = {"model_name_or_path": sources.model_path(ledger, recipe, "model_name_or_path")}
    if ledger.take("model.revision", "model_revision") is not None:
        written["model_revision"] = spec.revision
    if ledger.take("model.trust_remote_code", "trust_remote_code"):
        written["trust_remote_code"] = True
    if ledger.take("model.resize_vocabulary", "resize_vocab"):
        written["resize_vocab"] = True
    if ledger.take("model.weights", "train_from_scratch") == "random":
        written["train_from_scratch"] = True
    ledger.need("model.allow_pickle", True, otherwise="LLaMA-Factory reads pickled weights where there are no others")
    ledger.need("model.tokenizer", None, otherwise="LLaMA-Factory takes the tokenizer from the model's folder")
    ledger.need(
        "model.chat_template", None, otherwise="LLaMA-Factory has templates of its own; set `template` to one of them"
    )
    if ledger.take("device", "use_cpu") == "cpu":
        written["use_cpu"] = True
    return written


def _stage(ledger: Ledger, source: Source) -> str:
    """Return the stage: plain texts are learnt whole in "pt", answers in "sft"."""
    ledger.take("objective", "stage, train_on_prompt")
    return "pt" if source.format == "text" else "sft"


def _data(ledger: Ledger, recipe: Recipe, source: Source, dataset_dir: str) -> dict[str, Any]:
    sources.columns_must_be(ledger, source)
    written: dict[str, Any] = {"dataset": TRAIN, "dataset_dir": dataset_dir}
    if source.format != "text":
        written["train_on_prompt"] = recipe.objective != "sft"
        ledger.note("template: LLaMA-Factory reads the tokenizer's chat template when the file names none of its own")
    ledger.take("data.validation", "eval_dataset")
    ledger.take("data.validation_fraction", "val_size")
    if source.validation is not None:
        written["eval_dataset"] = VALIDATION
    elif recipe.data.validation_fraction > 0:
        written["val_size"] = recipe.data.validation_fraction
        ledger.note("data.validation_fraction: LLaMA-Factory splits by chance, not by content")
    if ledger.take("data.max_records", "max_samples") is not None:
        written["max_samples"] = recipe.data.max_records
    if ledger.take("data.system_prompt", "default_system") is not None:
        written["default_system"] = recipe.data.system_prompt
    return written


def _packing(ledger: Ledger, recipe: Recipe, stage: str) -> dict[str, Any]:
    packing, longest = recipe.get(Packing), recipe.data.max_length
    ledger.take("data.max_length", "cutoff_len")
    policy = ledger.take("data.too_long", "cutoff_len")
    if packing is None:
        if policy != "cut":
            ledger.miss("data.too_long", "without packing LLaMA-Factory cuts long documents, prompt and answer each")
        return {"cutoff_len": longest, "packing": False}
    ledger.take("packing", "packing, neat_packing")
    ledger.take("packing.row_tokens", "cutoff_len")
    if packing.row_tokens != longest:
        ledger.miss("data.max_length", f"LLaMA-Factory has one length for rows and documents: {packing.row_tokens}")
    if policy not in ("cut", "drop"):
        ledger.miss("data.too_long", "with packing LLaMA-Factory cuts long documents, and drops those still longer")
    ledger.miss("packing.pad_to", "LLaMA-Factory pads every packed row to cutoff_len")
    if stage == "pt":
        ledger.note("packing: in the stage 'pt' LLaMA-Factory joins all texts and cuts rows out of that")
        return {"cutoff_len": packing.row_tokens, "packing": True}
    return {"cutoff_len": packing.row_tokens, "packing": True, "neat_packing": True}


def _adapter(ledger: Ledger, recipe: Recipe) -> dict[str, Any]:
    lora = recipe.get(LoRA)
    if lora is None:
        return {"finetuning_type": "full"}
    ledger.take("lora", "finetuning_type")
    ledger.need("lora.exclude_modules", (), otherwise="LLaMA-Factory leaves no module out; list those you want")
    ledger.need("lora.layers_to_transform", None, otherwise="LLaMA-Factory puts adapters into all layers")
    ledger.take("lora.target_modules", "lora_target")
    targets = "all"
    if isinstance(lora.target_modules, tuple):
        targets = ",".join(lora.target_modules)
    elif not is_all_linear(lora):
        ledger.miss("lora.target_modules", "LLaMA-Factory takes names, no expressions; written as all linear layers")
    written: dict[str, Any] = {
        "finetuning_type": "lora",
        "lora_rank": ledger.take("lora.rank", "lora_rank"),
        "lora_alpha": integer_alpha(ledger, lora, "lora_alpha"),
        "lora_dropout": ledger.take("lora.dropout", "lora_dropout"),
        "lora_target": targets,
        "use_rslora": ledger.take("lora.use_rslora", "use_rslora"),
    }
    if ledger.take("lora.lora_plus_ratio", "loraplus_lr_ratio") is not None:
        written["loraplus_lr_ratio"] = lora.lora_plus_ratio
    if saved := ledger.take("lora.modules_to_save", "additional_target"):
        written["additional_target"] = ",".join(saved)
    if ledger.take("lora.init", "pissa_init") == "pissa":
        written |= {"pissa_init": True, "pissa_iter": -1}  # the exact decomposition, as ours
    elif lora.init != "kaiming":
        ledger.miss("lora.init", "LLaMA-Factory starts A with Kaiming's uniform numbers")
    return written


def _quantization(ledger: Ledger, recipe: Recipe) -> dict[str, Any]:
    quantize = recipe.get(Quantize)
    if quantize is None:
        return {}
    ledger.take("quantize", "quantization_bit")
    ledger.take("quantize.kind", "quantization_type")
    ledger.take("quantize.double_quant", "double_quantization")
    ledger.need(
        "quantize.compute", "dequantize", otherwise="bitsandbytes' LLM.int8 keeps columns of outliers in 16 bits"
    )
    ledger.need("quantize.head_compute", "dense", otherwise="LLaMA-Factory computes the loss with the head as it is")
    ledger.need("quantize.block_size", None, 64, otherwise="bitsandbytes' blocks in transformers are 64 weights long")
    ledger.need("quantize.skip_modules", (HEAD,), otherwise="LLaMA-Factory leaves out the output head only")
    written: dict[str, Any] = {"quantization_method": "bnb"}
    if quantize.kind in ("int8", "fp8"):
        ledger.miss("quantize.kind", "LLaMA-Factory has bitsandbytes' LLM.int8, which also rounds the inputs")
        return written | {"quantization_bit": 8}
    return written | {
        "quantization_bit": 4,
        "quantization_type": quantize.kind,
        "double_quantization": quantize.double_quant is not False,
    }


def _precision(ledger: Ledger, recipe: Recipe) -> dict[str, Any]:
    """Return the dtypes; what is trained is kept in fp32 unless `pure_bf16`."""
    precision = recipe.get(Precision) or Precision()
    ledger.take("precision", "bf16, fp16, tf32, pure_bf16")
    ledger.take("precision.compute", "bf16, fp16, tf32")
    ledger.take("precision.trainable", "pure_bf16")
    pure = precision.compute == "bf16" and precision.trainable == "same"
    return {
        "bf16": precision.compute == "bf16" and not pure,
        "fp16": precision.compute == "fp16",
        "tf32": precision.compute == "tf32",
        "pure_bf16": pure,
    }


def _memory(ledger: Ledger, recipe: Recipe) -> dict[str, Any]:
    attention, checkpointing = recipe.get(Attention) or Attention(), recipe.get(Checkpointing)
    ledger.take("attention", "flash_attn")
    ledger.take("attention.kind", "flash_attn")
    if attention.kind == "per_document":
        ledger.miss("attention.kind", "LLaMA-Factory has not got it; written as torch's sdpa, masked when packed")
    written: dict[str, Any] = {"flash_attn": _ATTENTIONS[attention.kind]}
    written |= {"disable_gradient_checkpointing": checkpointing is None, "use_reentrant_gc": False}
    if checkpointing is not None:
        ledger.take("checkpointing", "disable_gradient_checkpointing")
        ledger.need("checkpointing.every", 1, otherwise="LLaMA-Factory checkpoints every block")
        ledger.need("checkpointing.policy", "full", otherwise="LLaMA-Factory recomputes whole blocks")
    if ledger.has("whole_loss"):
        ledger.take("whole_loss", "enable_liger_kernel")
        return written | {"enable_liger_kernel": False}
    ledger.take("supervised_loss", "enable_liger_kernel")
    if recipe.device != "cuda":
        ledger.miss(
            "supervised_loss", "LLaMA-Factory has a chunked loss on CUDA only (Liger); written as the whole loss"
        )
        ledger.without_effect("supervised_loss.chunk_tokens")
        return written | {"enable_liger_kernel": False}
    ledger.miss("supervised_loss.chunk_tokens", "Liger's fused loss chooses its chunks itself")
    ledger.note("supervised_loss: Liger (pip install liger-kernel) exchanges norms, rotary embedding and MLP as well")
    return written | {"enable_liger_kernel": True}
