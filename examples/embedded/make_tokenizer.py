"""Make the tokenizer of the embedded model: a byte-level BPE of 4096 tokens, learnt from the standard library.

    python examples/embedded/make_tokenizer.py src/tunewise/embedded

It reads the same part of the library that the embedded model is pre-trained on, never the held-out part. Runs of
spaces are tokens of their own, because Python's indentation is most of what a small vocabulary would waste itself on.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tunewise.workload.stdlib_source import stdlib_texts

VOCAB_SIZE = 4096
BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
WORDS = r"\n[ \t]*|[ ]?[A-Za-z]+|[ ]?[^\sA-Za-z0-9]+|[0-9]|[ \t]+(?=\S)|\s+"


def main(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BEGIN, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((record.fields["text"] for record in stdlib_texts("train")), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)
    print(f"{len(wrapped)} tokens -> {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
