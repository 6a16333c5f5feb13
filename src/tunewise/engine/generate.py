"""Answers to many prompts: transformers' generation with its KV cache, prompts of similar length together.

Training's own attention takes no cache, so the model computes with SDPA (or eager) while it generates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tunewise.engine.step import autocast
from tunewise.layers.head import base_model_of
from tunewise.methods.method import Run
from tunewise.workload.model import quiet_transformers

BATCH_PROMPTS = 16

Progress = Callable[[int, int], None]
"""Called with (prompts answered, prompts)."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        max_new_tokens: an answer is cut there.
        temperature: 0 takes the likeliest token each time.
        num_samples: answers to each prompt; more than one needs a temperature.
        seed: of what is drawn.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    num_samples: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """One answer: its text without the token that ended it, whether it ended by itself, and its tokens with the end."""

    text: str
    ended: bool
    num_tokens: int
    ids: tuple[int, ...] = ()


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the tokens at which generation stops: those of generation_config.json, and the tokenizer's EOS."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return tuple(dict.fromkeys(token for token in (*listed, tokenizer.eos_token_id) if token is not None))


@torch.no_grad()
def generate(
    run: Run,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | None = None,
    progress: Progress = lambda done, total: None,
) -> list[list[Answer]]:
    """Answer every prompt, in the order given.

    Args:
        run: whose model generates, in evaluation mode.
        tokenizer: decodes the answers; its EOS and the model's generation configuration end them.
        prompts: token ids.
        sampling: how; greedily where nothing is said.
        progress: told after each batch.

    Returns:
        For each prompt its `sampling.num_samples` answers.
    """
    sampling = sampling or Sampling()
    shortest_first = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    answers: list[list[Answer]] = [[] for _ in prompts]
    was_training = run.model.training
    run.model.eval()
    try:
        with cached_attention(run), torch.random.fork_rng(), quiet_transformers("."):
            torch.manual_seed(sampling.seed)
            for start in range(0, len(prompts), BATCH_PROMPTS):
                batch = shortest_first[start : start + BATCH_PROMPTS]
                for number, found in zip(
                    batch, _batch(run, tokenizer, [prompts[i] for i in batch], sampling), strict=True
                ):
                    answers[number] = found
                progress(min(start + BATCH_PROMPTS, len(prompts)), len(prompts))
    finally:
        run.model.train(was_training)
    return answers


def _batch(
    run: Run, tokenizer: PreTrainedTokenizerBase, prompts: list[Sequence[int]], sampling: Sampling
) -> list[list[Answer]]:
    ends = stop_ids(base_model_of(run.model), tokenizer)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or (0,))[0]
    prompts = [prompt or (padding,) for prompt in prompts]  # something must stand there to go on from
    width = max(len(prompt) for prompt in prompts)
    ids_RL = torch.full((len(prompts), width), padding)
    mask_RL = torch.zeros_like(ids_RL)
    for row, prompt in enumerate(prompts):  # on the left, so that all answers begin in the same column
        ids_RL[row, width - len(prompt) :] = torch.tensor(prompt)
        mask_RL[row, width - len(prompt) :] = 1
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampling.temperature > 0.0,
        temperature=sampling.temperature if sampling.temperature > 0.0 else None,
        top_k=0 if sampling.temperature > 0.0 else None,
        num_return_sequences=sampling.num_samples,
        eos_token_id=list(ends) or None,
        pad_token_id=padding,
        use_cache=True,
    )
    with autocast(run):
        found = run.model.generate(  # type: ignore[operator]
            input_ids=ids_RL.to(run.device), attention_mask=mask_RL.to(run.device), generation_config=config
        )
    rows = [_answer(row[width:].tolist(), ends, tokenizer) for row in found.cpu()]
    size = sampling.num_samples
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _answer(ids: list[int], ends: tuple[int, ...], tokenizer: PreTrainedTokenizerBase) -> Answer:
    end = next((place for place, token in enumerate(ids) if token in ends), None)
    kept = ids if end is None else ids[:end]
    text = str(tokenizer.decode(kept, skip_special_tokens=True))
    return Answer(text, end is not None, len(kept), tuple(ids if end is None else ids[: end + 1]))


@contextmanager
def cached_attention(run: Run) -> Iterator[None]:
    """Give the model an attention that takes a cache, and its own back afterwards."""
    model = base_model_of(run.model)
    implementation = model.config._attn_implementation
    run.documents.lengths = None
    if implementation.startswith("tunewise_per_document"):
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)
