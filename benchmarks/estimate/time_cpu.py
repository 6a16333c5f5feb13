"""Predicted tokens per second against the training's, on this machine's CPU.

    python benchmarks/estimate/time_cpu.py --json OUT [--seed N] [--rows N] [--seconds N]

Every row is a recipe for a random model of 8 to 24 blocks and documents of uneven lengths. The prediction is
`tunewise plan --measure`'s (`planner.rehearsal`): the step timed on two models of fewer blocks, or on the whole model
where it is small. Then the engine does global steps of training with the whole model, each of other documents, and the
median of their tokens per second is what is compared: a machine that stands still for a second is nobody's recipe.
Each row has a process of its own. The interval's width was set on the rows of seed 0 (`rehearsal.OFF_BY`), so it is
judged a second time, each row by an interval that the other rows alone have set ("inside_when_left_out"). A processor
that does not multiply bf16 computes rows called mixed and pure in fp32.

With --seconds the call begins no row after so long (exit code 75), and the same command goes on: rows are kept in OUT.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cpu_cases import CPU
from transformers import AutoConfig, PretrainedConfig

from tunewise.engine.build import build
from tunewise.engine.measure import Measuring
from tunewise.methods import complete
from tunewise.methods.precision import Precision, default_compute
from tunewise.methods.reading import recipe_from_mapping
from tunewise.planner.load import Load
from tunewise.planner.rehearsal import OFF_BY, rehearse
from tunewise.recipe import Recipe
from tunewise.workload.corpus import Corpus
from tunewise.workload.model import random_model

UNFINISHED = 75
WARM_UP, STEPS = 2, 7

SIZES: dict[str, dict[str, int]] = {
    "256": {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 2},
    "384": {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6, "num_key_value_heads": 6},
    "576": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    "1024": {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4},
}
ARCHITECTURES = ("llama", "qwen2", "mistral", "gpt2", "qwen3")
DEPTHS = (8, 10, 12, 16)
VOCABULARIES = (4096, 16384)

HALF = default_compute(CPU)
_BF16, _FP32 = {"precision": {"compute": HALF}}, {"precision": {"compute": "fp32"}}
_PURE = {"precision": {"compute": HALF, "trainable": "same"}}
_LORA, _NF4, _PACKED = {"lora": {"rank": 16}}, {"quantize": {"kind": "nf4"}}, {"packing": {"row_tokens": 1024}}
COMBINATIONS: dict[str, dict[str, Any]] = {
    "full fp32": _FP32,
    "full fp32 adafactor": _FP32 | {"adafactor": {}},
    "full mixed": _BF16,
    "full mixed packed": _BF16 | _PACKED,
    "full pure checkpointing": _PURE | {"checkpointing": {}},
    "lora fp32": _FP32 | _LORA,
    "lora mixed": _BF16 | _LORA,
    "lora mixed packed": _BF16 | _LORA | _PACKED,
    "lora mixed checkpointing": _BF16 | _LORA | {"checkpointing": {}},
    "lora mixed whole sdpa": _BF16 | _LORA | {"whole_loss": {}, "attention": {"kind": "sdpa"}},
    "nf4 lora mixed": _BF16 | _LORA | _NF4,
    "nf4 lora mixed packed checkpointing": _BF16 | _LORA | _NF4 | _PACKED | {"checkpointing": {}},
}
PER_COMBINATION = 3


@dataclass(frozen=True)
class Case:
    """What is trained."""

    architecture: str
    size: str
    depth: int
    vocabulary: int
    combination: str
    documents: int
    micro_batch_size: int
    typical_length: int

    def config(self) -> PretrainedConfig:
        """Return the model's configuration."""
        sizes = SIZES[self.size]
        if self.architecture == "gpt2":
            sizes = {"n_embd": sizes["hidden_size"], "n_head": sizes["num_attention_heads"], "n_positions": 2048}
        options = {"vocab_size": self.vocabulary, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **sizes}
        return AutoConfig.for_model(self.architecture, num_hidden_layers=self.depth, **options)

    def recipe(self, config: PretrainedConfig) -> Recipe:
        """Return the complete recipe."""
        mapping = {
            "model": {"name": self.architecture, "weights": "random"},
            "data": {"source": "none"},
            "methods": COMBINATIONS[self.combination],
            "batch": {"documents": self.documents, "micro_batch_size": self.micro_batch_size},
            "device": "cpu",
        }
        return complete(recipe_from_mapping(mapping, "benchmark"), config, CPU)

    def corpus(self, vocab_size: int) -> Corpus:
        """Return random documents of uneven lengths (log-normal), 60 % of their tokens learnt."""
        generator = np.random.default_rng(self.depth * 1000 + self.typical_length)
        count = self.documents * (WARM_UP + STEPS + 4)
        lengths = np.clip(generator.lognormal(np.log(self.typical_length), 0.5, count), 8, 1000).astype(int)
        documents = [
            (generator.integers(3, vocab_size, length).astype(np.int32), generator.random(length) < 0.6)
            for length in lengths
        ]
        return Corpus.from_documents(documents, ["random"] * count)


def cases(seed: int = 0) -> list[Case]:
    """Draw the rows: every combination of methods several times, all else at random; always the same."""
    draw, found = random.Random(seed), []
    for combination in COMBINATIONS:
        for _ in range(PER_COMBINATION):
            is_full = combination.startswith("full")
            found.append(
                Case(
                    architecture=draw.choice(ARCHITECTURES),
                    size=draw.choice(("256", "384") if is_full else tuple(SIZES)),
                    depth=draw.choice(DEPTHS[:3] if is_full else DEPTHS),
                    vocabulary=draw.choice(VOCABULARIES),
                    combination=combination,
                    documents=draw.choice((4, 6, 8)),
                    micro_batch_size=draw.choice((1, 2, 4)),
                    typical_length=draw.choice((60, 120, 250)),
                )
            )
    draw.shuffle(found)
    return found + deep_cases()


def deep_cases() -> list[Case]:
    """Return the rows whose model is too large to be timed whole."""
    methods = (
        "lora mixed",
        "lora mixed checkpointing",
        "lora mixed packed",
        "nf4 lora mixed",
        "full pure checkpointing",
    )
    return [Case("llama", "1024", 24, 16384, name, 4, 2, 120) for name in methods]


def run_case(case: Case) -> dict[str, Any]:
    """Predict, then train, and return both in tokens per second."""
    config = case.config()
    recipe = case.recipe(config)
    corpus = case.corpus(config.vocab_size)
    load = Load.of_corpus(corpus, recipe, None, "random documents")
    started = time.perf_counter()
    rehearsal = rehearse(recipe, config, load)
    predicting = time.perf_counter() - started
    precision = recipe.get(Precision)
    assert precision is not None
    run = build(recipe, random_model(config, precision.loading_dtype(recipe), 1), CPU)
    timed = Measuring(run, corpus, corpus.take([0])).timed(WARM_UP, STEPS, 1e-4)
    measured = statistics.median(tokens / seconds for tokens, seconds in zip(timed.tokens, timed.seconds, strict=True))
    tokens, seconds = load.tokens_per_step, rehearsal.step_seconds
    return {
        **asdict(case),
        "measured": measured,
        "predicted": tokens / seconds.middle,
        "low": tokens / seconds.high,
        "high": tokens / seconds.low,
        "error": tokens / seconds.middle / measured - 1,
        "blocks_timed": rehearsal.blocks,
        "seconds_to_predict": round(predicting, 2),
    }


def in_a_process_of_its_own(case: Case, file: Path) -> None:
    """Run a case in a fork, which writes its row; a row that fails is printed and left out."""
    child = os.fork()
    if child == 0:
        try:
            file.write_text(json.dumps(run_case(case)), encoding="utf-8")
        except BaseException:  # this is a fork: whatever it is, it must not get back into the loop over cases
            traceback.print_exc()
        os._exit(0)
    os.waitpid(child, 0)


def is_inside_when_left_out(rows: list[dict[str, Any]], number: int) -> bool:
    """Whether a row lies in its interval when the range of the others' errors makes it instead of `OFF_BY`."""
    others = [row["predicted"] / row["measured"] for place, row in enumerate(rows) if place != number]
    if not others:
        return False
    row, (least, most) = rows[number], OFF_BY
    low, high = row["low"] * most / max(others), row["high"] * least / min(others)
    return bool(low <= row["measured"] <= high)


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures over all rows."""
    errors = [row["error"] for row in rows]
    sizes = sorted(map(abs, errors))
    return {
        "rows_used": len(rows),
        "median_error": statistics.median(sizes),
        "p90_error": sizes[min(len(sizes) - 1, int(0.9 * len(sizes)))],
        "worst_error": sizes[-1],
        "bias": statistics.mean(errors),
        "inside_interval": sum(row["low"] <= row["measured"] <= row["high"] for row in rows) / len(rows),
        "inside_when_left_out": sum(map(partial(is_inside_when_left_out, rows), range(len(rows)))) / len(rows),
        "seconds_to_predict": statistics.median(row["seconds_to_predict"] for row in rows),
    }


def main() -> int:
    """Run what is still to come and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="OUT")
    parser.add_argument("--seed", type=int, default=0, help="draws other rows")
    parser.add_argument("--rows", type=int, help="no more than so many")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no row after so long")
    arguments = parser.parse_args()
    out: Path = arguments.json
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"] if out.is_file() else []
    known = {Case(**{name: row[name] for name in Case.__dataclass_fields__}) for row in rows}
    chosen = cases(arguments.seed)[: arguments.rows]
    deadline = time.monotonic() + arguments.seconds
    for case in chosen:
        if case in known:
            continue
        if time.monotonic() > deadline:
            print(f"{len(rows)} of {len(chosen)} rows done; call again to go on")
            return UNFINISHED
        part = out.with_suffix(".row")
        in_a_process_of_its_own(case, part)
        if not part.is_file():
            continue
        rows.append(json.loads(part.read_text(encoding="utf-8")))
        part.unlink()
        print(f"{rows[-1]['error']:+.1%} of {rows[-1]['measured']:.0f} tokens/s, {case}", flush=True)
        result = {
            "command": "benchmarks/estimate/time_cpu.py " + " ".join(sys.argv[1:]),
            "torch": torch.__version__,
            "machine": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "compute": HALF,
            "summary": summarize(rows),
            "rows": rows,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summarize(rows), indent=1))
    return 0 if len(rows) == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
