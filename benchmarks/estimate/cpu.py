"""Predicted peak of tensor memory against the allocator's own record of the real step, on the CPU.

    python benchmarks/estimate/cpu.py --json OUT [--rows N] [--only llama,gpt2] [--seed 0]

Every row is one architecture (a small random model) with one combination of methods and one shape of batch. The real
step is the engine's, run once to fill the optimizer's state and once under torch's profiler, whose [memory] events are
the CPU allocator's record. What was allocated before the step (weights, optimizer state, batch) is added to it.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, PretrainedConfig

from tunewise.engine.build import build
from tunewise.engine.dry_run import BatchShape, dry_run
from tunewise.engine.estimate import Estimate
from tunewise.engine.evaluate import summed_loss
from tunewise.engine.state import Progress, capture
from tunewise.engine.step import (
    clipped_norm,
    gradients,
    parameter_groups,
    set_learning_rate,
    update,
    update_in_backward,
)
from tunewise.engine.tracking import Moment
from tunewise.errors import TunewiseError
from tunewise.methods import complete
from tunewise.methods.method import Run
from tunewise.methods.precision import Precision
from tunewise.methods.reading import recipe_from_mapping
from tunewise.recipe import Recipe
from tunewise.workload.batches import Layout, MicroBatch
from tunewise.workload.corpus import Corpus
from tunewise.workload.model import random_model

VOCAB_SIZE = 4000
CPU = torch.device("cpu")

_LLAMA: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | {"head_dim": 48},
    "mistral": _LLAMA | {"sliding_window": 64},
    "mixtral": _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 192},
    "gemma2": _LLAMA | {"head_dim": 32, "sliding_window": 64, "query_pre_attn_scalar": 32},
    "gemma3_text": _LLAMA | {"head_dim": 32, "sliding_window": 64},
    "phi3": _LLAMA | {"pad_token_id": 0},
    "gpt2": {"n_embd": 128, "n_head": 4, "n_positions": 1024},
    "gpt_neox": {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4},
    "opt": {"hidden_size": 128, "ffn_dim": 512, "num_attention_heads": 4, "word_embed_proj_dim": 128},
    "falcon": {"hidden_size": 128, "num_attention_heads": 4},
    "olmo2": _LLAMA,
}

DEPTHS = {"gemma3_text": (6, 7, 13)}
"""Numbers of blocks that rows use in turn; others take 2 to 6."""

_IN_BACKWARD = {"training": {"max_grad_norm": None}}
_QLORA = {"quantize": {"kind": "nf4"}, "lora": {"rank": 8}}
_INT8_LORA = {"quantize": {"kind": "int8"}, "lora": {"rank": 8}}
_BF16 = {"precision": {"compute": "bf16"}}
_PURE = {"precision": {"compute": "bf16", "trainable": "same"}}
_FP32 = {"precision": {"compute": "fp32"}}
_PACKED = {"packing": {"row_tokens": 192}}

COMBINATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full fp32": (_FP32, {}),
    "full fp32 whole": (_FP32 | {"whole_loss": {}}, {}),
    "full fp32 sdpa": (_FP32 | {"attention": {"kind": "sdpa"}}, {}),
    "full fp32 eager": (_FP32 | {"attention": {"kind": "eager"}, "whole_loss": {}}, {}),
    "full fp32 checkpointing": (_FP32 | {"checkpointing": {}}, {}),
    "full fp32 checkpointing every 2": (_FP32 | {"checkpointing": {"every": 2}, "whole_loss": {}}, {}),
    "full fp32 selective": (_FP32 | {"checkpointing": {"policy": "selective"}}, {}),
    "full fp32 sgd": (_FP32 | {"sgd": {}}, {}),
    "full fp32 momentum": (_FP32 | {"sgd": {"momentum": 0.9}, "checkpointing": {}}, {}),
    "full fp32 sgd in backward": (_FP32 | {"sgd": {"in_backward": True}}, _IN_BACKWARD),
    "full fp32 adamw in backward": (_FP32 | {"adamw": {"in_backward": True}, "checkpointing": {}}, _IN_BACKWARD),
    "full fp32 adafactor": (_FP32 | {"adafactor": {}, "checkpointing": {}}, {}),
    "full fp32 lion": (_FP32 | {"lion": {}}, {}),
    "full fp32 adamw 8-bit": (_FP32 | {"adamw_8bit": {}, "checkpointing": {}}, {}),
    "full fp32 rmsprop": (_FP32 | {"rmsprop": {}}, {}),
    "full fp32 adagrad": (_FP32 | {"adagrad": {}}, {}),
    "full fp32 unfused": (_FP32 | {"adamw": {"fused": False}}, {}),
    "full fp32 packed": (_FP32 | _PACKED, {}),
    "full fp32 packed sdpa": (_FP32 | _PACKED | {"attention": {"kind": "sdpa"}}, {}),
    "full mixed": (_BF16, {}),
    "full mixed whole": (_BF16 | {"whole_loss": {}}, {}),
    "full mixed checkpointing": (_BF16 | {"checkpointing": {}}, {}),
    "full mixed selective eager": (
        _BF16 | {"checkpointing": {"policy": "selective"}, "attention": {"kind": "eager"}},
        {},
    ),
    "full mixed packed": (_BF16 | _PACKED, {}),
    "full pure": (_PURE, {}),
    "full pure checkpointing whole": (_PURE | {"checkpointing": {}, "whole_loss": {}}, {}),
    "full pure adafactor in backward": (
        _PURE | {"adafactor": {"in_backward": True}, "checkpointing": {}},
        _IN_BACKWARD,
    ),
    "lora fp32": (_FP32 | {"lora": {"rank": 8}}, {}),
    "lora fp32 checkpointing": (_FP32 | {"lora": {"rank": 8}, "checkpointing": {}}, {}),
    "lora fp32 dropout": (_FP32 | {"lora": {"rank": 8, "dropout": 0.1}, "checkpointing": {"every": 2}}, {}),
    "lora fp32 selective whole": (
        _FP32 | {"lora": {"rank": 16}, "checkpointing": {"policy": "selective"}, "whole_loss": {}},
        {},
    ),
    "lora mixed": (_BF16 | {"lora": {"rank": 8}}, {}),
    "lora mixed sdpa packed": (_BF16 | _PACKED | {"lora": {"rank": 8}, "attention": {"kind": "sdpa"}}, {}),
    "lora and norms fp32": (_FP32 | {"lora": {"rank": 8}, "freeze": {"train": ["*norm*", "*ln_*"]}}, {}),
    "norms only fp32": (_FP32 | {"freeze": {"train": ["*norm*", "*ln_*"]}, "checkpointing": {}}, {}),
    "nf4 lora fp32": (_FP32 | _QLORA, {}),
    "nf4 lora mixed": (_BF16 | _QLORA, {}),
    "nf4 lora mixed checkpointing": (_BF16 | _QLORA | {"checkpointing": {}}, {}),
    "nf4 lora mixed packed": (_BF16 | _QLORA | _PACKED, {}),
    "int8 lora mixed": (_BF16 | _INT8_LORA, {}),
    "int8 lora fp32 checkpointing whole": (_FP32 | _INT8_LORA | {"checkpointing": {}, "whole_loss": {}}, {}),
    "nf4 lora lion 8-bit": (_BF16 | _QLORA | {"adamw_8bit": {}, "checkpointing": {"policy": "selective"}}, {}),
}

LENGTHS = (48, 64, 96, 128, 160)
ROWS = (1, 2, 3)


@dataclass(frozen=True)
class Case:
    """One row: what is run, and in which shape."""

    architecture: str
    combination: str
    depth: int
    rows: int
    length: int
    supervised: float
    micro_batches: int

    def config(self) -> PretrainedConfig:
        """Return the architecture's configuration in this case's depth, without dropout."""
        options = {"vocab_size": VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": 2, **ARCHITECTURES[self.architecture]}
        config = AutoConfig.for_model(self.architecture, num_hidden_layers=self.depth, **options)
        for name, value in config.to_dict().items():
            if ("dropout" in name or name.endswith("_pdrop")) and isinstance(value, float):
                setattr(config, name, 0.0)
        return config

    def recipe(self, config: PretrainedConfig) -> Recipe:
        """Return the complete recipe."""
        methods, changes = COMBINATIONS[self.combination]
        mapping = {
            "model": {"name": self.architecture, "weights": "random"},
            "data": {"source": "none"},
            "methods": methods,
            "batch": {"documents": self.rows * self.micro_batches, "micro_batch_size": self.rows},
            "training": {},
        }
        return complete(recipe_from_mapping({**mapping, **changes}, "benchmark"), config, CPU)


@dataclass
class Row:
    """A case with prediction and measurement, or why there is none."""

    case: Case
    predicted: dict[str, int] = field(default_factory=dict)
    measured: dict[str, int] = field(default_factory=dict)
    left_out: str | None = None

    def error(self, what: str = "step") -> float:
        """Return (predicted - measured) / measured."""
        return (self.predicted[what] - self.measured[what]) / self.measured[what]


def cases(seed: int, only: list[str]) -> Iterator[Case]:
    """Yield every architecture with every combination, batch and length varied at random (but always the same)."""
    for number, combination in enumerate(COMBINATIONS):
        for place, architecture in enumerate(ARCHITECTURES):
            if only and architecture not in only:
                continue
            draw = random.Random(f"{seed} {architecture} {combination}")
            depths = DEPTHS.get(architecture, (2, 3, 4, 5, 6))
            packed, in_backward = "packed" in combination, "in backward" in combination
            yield Case(
                architecture,
                combination,
                depth=depths[(number + place) % len(depths)],
                rows=draw.choice(ROWS[:2] if packed else ROWS),
                length=192 if packed else draw.choice(LENGTHS),
                supervised=draw.choice((0.25, 0.6, 1.0)),
                micro_batches=1 if in_backward else draw.choice((1, 1, 2)),
            )


def micro_batches(case: Case, layout: Layout) -> list[MicroBatch]:
    """Make random documents and lay them out as the recipe says, as many micro-batches as the case has."""
    draw = random.Random(case.length)
    longest = case.length if layout.row_tokens is None else layout.row_tokens // 2
    count = case.rows * case.micro_batches * (1 if layout.row_tokens is None else 6)
    lengths = [max(4, longest - draw.randrange(longest // 2)) if number else longest for number in range(count)]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    generator = np.random.default_rng(case.length)
    ids = generator.integers(1, VOCAB_SIZE, offsets[-1]).astype(np.int32)
    marks = generator.random(offsets[-1]) < case.supervised
    corpus = Corpus(ids, marks, offsets, ["random"] * count)
    groups = layout.micro_batches(list(range(count)), corpus.lengths)[: case.micro_batches]
    return [layout.build(rows, corpus) for rows in groups]


def predict(case: Case, recipe: Recipe, config: PretrainedConfig, batches: list[MicroBatch]) -> dict[str, int]:
    """Return the dry run's peaks: of the step, of an evaluation and of saving."""
    shapes = [BatchShape.of(batch) for batch in batches]
    estimate: Estimate = dry_run(recipe, config, "cpu", shapes, evaluation=shapes[0])
    totals = {moment: peak.total_bytes for moment, peak in estimate.moments.items()}
    return {
        "step": max(totals[moment] for moment in (Moment.FORWARD, Moment.BACKWARD, Moment.UPDATE)),
        "evaluation": totals[Moment.EVALUATION],
        "save": totals[Moment.SAVE],
    }


def measure(case: Case, recipe: Recipe, config: PretrainedConfig) -> tuple[list[MicroBatch], dict[str, int]]:
    """Run the real step twice, the second time watched, then an evaluation and a checkpoint's capture."""
    precision = recipe.get(Precision)
    assert precision is not None
    model = random_model(config, precision.loading_dtype(recipe), recipe.seed)
    run = build(recipe, model, CPU)
    batches = micro_batches(case, run.layout)
    optimizer = run.make_optimizer(parameter_groups(run))
    set_learning_rate(optimizer, 1e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=run.use_grad_scaler)
    if run.update_in_backward:
        update_in_backward(run, optimizer)

    def step() -> None:
        gradients(run, iter(batches), sum(batch.num_supervised for batch in batches), scaler)
        if not run.update_in_backward:
            clipped_norm(run, optimizer, scaler)
            update(optimizer, scaler)

    def evaluate() -> None:
        run.model.eval()
        summed_loss(run, batches[0]).double()
        run.model.train()

    def save() -> None:
        capture(run, optimizer, scaler, Progress(1, None, 1, None))

    step()
    gc.collect()
    measured = {}
    works: dict[str, tuple[Callable[[], None], int]] = {
        "step": (step, len(batches)), "evaluation": (evaluate, 1), "save": (save, 0)
    }  # fmt: skip
    for name, (work, num_batches) in works.items():
        inputs = max((tensor_bytes(batch) for batch in batches[:num_batches]), default=0)
        measured[name] = resident(run, optimizer) + inputs + allocated(work)
    return batches, measured


def resident(run: Run, optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of weights, buffers and optimizer state."""
    tensors = [*run.model.parameters(), *run.model.buffers()]
    for entries in optimizer.state.values():
        tensors += [value for value in entries.values() if isinstance(value, Tensor)]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def tensor_bytes(batch: MicroBatch) -> int:
    """Return the bytes of a micro-batch, which numpy has allocated."""
    return sum(part.untyped_storage().nbytes() for part in (batch.input_ids_RL, batch.position_ids_RL, batch.labels_RL))


def allocated(work: Callable[[], None]) -> int:
    """Return the most that the CPU allocator gave out above its level at the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    level = highest = 0
    for event in events:
        level += event.nbytes()
        highest = max(highest, level)
    return highest


def run_case(case: Case) -> Row:
    """Measure and predict; a combination that this architecture refuses is left out with the reason."""
    row = Row(case)
    config = case.config()
    try:
        recipe = case.recipe(config)
        batches, row.measured = measure(case, recipe, config)
    except TunewiseError as error:
        row.left_out = str(error).replace("\n", " ")
        return row
    row.predicted = predict(case, recipe, config, batches)
    return row


def summarize(rows: list[Row], what: str) -> dict[str, Any]:
    """Return the figures of one quantity over all rows that were used."""
    errors = [row.error(what) for row in rows if row.left_out is None]
    if not errors:
        return {"rows_used": 0, "rows_left_out": len(rows)}
    sizes = sorted(map(abs, errors))
    return {
        "rows_used": len(errors),
        "rows_left_out": len(rows) - len(errors),
        "median_error": statistics.median(sizes),
        "p90_error": sizes[min(len(sizes) - 1, int(0.9 * len(sizes)))],
        "worst_error": sizes[-1],
        "bias": statistics.mean(errors),
        "under_predictions": sum(error < 0 for error in errors),
    }


def to_mapping(row: Row) -> dict[str, Any]:
    """Return a row as it stands in the JSON file."""
    content: dict[str, Any] = {**vars(row.case), "predicted": row.predicted, "measured": row.measured}
    if row.left_out is not None:
        return {**content, "left_out": row.left_out}
    return {**content, "error": {what: row.error(what) for what in row.measured}}


def main() -> int:
    """Run the cases, print the worst, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="OUT")
    parser.add_argument("--rows", type=int, help="as many cases, drawn at random; default all")
    parser.add_argument("--only", default="", help="architectures, separated by commas")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chosen = list(cases(arguments.seed, [name for name in arguments.only.split(",") if name]))
    if arguments.rows is not None and arguments.rows < len(chosen):
        chosen = random.Random(arguments.seed).sample(chosen, arguments.rows)
    rows, broken = [], 0
    for number, case in enumerate(chosen, start=1):
        try:
            row = run_case(case)
        except Exception:
            print(f"BROKEN {case}", file=sys.stderr)
            traceback.print_exc()
            broken += 1
            continue
        rows.append(row)
        if row.left_out is None and abs(row.error()) > 0.005:
            print(f"{number:4} {row.error():+.2%} {row.measured['step'] / 2**20:8.2f} MiB {case}", flush=True)
    architectures = len({row.case.architecture for row in rows})
    summary = summarize(rows, "step") | {"broken": broken, "architectures": architectures}
    moments = {what: summarize(rows, what) for what in ("evaluation", "save")}
    result = {
        "command": "benchmarks/estimate/cpu.py " + " ".join(sys.argv[1:]),
        "torch": torch.__version__,
        "summary": summary,
        "moments": moments,
        "rows": [to_mapping(row) for row in rows],
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not summary["rows_used"]:
        print("no row could be used")
        return 1
    print(
        f"{summary['rows_used']} rows used, {summary['rows_left_out']} left out, {broken} broken: median error "
        f"{summary['median_error']:.2%}, 90 % under {summary['p90_error']:.2%}, worst {summary['worst_error']:.2%}, "
        f"bias {summary['bias']:+.2%}"
    )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
