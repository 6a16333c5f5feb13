"""TRL: a file for `trl sft --config`.

Read from TRL 1.16: `SFTConfig`, `ModelConfig`, `ScriptArguments`, `DatasetMixtureConfig`, `SFTTrainer` and
`scripts/sft.py`; TRL's parser refuses keys that none of these classes has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunewise.export.peers import source as sources
from tunewise.export.peers import trainer_arguments as trainer
from tunewise.export.peers.adapters import integer_alpha, one_expression, peft_targets, refuse_other_adapters
from tunewise.export.peers.config import Case, Draft
from tunewise.export.peers.ledger import Ledger
from tunewise.export.peers.rows import step_rows
from tunewise.export.peers.source import Source
from tunewise.methods import Attention, LoRA, Packing, Precision, Quantize
from tunewise.methods.quantization import HEAD
from tunewise.recipe import Recipe, Slot

VERSION = "1.16"
ATTENTIONS = {"per_document": "sdpa", "sdpa": "sdpa", "eager": "eager", "flash": "flash_attention_2"}
_DTYPES = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def draft(ledger: Ledger, case: Case) -> Draft:
    """Return the recipe in TRL's words.

    Raises:
        InputError: the recipe's data or its adapter mean nothing to TRL.
    """
    recipe, facts = case.recipe, case.facts
    refuse_other_adapters(ledger, recipe)
    ledger.take("out", "output_dir")
    written: dict[str, Any] = {}
    written |= _model(ledger, recipe)
    written |= _data(ledger, recipe)
    rows = step_rows(ledger, recipe, facts, "per_device_train_batch_size", "gradient_accumulation_steps")
    written |= {
        "per_device_train_batch_size": rows.micro_batch_size,
        "gradient_accumulation_steps": rows.accumulation,
    }
    written |= _lengths(ledger, recipe)
    written |= trainer.length_arguments(ledger, recipe, facts, "num_train_epochs")
    written |= trainer.schedule_arguments(ledger, recipe, facts, "lr_scheduler_type")
    written |= trainer.warmup_argument(ledger)
    written |= trainer.optimizer_arguments(ledger, recipe)
    written |= _adapter(ledger, recipe)
    written |= _quantization(ledger, recipe)
    written |= _precision(ledger, recipe)
    written |= _memory(ledger, recipe)
    if hasattr(case.config.get_text_config(), "output_router_logits"):
        written["router_aux_loss_coef"] = 0.0  # TRL adds the experts' balancing loss, tunewise does not
    written |= trainer.evaluation_arguments(ledger, recipe, None)
    trainer.name_guards(ledger, recipe)
    written |= {
        "seed": trainer.seed_of(ledger),
        "report_to": trainer.reports(ledger),
        "output_dir": case.out("trl"),
    }
    return Draft(written, "trl sft --config FILE")


def _model(ledger: Ledger, recipe: Recipe) -> dict[str, Any]:
    spec = recipe.model
    written: dict[str, Any] = {"model_name_or_path": sources.model_path(ledger, recipe, "model_name_or_path")}
    if ledger.take("model.revision", "model_revision") is not None:
        written["model_revision"] = spec.revision
    if ledger.take("model.trust_remote_code", "trust_remote_code"):
        written["trust_remote_code"] = True
    if not ledger.take("model.allow_pickle", "model_init_kwargs: use_safetensors"):
        written["model_init_kwargs"] = {"use_safetensors": True}
    ledger.need("model.weights", "pretrained", otherwise="TRL's command loads weights, it draws none")
    ledger.need("model.tokenizer", None, otherwise="TRL takes the tokenizer from the model's folder; put it there")
    ledger.need("model.resize_vocabulary", False, otherwise="TRL leaves the embedding as large as it is")
    template = ledger.take("model.chat_template", "chat_template_path")
    if template is not None and Path(template).suffix in (".jinja", ".j2"):
        written["chat_template_path"] = template
    elif template is not None:
        ledger.miss("model.chat_template", "TRL takes a file that ends in .jinja; put the template into one")
    ledger.take("device", "use_cpu")
    if recipe.device == "cpu":
        written["use_cpu"] = True
    return written


def _data(ledger: Ledger, recipe: Recipe) -> dict[str, Any]:
    source = sources.source_of(ledger, recipe, "datasets", "dataset_text_field, assistant_only_loss")
    limit = ledger.take("data.max_records", "datasets: split")
    entry: dict[str, Any] = {"path": source.path}
    if source.loader is not None:
        entry = {"path": source.loader, "data_files": sources.data_files(source.path)}
    entry["split"] = "train" if limit is None else f"train[:{limit}]"
    written: dict[str, Any] = {"datasets": [entry]}
    ledger.take("data.validation_fraction", "test_split_size")
    if ledger.need("data.validation", None, otherwise="TRL's command splits one data set; a part of it is set aside"):
        fraction = recipe.data.validation_fraction
    else:
        fraction = recipe.data.validation_fraction or 0.05
    if fraction > 0:
        written["test_split_size"] = fraction
        ledger.note("data.validation_fraction: TRL splits by chance, not by content, and with no seed of its own")
    ledger.need("data.system_prompt", None, otherwise="TRL adds no system message; write it into the records")
    return written | _columns(ledger, recipe, source)


def _columns(ledger: Ledger, recipe: Recipe, source: Source) -> dict[str, Any]:
    """Return which tokens are learnt, and name columns that TRL would not find."""
    ledger.take("objective", "assistant_only_loss, completion_only_loss")
    learns_answers = recipe.objective == "sft"
    match source.format:
        case "text":
            sources.columns_must_be(ledger, source)
            return {"dataset_text_field": source.field("text"), "completion_only_loss": False}
        case "prompt-completion":
            sources.columns_must_be(ledger, source, "prompt", "completion", "system")
            return {"completion_only_loss": learns_answers}
        case "alpaca":
            ledger.miss("data.format", "TRL does not know Alpaca's columns; make prompt and completion of them")
            return {"completion_only_loss": learns_answers}
        case _:
            if source.format == "sharegpt":
                ledger.miss("data.format", "TRL needs 'messages' of role (user, assistant) and content; convert them")
            else:
                sources.columns_must_be(ledger, source, "messages", "tools", "system")
            if learns_answers:
                ledger.note("objective: assistant_only_loss needs a chat template that TRL knows or can mark")
            return {"assistant_only_loss": learns_answers}


def _lengths(ledger: Ledger, recipe: Recipe) -> dict[str, Any]:
    """Return length, packing and what happens to long documents."""
    packing, longest = recipe.get(Packing), recipe.data.max_length
    ledger.take("data.max_length", "max_length")
    policy = ledger.take("data.too_long", "packing_strategy")
    if packing is None:
        if policy != "cut":
            ledger.miss("data.too_long", "without packing TRL cuts off what is longer than max_length")
        return {"max_length": longest, "packing": False}
    ledger.take("packing", "packing")
    ledger.take("packing.row_tokens", "max_length")
    if packing.row_tokens != longest:
        ledger.miss("data.max_length", f"with packing TRL has one length for rows and documents: {packing.row_tokens}")
    if policy not in ("cut", "split"):
        ledger.miss("data.too_long", "with packing TRL cuts or splits long documents; written as cut")
    strategy = "bfd_split" if policy == "split" else "bfd"
    pad = ledger.take("packing.pad_to", "pad_to_multiple_of")
    return {
        "max_length": packing.row_tokens, "packing": True, "packing_strategy": strategy, "pad_to_multiple_of": pad,
    }  # fmt: skip


def _adapter(ledger: Ledger, recipe: Recipe) -> dict[str, Any]:
    lora = recipe.get(LoRA)
    if lora is None:
        return {"use_peft": False}
    ledger.take("lora", "use_peft")
    targets = peft_targets(ledger, lora, "lora_target_modules")
    if isinstance(targets, list):
        targets = [one_expression(targets)] if len(targets) == 1 else targets
    ledger.need("lora.exclude_modules", (), otherwise="TRL's command leaves no module out; list those you want")
    ledger.need("lora.lora_plus_ratio", None, otherwise="TRL's command has one learning rate for A and B")
    ledger.need("lora.init", "kaiming", otherwise="TRL's command starts A with Kaiming's uniform numbers and B at 0")
    written = {
        "use_peft": True,
        "lora_r": ledger.take("lora.rank", "lora_r"),
        "lora_alpha": integer_alpha(ledger, lora, "lora_alpha"),
        "lora_dropout": ledger.take("lora.dropout", "lora_dropout"),
        "lora_target_modules": targets if isinstance(targets, list) else [targets],
        "use_rslora": ledger.take("lora.use_rslora", "use_rslora"),
    }
    if saved := ledger.take("lora.modules_to_save", "lora_modules_to_save"):
        written["lora_modules_to_save"] = list(saved)
    return written


def _quantization(ledger: Ledger, recipe: Recipe) -> dict[str, Any]:
    quantize = recipe.get(Quantize)
    if quantize is None:
        return {}
    ledger.take("quantize", "load_in_4bit, load_in_8bit")
    ledger.take("quantize.kind", "bnb_4bit_quant_type")
    ledger.take("quantize.double_quant", "use_bnb_nested_quant")
    ledger.need(
        "quantize.compute", "dequantize", otherwise="bitsandbytes' LLM.int8 keeps columns of outliers in 16 bits"
    )
    ledger.need("quantize.head_compute", "dense", otherwise="TRL computes the loss with the head as it is")
    ledger.need("quantize.block_size", None, 64, otherwise="bitsandbytes' blocks in transformers are 64 weights long")
    ledger.need("quantize.skip_modules", (HEAD,), otherwise="TRL's command leaves out the output head only")
    if quantize.kind in ("int8", "fp8"):
        ledger.miss("quantize.kind", "TRL has bitsandbytes' LLM.int8, which also rounds the inputs; written as that")
        return {"load_in_8bit": True}
    nested = quantize.double_quant is not False
    return {"load_in_4bit": True, "bnb_4bit_quant_type": quantize.kind, "use_bnb_nested_quant": nested}


def _precision(ledger: Ledger, recipe: Recipe) -> dict[str, Any]:
    """Return the dtypes: `dtype` is how weights are stored, bf16 and fp16 switch autocast on."""
    precision = recipe.get(Precision) or Precision()
    ledger.take("precision", "dtype")
    ledger.take("precision.compute", "dtype, bf16, fp16, tf32")
    ledger.take("precision.trainable", "dtype")
    is_16_bit = precision.storage_dtype.itemsize == 2
    has_adapter, keeps_masters = bool(recipe.in_slot(Slot.ADAPTER)), precision.trainable == "fp32"
    stored = _DTYPES[precision.compute]
    if is_16_bit and not has_adapter and keeps_masters:
        stored = "float32"
    if is_16_bit and has_adapter and recipe.get(Quantize) is not None and keeps_masters:
        ledger.miss("precision.trainable", "TRL trains the adapters of a quantized model in bfloat16")
    elif is_16_bit and has_adapter and recipe.get(Quantize) is None and not keeps_masters:
        ledger.miss("precision.trainable", "peft keeps the adapters of a 16-bit model in float32")
    autocast = is_16_bit and (has_adapter or keeps_masters)
    return {
        "dtype": stored,
        "bf16": precision.compute == "bf16" and autocast,
        "fp16": precision.compute == "fp16" and autocast,
        "tf32": precision.compute == "tf32",
    }


def _memory(ledger: Ledger, recipe: Recipe) -> dict[str, Any]:
    """Return attention, checkpointing and loss."""
    attention = recipe.get(Attention) or Attention()
    ledger.take("attention", "attn_implementation")
    ledger.take("attention.kind", "attn_implementation")
    if attention.kind == "per_document":
        what = ", which masks the other documents of a packed row" if recipe.get(Packing) is not None else ""
        ledger.miss("attention.kind", f"TRL has not got it; written as torch's sdpa{what}")
    written: dict[str, Any] = {"attn_implementation": ATTENTIONS[attention.kind]}
    written |= trainer.checkpointing_arguments(ledger, recipe)
    if ledger.has("checkpointing") and ledger.take(
        "checkpointing.policy", "gradient_checkpointing_kwargs: selective"
    ) == ("selective"):
        written["gradient_checkpointing_kwargs"]["selective"] = True
        ledger.miss("checkpointing.policy", "TRL keeps the attention's outputs, not those of the matrix products")
    if ledger.has("whole_loss"):
        ledger.miss("whole_loss", "TRL 1.16 always computes the loss in chunks, with less memory")
    else:
        ledger.take("supervised_loss", "loss_type")
        ledger.miss("supervised_loss.chunk_tokens", "TRL chooses the chunks of its loss itself")
    return written | {"loss_type": "nll"}
