"""Small byte-level tokenizers with and without chat templates, made on the spot."""

from __future__ import annotations

import functools

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
GENERATION_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"

CHATML = "{% for m in messages %}" + TURN + "{% endfor %}" + GENERATION_PROMPT

CHATML_WITH_GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}" + GENERATION_PROMPT
)
"""The end of the turn stands outside of the generation block, as in templates of the wild."""

THINKING = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% set answer = m['content'].split('</think>')[-1].lstrip() %}"
    "{% if loop.last %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + answer + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>assistant\n' + answer + '<|im_end|>\n' }}{% endif %}"
    "{% else %}" + TURN + "{% endif %}{% endfor %}" + GENERATION_PROMPT
)
"""Like Qwen3's: the last answer begins with an empty thought, earlier ones lose theirs."""

INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
"""Like Mistral's: no generation prompt, and other roles are refused."""

DROPS_SYSTEM = "{% for m in messages %}{% if m['role'] != 'system' %}" + TURN + "{% endif %}{% endfor %}"

ENDLESS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
"""No special token ends a turn."""

_TEXT = [
    "Below is an instruction that describes a task. Write a response that completes the request.",
    "What is the sum of two and three? The answer is five, because two and three make five.",
    "def add(a, b):\n    return a + b\n### User:\n### Assistant:\n<|im_start|>user assistant system",
] * 3


@functools.cache
def _backend(adds_bos: bool) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return str(tokenizer.to_str())


def tiny_tokenizer(
    chat_template: str | None = None, adds_bos: bool = True, eos: str | None = "</s>"
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of 400 tokens; <s> is 1, </s> is 2, <|im_end|> is 4."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(adds_bos)), bos_token="<s>", eos_token=eos
    )
    if chat_template:
        tokenizer.chat_template = chat_template
    return tokenizer
