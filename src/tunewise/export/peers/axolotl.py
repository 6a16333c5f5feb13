"""axolotl: a file for `axolotl train`.

Read from axolotl 0.19: `utils/schemas/*`, `core/builders/{base,causal}.py`, `loaders/{model,adapter}.py`,
`prompt_strategies/*`. Its schema passes over keys that it does not know, so the acceptance check compares them too.
"""

from __future__ import annotations

import re
from typing import Any

from tunewise.export.peers import source as sources
from tunewise.export.peers import trainer_arguments as trainer
from tunewise.export.peers.adapters import integer_alpha, is_all_linear, peft_targets, refuse_other_adapters
from tunewise.export.peers.config import Case, Draft
from tunewise.export.peers.ledger import Ledger
from tunewise.export.peers.rows import StepRows, step_rows
from tunewise.export.peers.source import Source
from tunewise.export.peers.trl import ATTENTIONS
from tunewise.methods import Freeze, LoRA, Packing, Precision, Quantize, SupervisedLoss
from tunewise.methods.quantization import HEAD
from tunewise.recipe import Recipe, Slot

VERSION = "0.19"
_EXCESS = {"cut": "truncate", "drop": "drop", "error": "raise"}
_PRODUCTS = ["attention", "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"]
"""What our selective checkpointing keeps, as axolotl names operators."""


def draft(ledger: Ledger, case: Case) -> Draft:
    """Return the recipe in axolotl's words.

    Raises:
        InputError: the recipe's data or its adapter mean nothing to axolotl.
    """
    recipe, facts = case.recipe, case.facts
    refuse_other_adapters(ledger, recipe, *(() if recipe.get(LoRA) else ("freeze",)))
    ledger.take("out", "output_dir")
    rows = step_rows(ledger, recipe, facts, "micro_batch_size", "gradient_accumulation_steps")
    written: dict[str, Any] = {}
    written |= _model(ledger, recipe)
    written |= _data(ledger, recipe)
    written |= {"micro_batch_size": rows.micro_batch_size, "gradient_accumulation_steps": rows.accumulation}
    written |= _packing(ledger, recipe)
    written |= trainer.length_arguments(ledger, recipe, facts, "num_epochs")
    written |= trainer.schedule_arguments(ledger, recipe, facts, "lr_scheduler")
    written |= _warmup(ledger)
    written |= trainer.optimizer_arguments(ledger, recipe, "optimizer")
    written |= _adapter(ledger, recipe)
    written |= _quantization(ledger, recipe)
    written |= _precision(ledger, recipe)
    written |= _memory(ledger, recipe, rows)
    written |= _evaluation(ledger, recipe)
    trainer.name_guards(ledger, recipe)
    written |= {f"use_{name}": True for name in ledger.take("report_to", "use_wandb, use_mlflow, ...")}
    written |= {"seed": trainer.seed_of(ledger), "output_dir": case.out("axolotl")}
    return Draft(written, "axolotl train FILE")


def _model(ledger: Ledger, recipe: Recipe) -> dict[str, Any]:
    spec = recipe.model
    written: dict[str, Any] = {"base_model": sources.model_path(ledger, recipe, "base_model")}
    if ledger.take("model.revision", "revision_of_model") is not None:
        written["revision_of_model"] = spec.revision
    if ledger.take("model.tokenizer", "tokenizer_config") is not None:
        written["tokenizer_config"] = spec.tokenizer
    if ledger.take("model.trust_remote_code", "trust_remote_code"):
        written["trust_remote_code"] = True
    if ledger.take("model.weights", "reinit_weights") == "random":
        written["reinit_weights"] = True
    if ledger.take("model.chat_template", "chat_template_jinja") is not None:
        written |= {"chat_template": "jinja", "chat_template_jinja": spec.chat_template}
    ledger.need("model.allow_pickle", True, otherwise="axolotl reads pickled weights where there are no others")
    ledger.take("model.resize_vocabulary", "always, when the tokenizer has more tokens")
    ledger.need("device", "cuda", "auto", otherwise="axolotl has no switch for the device; it takes a GPU if any")
    return written


def _data(ledger: Ledger, recipe: Recipe) -> dict[str, Any]:
    source = sources.source_of(ledger, recipe, "datasets", "datasets: type")
    limit = ledger.take("data.max_records", "datasets: split")
    layout = _layout(ledger, recipe, source)
    split = {"split": "train" if limit is None else f"train[:{limit}]"}
    entry = {"path": source.path, **({} if source.loader is None else {"ds_type": source.loader}), **split, **layout}
    written: dict[str, Any] = {"datasets": [entry], "train_on_inputs": recipe.objective != "sft"}
    ledger.take("objective", "train_on_inputs")
    ledger.take("data.validation", "test_datasets")
    ledger.take("data.validation_fraction", "val_set_size")
    if recipe.data.validation is not None:
        written |= {"test_datasets": [{**entry, "path": recipe.data.validation, "split": "train"}], "val_set_size": 0.0}
    else:
        written["val_set_size"] = recipe.data.validation_fraction
        if recipe.data.validation_fraction > 0:
            ledger.note("data.validation_fraction: axolotl splits by chance, not by content")
    return written


def _layout(ledger: Ledger, recipe: Recipe, source: Source) -> dict[str, Any]:
    """Return how axolotl lays the records out."""
    system = ledger.take("data.system_prompt", "datasets: type: system_prompt")
    given = {} if system is None else {"system_prompt": system}
    match source.format:
        case "text":
            return {"type": "completion", "field": source.field("text")}
        case "alpaca":
            ledger.note(
                "data.format: axolotl writes Alpaca's prompts; tunewise takes the model's chat template if it has one"
            )
            fields = {"instruction": "field_instruction", "input": "field_input", "output": "field_output"}
            named = {fields[ours]: theirs for ours, theirs in source.fields.items() if ours in fields}
            if not source.renamed and system is None:
                return {"type": "alpaca"}
            instruct = "### Instruction:\n{instruction}\n\n"
            return {
                "type": {
                    **given, **named, "format": instruct + "### Input:\n{input}\n\n### Response:\n",
                    "no_input_format": instruct + "### Response:\n",
                }
            }  # fmt: skip
        case "prompt-completion":
            ledger.note("data.format: axolotl joins prompt and completion; tunewise takes the chat template if any")
            names = {"field_instruction": source.field("prompt"), "field_output": source.field("completion")}
            return {"type": {**given, **names, "format": "{instruction}", "no_input_format": "{instruction}"}}
        case _:
            if system is not None:
                ledger.miss("data.system_prompt", "axolotl's chat_template adds no system message; write it yourself")
            ours, role, content = (
                ("messages", "role", "content") if source.format == "messages" else ("conversations", "from", "value")
            )
            return {
                "type": "chat_template",
                "field_messages": source.field(ours),
                "message_property_mappings": {"role": role, "content": content},
                "roles_to_train": ["assistant"],
                "train_on_eos": "turn",
            }


def _packing(ledger: Ledger, recipe: Recipe) -> dict[str, Any]:
    packing, longest = recipe.get(Packing), recipe.data.max_length
    ledger.take("data.max_length", "sequence_len")
    policy = str(ledger.take("data.too_long", "excess_length_strategy"))
    length = longest if packing is None else packing.row_tokens
    written = {"sequence_len": length, "excess_length_strategy": _EXCESS.get(policy, "truncate")}
    if policy == "split":
        ledger.miss("data.too_long", "axolotl splits plain texts ('completion') only; other documents are cut")
    if packing is None:
        return written | {"sample_packing": False, "pad_to_sequence_len": False}
    ledger.take("packing", "sample_packing")
    ledger.take("packing.row_tokens", "sequence_len")
    if length != longest:
        ledger.miss("data.max_length", f"with packing axolotl has one length for rows and documents: {length}")
    ledger.miss("packing.pad_to", "axolotl pads every packed row to sequence_len")
    return written | {"sample_packing": True, "eval_sample_packing": True, "pad_to_sequence_len": True}


def _warmup(ledger: Ledger) -> dict[str, Any]:
    warmup = ledger.take("training.warmup", "warmup_ratio, warmup_steps")
    return {"warmup_ratio": warmup} if 0 < warmup < 1 else {"warmup_steps": int(warmup)}


def _adapter(ledger: Ledger, recipe: Recipe) -> dict[str, Any]:
    freeze, lora, quantize = recipe.get(Freeze), recipe.get(LoRA), recipe.get(Quantize)
    if freeze is not None:
        ledger.take("freeze", "unfrozen_parameters")
        ledger.take("freeze.train", "unfrozen_parameters")
        return {"unfrozen_parameters": [_expression(pattern) for pattern in freeze.train]}
    if lora is None:
        return {}
    ledger.take("lora", "adapter")
    targets = peft_targets(ledger, lora, "lora_target_modules, lora_target_linear", "peft_layers_to_transform")
    ledger.need("lora.exclude_modules", (), otherwise="axolotl has no option that leaves modules out; list the others")
    four_bits = quantize is not None and quantize.kind not in ("int8", "fp8")
    written = {
        "adapter": "qlora" if four_bits else "lora",
        "lora_r": ledger.take("lora.rank", "lora_r"),
        "lora_alpha": integer_alpha(ledger, lora, "lora_alpha"),
        "lora_dropout": ledger.take("lora.dropout", "lora_dropout"),
        "peft_use_rslora": ledger.take("lora.use_rslora", "peft_use_rslora"),
        **({"lora_target_linear": True} if is_all_linear(lora) else {"lora_target_modules": targets}),
    }
    if lora.layers_to_transform is not None:
        written["peft_layers_to_transform"] = list(lora.layers_to_transform)
    if lora.init == "loftq":
        ledger.miss("lora.init", "axolotl's LoftQ quantizes the base itself, in another way; written as plain LoRA")
    elif ledger.take("lora.init", "peft_init_lora_weights") != "kaiming":
        written["peft_init_lora_weights"] = lora.init
    if ledger.take("lora.lora_plus_ratio", "loraplus_lr_ratio") is not None:
        written["loraplus_lr_ratio"] = lora.lora_plus_ratio
    if ledger.take("lora.modules_to_save", "lora_modules_to_save"):
        written["lora_modules_to_save"] = list(lora.modules_to_save)
    return written


def _expression(pattern: str) -> str:
    """Turn a shell pattern into axolotl's kind of regular expression, in which only ".+" is not a literal dot."""
    pieces = {"*": "(?:.+)?", "?": r"\S", ".": ".", "[": "[", "]": "]", "!": "^", "-": "-"}
    return "^" + "".join(pieces.get(letter) or re.escape(letter) for letter in pattern) + "$"


def _quantization(ledger: Ledger, recipe: Recipe) -> dict[str, Any]:
    quantize = recipe.get(Quantize)
    if quantize is None:
        return {}
    ledger.take("quantize", "load_in_4bit, load_in_8bit")
    ledger.take("quantize.kind", "bnb_config_kwargs: bnb_4bit_quant_type")
    ledger.take("quantize.double_quant", "bnb_config_kwargs: bnb_4bit_use_double_quant")
    ledger.need(
        "quantize.compute", "dequantize", otherwise="bitsandbytes' LLM.int8 keeps columns of outliers in 16 bits"
    )
    ledger.need("quantize.head_compute", "dense", otherwise="axolotl computes the loss with the head as it is")
    ledger.need("quantize.block_size", None, 64, otherwise="bitsandbytes' blocks in transformers are 64 weights long")
    skipped = list(ledger.take("quantize.skip_modules", "bnb_config_kwargs: llm_int8_skip_modules"))
    if quantize.kind in ("int8", "fp8"):
        ledger.miss("quantize.kind", "axolotl has bitsandbytes' LLM.int8, which also rounds the inputs")
        if skipped != [HEAD]:
            ledger.miss("quantize.skip_modules", "with 8 bits axolotl leaves out the output head only")
        return {"load_in_8bit": True}
    options: dict[str, Any] = {
        "bnb_4bit_quant_type": quantize.kind,
        "bnb_4bit_use_double_quant": quantize.double_quant is not False,
    }
    if skipped != [HEAD]:
        options["llm_int8_skip_modules"] = skipped
    return {"load_in_4bit": True, "bnb_config_kwargs": options}


def _precision(ledger: Ledger, recipe: Recipe) -> dict[str, Any]:
    precision = recipe.get(Precision) or Precision()
    ledger.take("precision", "bf16, fp16, tf32")
    ledger.take("precision.compute", "bf16, fp16, tf32")
    ledger.take("precision.trainable", "peft_autocast_adapter_dtype")
    keeps_masters = precision.trainable == "fp32"
    written: dict[str, Any] = {
        "bf16": precision.compute == "bf16",
        "fp16": precision.compute == "fp16",
        "tf32": precision.compute == "tf32",
    }
    if recipe.get(LoRA) is not None:
        written["peft_autocast_adapter_dtype"] = keeps_masters
    elif precision.storage_dtype.itemsize == 2 and keeps_masters:
        ledger.miss(
            "precision.trainable", f"axolotl loads the weights in {precision.compute} and trains these, without masters"
        )
    return written


def _memory(ledger: Ledger, recipe: Recipe, rows: StepRows) -> dict[str, Any]:
    ledger.take("attention", "attn_implementation")
    kind = str(ledger.take("attention.kind", "attn_implementation"))
    if kind == "per_document":
        ledger.note("attention.kind: axolotl's sdpa takes packed rows through torch's varlen_attn where it can")
    written: dict[str, Any] = {"attn_implementation": ATTENTIONS[kind]}
    written |= trainer.checkpointing_arguments(ledger, recipe)
    if ledger.has("checkpointing") and ledger.take("checkpointing.policy", "selective_checkpointing") == "selective":
        has_adapter = bool(recipe.in_slot(Slot.ADAPTER)) and recipe.get(Freeze) is None
        written["selective_checkpointing"] = True if has_adapter else {"save": _PRODUCTS}
        if has_adapter:
            ledger.miss("checkpointing.policy", "beside an adapter axolotl keeps the attention's outputs only")
    return written | _loss(ledger, recipe, rows)


def _loss(ledger: Ledger, recipe: Recipe, rows: StepRows) -> dict[str, Any]:
    loss = recipe.get(SupervisedLoss)
    if loss is None:
        ledger.take("whole_loss", "chunked_cross_entropy")
        return {"chunked_cross_entropy": False}
    ledger.take("supervised_loss", "plugins, chunked_cross_entropy")
    if recipe.device == "cuda":
        ledger.miss("supervised_loss.chunk_tokens", "Liger's fused loss chooses its chunks itself")
        ledger.note("supervised_loss: written as Liger's fused linear cross entropy, which takes unlearnt tokens too")
        return {"plugins": ["axolotl.integrations.liger.LigerPlugin"], "liger_fused_linear_cross_entropy": True}
    chunks = max(1, -(-rows.micro_batch_size * rows.row_tokens // loss.chunk_tokens))
    ledger.take("supervised_loss.chunk_tokens", "chunked_cross_entropy_num_chunks")
    ledger.note("supervised_loss: axolotl's chunked loss has all logits in memory and splits their upcast only")
    return {"chunked_cross_entropy": True, "chunked_cross_entropy_num_chunks": chunks}


def _evaluation(ledger: Ledger, recipe: Recipe) -> dict[str, Any]:
    written = trainer.evaluation_arguments(ledger, recipe, "early_stopping_patience")
    rows = written.pop("per_device_eval_batch_size", None)
    if rows is not None:
        ledger.mapped["evaluation.micro_batch_size"] = "eval_batch_size"
        written["eval_batch_size"] = rows
    return written
