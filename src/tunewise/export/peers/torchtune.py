"""torchtune: a file for `tune run RECIPE --config`, with one of torchtune's two recipes for a single device.

Read from torchtune 0.6.1: `recipes/{lora,full}_finetune_single_device.py` and the components that they instantiate.
torchtune is no longer maintained (its README, 2026).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from tunewise.engine.schedule import warmup_steps
from tunewise.errors import InputError
from tunewise.export.peers import source as sources
from tunewise.export.peers import trainer_arguments as trainer
from tunewise.export.peers.adapters import is_all_linear, refuse_other_adapters
from tunewise.export.peers.config import Case, Draft
from tunewise.export.peers.ledger import Ledger
from tunewise.export.peers.rows import StepRows, step_rows
from tunewise.export.peers.source import Source
from tunewise.export.peers.torchtune_models import Builder, builder_for
from tunewise.methods import Checkpointing, LoRA, Packing, Precision, Quantize, SupervisedLoss
from tunewise.methods.quantization import HEAD
from tunewise.recipe import Recipe, Slot
from tunewise.workload.places import user_path

VERSION = "0.6.1"
_ATTENTION = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "o_proj": "output_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj"}
_OPTIMIZERS = {
    "sgd": "torch.optim.SGD",
    "adagrad": "torch.optim.Adagrad",
    "rmsprop": "torch.optim.RMSprop",
    "adam": "torch.optim.Adam",
    "adamw": "torch.optim.AdamW",
    "adamw_8bit": "bitsandbytes.optim.AdamW8bit",
    "paged_adamw_8bit": "bitsandbytes.optim.PagedAdamW8bit",
    "adafactor": "torch.optim.Adafactor",
    "lion": "bitsandbytes.optim.Lion",
}
_ARGUMENTS = {"decay": "alpha", "momentum": "momentum", "nesterov": "nesterov", "eps": "eps", "fused": "fused"}


def draft(ledger: Ledger, case: Case) -> Draft:
    """Return the recipe in torchtune's words.

    Raises:
        InputError: torchtune has no builder for the model, or the data or the adapter mean nothing to it.
    """
    recipe = case.recipe
    refuse_other_adapters(ledger, recipe)
    if ledger.value("model.weights") == "random":
        raise InputError("export torchtune: its recipes load weights, they draw none. Name a model with weights.")
    builder = builder_for(case.config)
    name = "lora_finetune_single_device" if recipe.get(LoRA) is not None else "full_finetune_single_device"
    rows = step_rows(ledger, recipe, case.facts, "batch_size", "gradient_accumulation_steps")
    ledger.take("out", "output_dir")
    folder, download = _folder(ledger, recipe)
    content: dict[str, Any] = {
        "output_dir": case.out("torchtune"),
        "model": _model(ledger, recipe, builder),
        "tokenizer": _tokenizer(ledger, recipe, builder, folder, rows.row_tokens),
        "checkpointer": _checkpointer(ledger, builder, folder),
        "resume_from_checkpoint": False,
        "dataset": _dataset(ledger, recipe),
        "seed": trainer.seed_of(ledger),
        "shuffle": True,
        "batch_size": rows.micro_batch_size,
        "gradient_accumulation_steps": rows.accumulation,
        **_length(ledger, case),
        **_optimizer(ledger, recipe),
        **_schedule(ledger, case),
        "loss": _loss(ledger, recipe, rows),
        **_running(ledger, recipe),
        "metric_logger": _logger(ledger, recipe),
        "log_every_n_steps": 1,
        "log_peak_memory_stats": recipe.device == "cuda",
    }
    if name.startswith("lora"):
        content["save_adapter_weights_only"] = True
    _name_what_is_missing(ledger, recipe)
    command = f"tune run {name} --config FILE"
    return Draft(content, f"{download}\n{command}" if download else command, (f"For the recipe {name}.",))


def _folder(ledger: Ledger, recipe: Recipe) -> tuple[str, str]:
    """Return the model's folder, and the command that downloads it when it is not there yet."""
    place = sources.model_path(ledger, recipe, "checkpointer: checkpoint_dir")
    ledger.need("model.revision", None, otherwise="torchtune reads a folder; download that revision into it")
    if user_path(place).is_dir():
        return place, ""
    folder = f"models/{Path(place).name}"
    if "/" not in place:
        return folder, ""
    return folder, f'tune download {place} --output-dir {folder} --ignore-patterns ""'


def _model(ledger: Ledger, recipe: Recipe, builder: Builder) -> dict[str, Any]:
    module = f"torchtune.models.{builder.family.module}"
    for name in ("tokenizer", "chat_template"):
        ledger.need(f"model.{name}", None, otherwise="torchtune has tokenizers and layouts of its own")
    ledger.need("model.resize_vocabulary", False, otherwise="torchtune's builders have a fixed vocabulary")
    for name in ("trust_remote_code", "allow_pickle", "weights"):
        ledger.without_effect(f"model.{name}")
    lora, quantize = recipe.get(LoRA), recipe.get(Quantize)
    if lora is None:
        return {"_component_": f"{module}.{builder.name}"}
    written = {"_component_": f"{module}.lora_{builder.name}", **_adapter(ledger, lora, builder)}
    if quantize is not None:
        ledger.take("quantize", "model: quantize_base")
        ledger.take("quantize.kind", "model: quantize_base")
        if quantize.kind != "nf4":
            ledger.miss("quantize.kind", "torchtune has NF4 only (torchao's); written as that")
        ledger.need("quantize.double_quant", None, True, otherwise="torchtune quantizes the scales too")
        ledger.need("quantize.compute", "dequantize", otherwise="torchtune multiplies with the unpacked weights")
        ledger.need("quantize.head_compute", "dense", otherwise="torchtune computes the loss with the head as it is")
        ledger.need("quantize.block_size", None, 64, otherwise="torchtune's blocks are 64 weights long")
        ledger.need("quantize.skip_modules", (HEAD,), otherwise="torchtune quantizes the layers that have an adapter")
        written["quantize_base"] = True
    return written


def _adapter(ledger: Ledger, lora: LoRA, builder: Builder) -> dict[str, Any]:
    ledger.take("lora", "model: _component_")
    ledger.take("lora.target_modules", "model: lora_attn_modules, apply_lora_to_mlp")
    ledger.take("lora.alpha", "model: lora_alpha")
    wanted = {*_ATTENTION, *_MLP}
    if isinstance(lora.target_modules, tuple):
        wanted = set(lora.target_modules)
        unknown = sorted(wanted - {*_ATTENTION, *_MLP})
        if unknown or _MLP & wanted not in (set(), _MLP):
            ledger.miss(
                "lora.target_modules", "torchtune knows q, k, v and o_proj and the MLP as a whole; written near it"
            )
    elif not is_all_linear(lora):
        ledger.miss("lora.target_modules", "torchtune takes names, no expressions; written as all linear layers")
    ledger.need("lora.exclude_modules", (), otherwise="torchtune leaves no module out; list those you want")
    ledger.need("lora.layers_to_transform", None, otherwise="torchtune puts adapters into all layers")
    ledger.need("lora.use_rslora", False, otherwise="torchtune scales by alpha / rank only; adapt alpha")
    ledger.need("lora.lora_plus_ratio", None, otherwise="torchtune has one learning rate for A and B")
    ledger.need("lora.init", "kaiming", otherwise="torchtune starts A with Kaiming's uniform numbers")
    ledger.need("lora.modules_to_save", (), otherwise="torchtune trains adapters only")
    attention = [theirs for ours, theirs in _ATTENTION.items() if ours in wanted]
    return {
        "lora_attn_modules": attention,
        "apply_lora_to_mlp": bool(_MLP & wanted),
        **({"apply_lora_to_output": False} if builder.family.lora_on_head else {}),
        "lora_rank": ledger.take("lora.rank", "model: lora_rank"),
        "lora_alpha": lora.effective_alpha,
        "lora_dropout": ledger.take("lora.dropout", "model: lora_dropout"),
    }


def _tokenizer(ledger: Ledger, recipe: Recipe, builder: Builder, folder: str, length: int) -> dict[str, Any]:
    ledger.take("data.max_length", "tokenizer: max_seq_len")
    ledger.need("data.too_long", "cut", otherwise="torchtune cuts documents at the tokenizer's max_seq_len")
    if recipe.get(Packing) is not None and length != recipe.data.max_length:
        ledger.miss("data.max_length", f"torchtune has one length for rows and documents: {length}")
    files = {argument: f"{folder}/{file}" for argument, file in builder.family.tokenizer_files}
    return {"_component_": f"torchtune.models.{builder.family.tokenizer}", **files, "max_seq_len": length}


def _checkpointer(ledger: Ledger, builder: Builder, folder: str) -> dict[str, Any]:
    files = sorted(file.name for file in user_path(folder).glob("*.safetensors"))
    if not files:
        ledger.note(f"checkpointer: checkpoint_files: list the weight files of {folder} once they are there")
    return {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpoint_dir": folder,
        "checkpoint_files": files or ["model.safetensors"],
        "recipe_checkpoint": None,
        "output_dir": "${output_dir}",
        "model_type": builder.family.checkpoint,
    }


def _dataset(ledger: Ledger, recipe: Recipe) -> dict[str, Any]:
    source = sources.source_of(ledger, recipe, "dataset: source", "dataset: _component_")
    limit = ledger.take("data.max_records", "dataset: split")
    packing = recipe.get(Packing)
    if packing is not None:
        ledger.take("packing", "dataset: packed")
        ledger.take("packing.row_tokens", "tokenizer: max_seq_len")
        ledger.miss("packing.pad_to", "torchtune pads every packed row to max_seq_len")
    for setting, same in (("validation", None), ("validation_fraction", 0.0)):
        ledger.need(f"data.{setting}", same, otherwise="torchtune 0.6.1's recipes do not evaluate; leave them out")
    where = {"source": source.path}
    if source.loader is not None:
        where = {"source": source.loader, "data_files": sources.data_files(source.path)}
    split = {"packed": packing is not None, "split": "train" if limit is None else f"train[:{limit}]"}
    return {**_layout(ledger, recipe, source), **where, **split}


def _layout(ledger: Ledger, recipe: Recipe, source: Source) -> dict[str, Any]:
    """Return the dataset builder and how the records are read."""
    ledger.take("objective", "dataset: train_on_input")
    system = ledger.take("data.system_prompt", "dataset: new_system_prompt")
    prompt = {} if system is None else {"new_system_prompt": system}
    whole = {"train_on_input": recipe.objective != "sft"}
    match source.format:
        case "text":
            return {"_component_": "torchtune.datasets.text_completion_dataset", "column": source.field("text")}
        case "alpaca":
            if system is not None:
                ledger.miss("data.system_prompt", "torchtune's alpaca_dataset has Alpaca's own words only")
            columns = {ours: source.field(ours) for ours in ("instruction", "input", "output")}
            return {"_component_": "torchtune.datasets.alpaca_dataset", "column_map": columns, **whole}
        case "prompt-completion":
            columns = {"input": source.field("prompt"), "output": source.field("completion")}
            return {"_component_": "torchtune.datasets.instruct_dataset", "column_map": columns, **whole, **prompt}
        case _:
            ours, style = ("messages", "openai") if source.format == "messages" else ("conversations", "sharegpt")
            return {
                "_component_": "torchtune.datasets.chat_dataset", "conversation_column": source.field(ours),
                "conversation_style": style, **whole, **prompt,
            }  # fmt: skip


def _length(ledger: Ledger, case: Case) -> dict[str, Any]:
    spec = case.recipe.training
    ledger.take("training.epochs", "epochs")
    ledger.take("training.steps", "max_steps_per_epoch")
    ledger.take("training.tokens", "max_steps_per_epoch")
    if spec.epochs is not None:
        epochs = max(1, math.ceil(spec.epochs))
        if epochs != spec.epochs:
            ledger.miss("training.epochs", f"torchtune counts whole epochs; written as {epochs}")
        return {"epochs": epochs, "max_steps_per_epoch": None}
    steps = spec.steps or case.facts.num_steps
    if steps is None:
        ledger.miss("training.tokens", "torchtune counts epochs and steps; one epoch is written, set your own end")
    else:
        ledger.note(f"max_steps_per_epoch: ends after {steps} steps only if an epoch has so many; else raise epochs")
    return {"epochs": 1, "max_steps_per_epoch": steps}


def _optimizer(ledger: Ledger, recipe: Recipe) -> dict[str, Any]:
    (method,) = recipe.in_slot(Slot.OPTIMIZER)
    name, is_full = method.name, recipe.get(LoRA) is None
    ledger.take(name, "optimizer: _component_")
    decay = ledger.take("training.weight_decay", "optimizer: weight_decay")
    written: dict[str, Any] = {
        "_component_": _OPTIMIZERS[name],
        "lr": recipe.training.learning_rate,
        "weight_decay": decay,
    }
    if decay > 0:
        ledger.note("training.weight_decay: torchtune lets vectors such as norms decay too")
    for option in type(method).model_fields:
        value, setting = getattr(method, option), f"{name}.{option}"
        if option == "in_backward":
            ledger.take(setting, "optimizer_in_bwd")
            if value and not is_full:
                ledger.miss(setting, "torchtune's LoRA recipe updates after the whole backward pass")
        elif setting == "rmsprop.nesterov":
            ledger.need(setting, False, otherwise="torch's RMSprop has plain momentum only")
        elif option in ("beta1", "beta2"):
            ledger.take(setting, "optimizer: betas")
            written["betas"] = [getattr(method, "beta1"), getattr(method, "beta2")]  # noqa: B009 (of any Adam)
        elif name == "adafactor":
            argument = {"decay": "beta2_decay", "clip": "d"}[option]
            written[argument] = ledger.take(setting, f"optimizer: {argument}")
        else:
            written[_ARGUMENTS[option]] = ledger.take(setting, f"optimizer: {_ARGUMENTS[option]}")
    if name in ("adamw_8bit", "paged_adamw_8bit", "lion"):
        ledger.note(f"{name}: needs pip install bitsandbytes")
    norm = ledger.take("training.max_grad_norm", "clip_grad_norm")
    in_backward = bool(getattr(method, "in_backward", False))
    return {"optimizer": written, **({"optimizer_in_bwd": in_backward} if is_full else {}), "clip_grad_norm": norm}


def _schedule(ledger: Ledger, case: Case) -> dict[str, Any]:
    """Return the schedule: torchtune's cosine with warm-up, which stays at its top with no cycles at all."""
    spec = case.recipe.training
    ledger.take("training.learning_rate", "optimizer: lr")
    ledger.take("training.schedule", "lr_scheduler: _component_, num_cycles")
    ledger.take("training.warmup", "lr_scheduler: num_warmup_steps")
    if spec.schedule not in ("cosine", "constant"):
        ledger.miss("training.schedule", "torchtune has a cosine only; written as that")
    ledger.need("training.final_learning_rate", 0.0, otherwise="torchtune's cosine ends at 0")
    steps, count = spec.steps or case.facts.num_steps, 0
    if 0 < spec.warmup < 1 and steps is None:
        ledger.miss("training.warmup", "torchtune counts steps, and how many the run has is not known; written as none")
    else:
        count = warmup_steps(spec, steps or 0)
    scheduler = {
        "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
        "num_warmup_steps": count,
        "num_cycles": 0.0 if spec.schedule == "constant" else 0.5,
    }
    return {"lr_scheduler": scheduler}


def _loss(ledger: Ledger, recipe: Recipe, rows: StepRows) -> dict[str, Any]:
    loss = recipe.get(SupervisedLoss)
    if loss is None:
        ledger.take("whole_loss", "loss: _component_")
        return {"_component_": "torch.nn.CrossEntropyLoss"}
    ledger.take("supervised_loss", "loss: _component_")
    ledger.take("supervised_loss.chunk_tokens", "loss: num_output_chunks")
    ledger.note("supervised_loss: torchtune has all logits in memory and splits their upcast only")
    chunks = max(1, -(-rows.micro_batch_size * rows.row_tokens // loss.chunk_tokens))
    return {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss", "num_output_chunks": chunks}


def _running(ledger: Ledger, recipe: Recipe) -> dict[str, Any]:
    """Return device, dtype and checkpointing."""
    precision, checkpointing = recipe.get(Precision) or Precision(), recipe.get(Checkpointing)
    ledger.take("device", "device")
    ledger.take("precision", "dtype")
    ledger.take("precision.compute", "dtype")
    ledger.take("precision.trainable", "dtype")
    dtype = "fp32" if precision.compute in ("fp32", "tf32") else "bf16"
    if precision.compute in ("tf32", "fp16"):
        ledger.miss("precision.compute", f"torchtune has fp32 and bf16; written as {dtype}")
    if precision.trainable == "fp32" and dtype == "bf16":
        ledger.miss("precision.trainable", "torchtune trains and keeps everything in bf16, without masters")
    if checkpointing is not None:
        ledger.take("checkpointing", "enable_activation_checkpointing")
        ledger.need("checkpointing.every", 1, otherwise="torchtune's recipe checkpoints every block")
        ledger.need("checkpointing.policy", "full", otherwise="torchtune's recipe recomputes whole blocks")
    return {
        "device": recipe.device if recipe.device != "auto" else "cuda",
        "dtype": dtype,
        "enable_activation_checkpointing": checkpointing is not None,
        "enable_activation_offloading": False,
        "compile": False,
    }


def _logger(ledger: Ledger, recipe: Recipe) -> dict[str, Any]:
    """Return the one logger that torchtune takes."""
    ledger.take("report_to", "metric_logger")
    loggers = {"wandb": "WandBLogger", "tensorboard": "TensorBoardLogger", "mlflow": "MLFlowLogger"}
    first = next((name for name in recipe.report_to if name in loggers), None)
    others = [name for name in recipe.report_to if name != first]
    if others:
        ledger.miss("report_to", f"torchtune reports to one place; left out: {', '.join(others)}")
    if first == "wandb":
        return {"_component_": "torchtune.training.metric_logging.WandBLogger", "project": "torchtune"}
    if first == "mlflow":
        return {"_component_": "torchtune.training.metric_logging.MLFlowLogger", "experiment_name": "torchtune"}
    name = loggers.get(first or "", "DiskLogger")
    return {"_component_": f"torchtune.training.metric_logging.{name}", "log_dir": "${output_dir}/logs"}


def _name_what_is_missing(ledger: Ledger, recipe: Recipe) -> None:
    trainer.name_guards(ledger, recipe, evaluates=False)
    for setting in ("every", "keep_best", "patience", "micro_batch_size"):
        ledger.without_effect(f"evaluation.{setting}")
    ledger.need("checkpoints.every", None, otherwise="torchtune saves after every epoch")
    ledger.miss("checkpoints.keep", "torchtune keeps a checkpoint of every epoch")
    ledger.without_effect("attention")
    ledger.need("attention.kind", "sdpa", otherwise="torchtune takes torch's sdpa, and flex attention for packed rows")
