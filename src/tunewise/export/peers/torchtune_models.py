"""Which of torchtune's model builders makes a given model.

Read from torchtune 0.6.1: `models/*/_model_builders.py` (the shapes) and `recipes/configs/*` (tokenizer, type of
checkpoint). A builder is taken only when every dimension agrees, since its weights would not fit otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from tunewise.errors import InputError


@dataclass(frozen=True)
class Family:
    """Builders that share their tokenizer and their checkpoints' form.

    Attributes:
        module: below `torchtune.models`.
        model_type: Hugging Face's.
        checkpoint: torchtune's ModelType.
        tokenizer: its component below `torchtune.models`.
        tokenizer_files: argument -> file in the model's folder.
        context: what tells families of equal shapes apart: Hugging Face's max_position_embeddings, None for any.
        lora_on_head: whether its LoRA builders know `apply_lora_to_output`.
    """

    module: str
    model_type: str
    checkpoint: str
    tokenizer: str
    tokenizer_files: tuple[tuple[str, str], ...]
    context: int | None = None
    lora_on_head: bool = True


@dataclass(frozen=True)
class Builder:
    """A builder: its name after the family's, and its shape."""

    family: Family
    name: str
    shape: tuple[int, int, int, int]  # hidden_size, num_hidden_layers, intermediate_size, vocab_size


_SENTENCEPIECE = (("path", "tokenizer.model"),)
_TIKTOKEN = (("path", "original/tokenizer.model"),)
_BPE = (("path", "vocab.json"), ("merges_file", "merges.txt"))

_LLAMA2 = Family("llama2", "llama", "LLAMA2", "llama2.llama2_tokenizer", _SENTENCEPIECE)
_CODE = Family("code_llama2", "llama", "LLAMA2", "llama2.llama2_tokenizer", _SENTENCEPIECE)
_LLAMA3 = Family("llama3", "llama", "LLAMA3", "llama3.llama3_tokenizer", _TIKTOKEN, 8192)
_LLAMA31 = Family("llama3_1", "llama", "LLAMA3", "llama3.llama3_tokenizer", _TIKTOKEN, 131072)
_LLAMA32 = Family("llama3_2", "llama", "LLAMA3_2", "llama3.llama3_tokenizer", _TIKTOKEN, 131072)
_MISTRAL = Family("mistral", "mistral", "MISTRAL", "mistral.mistral_tokenizer", _SENTENCEPIECE)
_GEMMA = Family("gemma", "gemma", "GEMMA", "gemma.gemma_tokenizer", _SENTENCEPIECE, lora_on_head=False)
_GEMMA2 = Family("gemma2", "gemma2", "GEMMA2", "gemma.gemma_tokenizer", _SENTENCEPIECE, lora_on_head=False)
_PHI3 = Family("phi3", "phi3", "PHI3_MINI", "phi3.phi3_mini_tokenizer", _SENTENCEPIECE)
_PHI4 = Family(
    "phi4", "phi3", "PHI4", "phi4.phi4_tokenizer", (("vocab_path", "vocab.json"), ("merges_path", "merges.txt"))
)
_QWEN = Family("qwen2_5", "qwen2", "QWEN2", "qwen2_5.qwen2_5_tokenizer", _BPE)
_TIED_QWEN = Family("qwen2_5", "qwen2", "QWEN2", "qwen2_5.qwen2_5_tokenizer", _BPE, lora_on_head=False)

BUILDERS = (
    Builder(_LLAMA2, "llama2_7b", (4096, 32, 11008, 32000)),
    Builder(_LLAMA2, "llama2_13b", (5120, 40, 13824, 32000)),
    Builder(_LLAMA2, "llama2_70b", (8192, 80, 28672, 32000)),
    Builder(_CODE, "code_llama2_7b", (4096, 32, 11008, 32016)),
    Builder(_CODE, "code_llama2_13b", (5120, 40, 13824, 32016)),
    Builder(_CODE, "code_llama2_70b", (8192, 80, 28672, 32016)),
    Builder(_LLAMA3, "llama3_8b", (4096, 32, 14336, 128256)),
    Builder(_LLAMA3, "llama3_70b", (8192, 80, 28672, 128256)),
    Builder(_LLAMA31, "llama3_1_8b", (4096, 32, 14336, 128256)),
    Builder(_LLAMA31, "llama3_1_70b", (8192, 80, 28672, 128256)),
    Builder(_LLAMA31, "llama3_1_405b", (16384, 126, 53248, 128256)),
    Builder(_LLAMA32, "llama3_2_1b", (2048, 16, 8192, 128256)),
    Builder(_LLAMA32, "llama3_2_3b", (3072, 28, 8192, 128256)),
    Builder(_MISTRAL, "mistral_7b", (4096, 32, 14336, 32000)),
    Builder(_GEMMA, "gemma_2b", (2048, 18, 16384, 256000)),
    Builder(_GEMMA, "gemma_7b", (3072, 28, 24576, 256000)),
    Builder(_GEMMA2, "gemma2_2b", (2304, 26, 9216, 256000)),
    Builder(_GEMMA2, "gemma2_9b", (3584, 42, 14336, 256000)),
    Builder(_GEMMA2, "gemma2_27b", (4608, 46, 36864, 256000)),
    Builder(_PHI3, "phi3_mini", (3072, 32, 8192, 32064)),
    Builder(_PHI4, "phi4_14b", (5120, 40, 17920, 100352)),
    Builder(_TIED_QWEN, "qwen2_5_0_5b", (896, 24, 4864, 151936)),
    Builder(_TIED_QWEN, "qwen2_5_1_5b_base", (1536, 28, 8960, 151936)),
    Builder(_TIED_QWEN, "qwen2_5_3b", (2048, 36, 11008, 151936)),
    Builder(_QWEN, "qwen2_5_7b_base", (3584, 28, 18944, 152064)),
    Builder(_QWEN, "qwen2_5_14b_base", (5120, 48, 13824, 152064)),
    Builder(_QWEN, "qwen2_5_32b_base", (5120, 64, 27648, 152064)),
    Builder(_QWEN, "qwen2_5_72b_base", (8192, 80, 29568, 152064)),
)


def builder_for(config: PretrainedConfig) -> Builder:
    """Return the builder whose model has the configuration's type and dimensions.

    Raises:
        InputError: torchtune has none; names those of the same type, or the types that it knows.
    """
    text = config.get_text_config()
    names = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
    shape = tuple(getattr(text, name, None) for name in names)
    context = getattr(text, "max_position_embeddings", None)
    for builder in BUILDERS:
        family = builder.family
        if family.model_type == text.model_type and builder.shape == shape and family.context in (None, context):
            return builder
    known = sorted({each.name for each in BUILDERS if each.family.model_type == text.model_type})
    types = sorted({each.family.model_type for each in BUILDERS})
    dimensions = ", ".join(f"{name} {size}" for name, size in zip(names, shape, strict=True))
    there = f"of this type it has {', '.join(known)}" if known else f"it knows the types {', '.join(types)}"
    raise InputError(
        f"export torchtune: torchtune builds no '{text.model_type}' with {dimensions}; {there}. "
        "Export for another tool."
    )
