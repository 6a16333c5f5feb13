"""How many rows a tool must put into a step so that it learns from as much at once as the recipe does.

tunewise's global batch is a number of documents; other tools count rows: `batch size x accumulation`. Without packing
a row is a document. With packing a row holds several, a step of the tool is a fixed number of rows, and the number of
documents in it varies; the rows are chosen so that a step holds about as many tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tunewise.export.peers.config import Facts
from tunewise.export.peers.ledger import Ledger
from tunewise.methods import Packing
from tunewise.recipe import Recipe


@dataclass(frozen=True)
class StepRows:
    """A step of the tool: `micro_batch_size` rows at once, `accumulation` times; a row has up to `row_tokens`."""

    micro_batch_size: int
    accumulation: int
    row_tokens: int


def step_rows(ledger: Ledger, recipe: Recipe, facts: Facts, micro_name: str, accumulation_name: str) -> StepRows:
    """Return the step's rows, account for `batch` and `packing.row_tokens`, and say what differs."""
    micro = int(ledger.take("batch.micro_batch_size", micro_name))
    ledger.take("batch.gradient_accumulation_steps", accumulation_name)
    documents, supervised = recipe.batch.documents, recipe.batch.supervised_tokens
    ledger.take("batch.documents", accumulation_name)
    ledger.take("batch.supervised_tokens", accumulation_name)
    packing, longest = recipe.get(Packing), recipe.data.max_length or 0
    row_tokens = longest if packing is None or packing.row_tokens is None else packing.row_tokens
    if packing is None and documents is not None:
        accumulation = math.ceil(documents / micro)
        if accumulation * micro != documents:
            ledger.miss(
                "batch.documents", f"{ledger.peer} takes {micro} x {accumulation} = {accumulation * micro} rows a step"
            )
        return StepRows(micro, accumulation, row_tokens)
    tokens, source = _tokens(documents, supervised, facts, longest)
    rows = max(1, round(tokens / row_tokens))
    micro = min(micro, rows)
    accumulation = max(1, round(rows / micro))
    setting = "batch.documents" if documents is not None else "batch.supervised_tokens"
    kind = "rows" if packing is None else "packed rows"
    ledger.miss(
        setting,
        f"{ledger.peer} takes a fixed number of {kind} a step, here {micro} x {accumulation} of up to {row_tokens} "
        f"tokens, {source}",
    )
    return StepRows(micro, accumulation, row_tokens)


def _tokens(documents: int | None, supervised: int | None, facts: Facts, longest: int) -> tuple[float, str]:
    """Return about how many tokens a step of the recipe has, and in words where that is from."""
    if facts.tokens_per_step is not None:
        return facts.tokens_per_step, f"as many as {facts.tokens_per_step:.0f} tokens fill, which a step has on average"
    if supervised is not None:
        return float(supervised), "as if every token were learnt, because the share of those is not known here"
    return float((documents or 1) * longest), "as if every document were of the full length; count yours"
