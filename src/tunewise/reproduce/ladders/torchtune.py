"""torchtune's memory table (documentation "Memory optimization overview"): a cumulative ladder.

Llama-3.2-3B, full fine-tuning in pure bf16, batch 2, sequence 4096, A100. Each row adds one method to the one before,
so single effects are not published; rows "alone" of ours measure them over the packed row.
"""

from __future__ import annotations

from typing import Any

from tunewise.reproduce.ladders.ladder import Ladder, Published, Row, Whole

SMALL = {
    "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": 16384, "tie_word_embeddings": True,
}  # fmt: skip

LLAMA_3_2_3B = {
    "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
}  # fmt: skip

CHUNKS = 8
"""torchtune cuts the logits into so many chunks."""

BASE, PACKED = "baseline, batch 2", "+ packed"


def ladder(device: str) -> Ladder:
    """Return the ladder at the scale of `device`: "cpu" or "cuda"."""
    row_tokens = 512 if device == "cpu" else 4096
    lengths = (32, 64, 64, 96) if device == "cpu" else (64, 128, 128, 192)
    return Ladder(
        name="torchtune",
        source="docs.pytorch.org/torchtune, 'Memory Optimization Overview', table of Llama-3.2-3B",
        setting="Llama-3.2-3B, bf16, batch 2, packed rows of 4096, A100",
        units=("tokens/s", "GiB"),
        start=PACKED,
        rows=_rows(row_tokens, sum(lengths) // len(lengths)),
        wholes=(
            Whole("+ 8-bit AdamW", ("chunked loss", "checkpointing", "update in backward", "8-bit AdamW")),
            Whole("+ LoRA", ("chunked loss", "checkpointing", "8-bit AdamW", "LoRA")),
            Whole("+ QLoRA", ("chunked loss", "checkpointing", "8-bit AdamW", "LoRA", "NF4")),
        ),
        config=SMALL if device == "cpu" else LLAMA_3_2_3B,
        document_lengths=lengths,
        training={"steps": 8, "learning_rate": 2e-5, "max_grad_norm": None, "schedule": "constant"},
        differences=(
            f"packed rows of {row_tokens} tokens" + (" instead of 4096" if device == "cpu" else ""),
            f"documents of random tokens, {min(lengths)} to {max(lengths)} long, all of them learnt",
            "our packed rows attend per document without a mask; torchtune's with a block mask (flex attention)",
            "torch.compile and activation offloading have no counterpart here, so their rows are not rebuilt",
            "the rows with LoRA go without update in backward, as torchtune's LoRA recipe does",
        ),
    )


def _rows(row_tokens: int, mean_length: int) -> tuple[Row, ...]:
    full = _Recipes(row_tokens, mean_length)
    no_compile = "torch.compile: no counterpart in tunewise, not rebuilt"
    return (
        Row(BASE, Published(2091, 25.5), full.recipe(packed=False), steps=12),
        Row(
            PACKED, Published(7075, 60.0), full.recipe(), BASE, "packing",
            note="a step holds two full rows, not two documents",
        ),
        Row("+ compile", Published(8998, 51.0), None, PACKED, "compile", note=no_compile),
        Row(
            "+ chunked loss", Published(9174, 42.9), full.recipe(chunked=True), PACKED, "chunked loss", True,
            "published over the row with compile, ours over the packed one",
        ),
        Row(
            "+ checkpointing", Published(7210, 24.9), full.recipe(chunked=True, checkpointing=True),
            "+ chunked loss", "checkpointing",
        ),
        Row(
            "+ update in backward", Published(7309, 23.1),
            full.recipe(chunked=True, checkpointing=True, in_backward=True), "+ checkpointing", "update in backward",
        ),
        Row(
            "+ offloaded activations", Published(7301, 21.8), None, "+ update in backward", "offloading",
            note="no counterpart in tunewise yet, not rebuilt",
        ),
        Row(
            "+ 8-bit AdamW", Published(6960, 17.6),
            full.recipe(chunked=True, checkpointing=True, in_backward=True, optimizer="adamw_8bit"),
            "+ update in backward", "8-bit AdamW", note="published over the row with offloading",
        ),
        Row(
            "+ LoRA", Published(8210, 8.5),
            full.recipe(chunked=True, checkpointing=True, optimizer="adamw_8bit", lora=True), "+ 8-bit AdamW", "LoRA",
        ),
        Row(
            "+ QLoRA", Published(8035, 4.6),
            full.recipe(chunked=True, checkpointing=True, optimizer="adamw_8bit", lora=True, nf4=True),
            "+ LoRA", "NF4",
        ),
        *full.alone(),
    )  # fmt: skip


class _Recipes:
    """Recipes of the ladder for rows of one length."""

    def __init__(self, row_tokens: int, mean_length: int) -> None:
        self.row_tokens = row_tokens
        self.documents = 2 * row_tokens // mean_length

    def alone(self) -> list[Row]:
        """The rows that the table does not have: each method alone over the packed row."""
        return [
            Row("checkpointing alone", None, self.recipe(checkpointing=True), PACKED, "checkpointing", True),
            Row("update in backward alone", None, self.recipe(in_backward=True), PACKED, "update in backward", True),
            Row("8-bit AdamW alone", None, self.recipe(optimizer="adamw_8bit"), PACKED, "8-bit AdamW", True),
            Row("LoRA alone", None, self.recipe(lora=True), PACKED, "LoRA", True),
            Row("QLoRA alone", None, self.recipe(lora=True, nf4=True), "LoRA alone", "NF4", True),
        ]

    def recipe(
        self,
        *,
        packed: bool = True,
        chunked: bool = False,
        checkpointing: bool = False,
        in_backward: bool = False,
        optimizer: str = "adamw",
        lora: bool = False,
        nf4: bool = False,
    ) -> dict[str, Any]:
        methods: dict[str, Any] = {
            "precision": {"compute": "bf16", "trainable": "same"},
            "whole_loss": {},
            optimizer: {"in_backward": True} if in_backward else {},
        }
        if chunked:
            del methods["whole_loss"]
            methods["supervised_loss"] = {"chunk_tokens": 2 * self.row_tokens // CHUNKS}
        if packed:
            methods["packing"] = {"row_tokens": self.row_tokens}
        if checkpointing:
            methods["checkpointing"] = {}
        if lora:
            methods["lora"] = {"rank": 8, "alpha": 16}
        if nf4:
            methods["quantize"] = {"kind": "nf4"}
        documents = self.documents if packed else 2  # packed ones fill two rows exactly, see `Ladder.document_lengths`
        return {"methods": methods, "batch": {"documents": documents, "micro_batch_size": 2}}
