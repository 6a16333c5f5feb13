"""What is trained in the speed benchmarks: a random Llama of some size, and real records of some length.

    short   uneven code records of some hundred tokens, an instruction before each answer
    long    documents of 2,048 to 8,192 tokens: the same records, end to end
    vocab   the short records on a model with 151,936 rows of vocabulary

The records are `../shared/data`'s, tokenized with tunewise's embedded tokenizer (4,096 tokens); the models have random
weights in the shape of SmolLM2-135M with fewer blocks, because no real weights of this size are at hand. Speed and
memory do not depend on the values; losses are compared between tools, on the same values.
"""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig

from tunewise.workload.corpus import Corpus
from tunewise.workload.diagnosis import Diagnosis, Statistics
from tunewise.workload.model import EMBEDDED_FOLDER, random_model
from tunewise.workload.prepare import Prepared

_ROOTS = Path(__file__).resolve().parents[3:5]  # beside the repository, or beside the folder of its worktrees
SHARED = next((root / "shared" / "data" for root in _ROOTS if (root / "shared").is_dir()), _ROOTS[0] / "shared/data")
FILES = (("gpteacher/codegen_instruct.jsonl.gz", "instruction", "response"), ("code/mbpp.jsonl.gz", "text", "code"))
WORKLOADS = ("short", "long", "vocab")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Size:
    """The shape of a Llama: hidden size, blocks, query and key-value heads (of 64), width of the MLP."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int


SIZES = {
    "15M": Size(256, 8, 4, 2, 688),
    "70M": Size(576, 12, 9, 3, 1536),  # SmolLM2-135M with 12 of its 30 blocks
    "135M": Size(576, 30, 9, 3, 1536),  # SmolLM2-135M
    "360M": Size(960, 32, 15, 5, 2560),  # SmolLM2-360M
}
VOCAB_SIZE = {"15M": 4096}
LARGE_VOCAB_SIZE = 151_936


def config_of(size: str, workload: str) -> LlamaConfig:
    """Return the model's configuration."""
    return LlamaConfig(
        **asdict(SIZES[size]),
        head_dim=64,
        vocab_size=LARGE_VOCAB_SIZE if workload == "vocab" else VOCAB_SIZE.get(size, 49_152),
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def write_model(folder: Path, size: str, workload: str) -> None:
    """Write a model folder as the hub has them: bf16 weights, configuration, tokenizer."""
    folder.mkdir(parents=True)
    config = config_of(size, workload)
    random_model(config, torch.bfloat16, seed=0).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED_FOLDER / name, folder / name)


def records() -> list[tuple[str, str]]:
    """Return (instruction, answer) of the shared code records, shuffled."""
    found = []
    for name, prompt, answer in FILES:
        with gzip.open(SHARED / name, "rt", encoding="utf-8") as lines:
            found += [(row[prompt], row[answer]) for row in map(json.loads, lines)]
    order = np.random.default_rng(0).permutation(len(found))
    return [found[index] for index in order]


def corpus_of(workload: str, count: int, first: int = 0) -> Corpus:
    """Return `count` documents from number `first` on.

    In short ones the answer is learnt. Long ones are cut out of all records end to end, and every token is learnt.
    """
    tokenizer = Tokenizer.from_file(str(EMBEDDED_FOLDER / "tokenizer.json"))
    if workload == "long":
        lengths = np.random.default_rng(1).integers(2048, 8193, size=first + count)
        stream: list[int] = []
        for prompt, answer in records():
            stream += [*tokenizer.encode(prompt + "\n" + answer).ids, 1]
            if len(stream) > lengths.sum():
                break
        ends = np.cumsum(lengths)
        documents = [(stream[end - n : end], [True] * int(n)) for n, end in zip(lengths, ends, strict=True)][first:]
    else:
        documents = []
        for prompt, answer in records()[first : first + count]:
            asked, told = tokenizer.encode(prompt + "\n").ids, [*tokenizer.encode(answer).ids, 1]
            documents.append(([*asked, *told][:2048], ([False] * len(asked) + [True] * len(told))[:2048]))
    return Corpus.from_documents(documents, [f"{workload}:{number}" for number in range(len(documents))])


def prepared(train: Corpus, validation: Corpus) -> Prepared:
    """Return the documents as a training takes them."""
    size, supervised = len(train.token_ids), int(train.is_supervised.sum())
    statistics = Statistics(len(train), len(train), size, supervised, (), 0.0)
    return Prepared(train, validation, [], Diagnosis((), statistics), train.fingerprint)


def as_lists(corpus: Corpus) -> list[dict[str, list[int]]]:
    """Write a corpus as pre-tokenized records: labels of -100 are not learnt."""
    found = []
    for index in range(len(corpus)):
        ids, marks = corpus.document(index)
        labels = [int(token) if mark else -100 for token, mark in zip(ids, marks, strict=True)]
        found.append({"input_ids": ids.tolist(), "labels": labels})
    return found


def recipe_mapping(method: str, model: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return our recipe for a method: LoRA r16 on all linear layers, over NF4, everything, or from scratch."""
    methods: dict[str, Any] = {"packing": {}}
    if method in ("lora", "qlora"):
        methods["lora"] = {"rank": 16, "alpha": 32}
    if method == "qlora":
        methods["quantize"] = {"kind": "nf4"}
    return {
        "model": {"name": model, "weights": "random" if method == "scratch" else "pretrained"},
        "data": {"source": "made", "max_length": 8192},
        "objective": "pretrain" if method == "scratch" else "sft",
        "methods": {**methods, **(changes or {})},
        "training": {"learning_rate": 1e-3 if method in ("lora", "qlora") else 2e-4, "schedule": "constant"},
        "device": "cpu",
    }
