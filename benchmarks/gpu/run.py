"""What only a GPU can tell, in stages of under nine minutes each: right? as small as predicted? how fast?

    python benchmarks/gpu/run.py --stage correctness --out results/
    python benchmarks/gpu/run.py --stage memory --out results/
    python benchmarks/gpu/run.py --stage speed --out results/
    python benchmarks/gpu/run.py --stage fp8 --out results/

`correctness`: loss and gradients of every method and pair of the laws on the device, in fp32, against plain eager
attention on the same device. `memory`: the dry run's peak against `max_memory_allocated` and `max_memory_reserved`.
`speed`: tokens/s and the share of the measured bf16 matmul ceiling, for LoRA, QLoRA and full fine-tuning of true shapes
with random weights, and the roofline's time of the same step. `fp8`: products in FP8 against their plain twin and
bf16's time, and the loss of LoRA over them against bf16's. Each stage writes `STAGE.json` with versions and date; a
stage begins no case after eight minutes and says how many it has not reached. `--device cpu --tiny` runs all of it on
small shapes where there is no GPU, to try the script; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.laws.test_same_gradients import (  # noqa: E402 - the laws are where the cases are
    COMBINATIONS,
    PROBLEMS,
    SAME,
    TOLERANCES,
    loss_and_gradients,
    make_run,
)

from tunewise.engine.build import build  # noqa: E402
from tunewise.engine.device_profile import CPU, CUDA, CUDA_HOPPER, DeviceProfile  # noqa: E402
from tunewise.engine.dry_run import BatchShape, dry_run  # noqa: E402
from tunewise.engine.run_folder import versions  # noqa: E402
from tunewise.engine.step import (  # noqa: E402
    clipped_norm,
    gradients,
    parameter_groups,
    set_learning_rate,
    update,
)
from tunewise.errors import Conflict, TunewiseError  # noqa: E402
from tunewise.layers import fp8  # noqa: E402
from tunewise.machine.machine import Machine  # noqa: E402
from tunewise.machine.probe import measure_machine  # noqa: E402
from tunewise.methods import complete  # noqa: E402
from tunewise.methods.method import Run  # noqa: E402
from tunewise.methods.precision import Precision  # noqa: E402
from tunewise.methods.reading import recipe_from_mapping  # noqa: E402
from tunewise.planner.roofline import launch_seconds, seconds_of  # noqa: E402
from tunewise.recipe import Recipe  # noqa: E402
from tunewise.workload.model import random_model  # noqa: E402

MOST_SECONDS = 480.0
"""No case begins after so long, so that a stage is over before nine minutes are and what it has found is written."""

SHAPES: dict[str, dict[str, int]] = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4},
}
VOCAB_SIZE = {"tiny": 1024}
LORA, QLORA = {"lora": {"rank": 16}}, {"lora": {"rank": 16}, "quantize": {"kind": "nf4"}}
FP8 = {"lora": {"rank": 16}, "quantize": {"kind": "fp8", "compute": "fp8"}}
KINDS: dict[str, dict[str, Any]] = {"lora": LORA, "qlora": QLORA, "lora fp8": FP8, "full": {}}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"checkpointing": {}},
    "every 2nd": {"checkpointing": {"every": 2}},
    "selective": {"checkpointing": {"policy": "selective"}},
    "whole loss": {"whole_loss": {}},
}


def config_of(shape: str) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB_SIZE.get(shape, 128256),
        num_key_value_heads=4 if shape == "tiny" else 8,
        max_position_embeddings=8192,
        tie_word_embeddings=shape != "8B",
        **SHAPES[shape],
    )


def recipe_of(shape: str, kind: str, variant: str, device: torch.device) -> Recipe:
    methods = {**KINDS[kind], **VARIANTS[variant], "packing": {"row_tokens": 4096}, "precision": {"compute": "bf16"}}
    if kind == "full":
        methods["precision"] = {"compute": "bf16", "trainable": "same"}
    mapping = {
        "model": {"name": shape, "weights": "random"},
        "data": "made",
        "methods": methods,
        "batch": {"documents": 64, "micro_batch_size": 1},
        "training": {"learning_rate": 1e-4},
        "device": device.type,
    }
    return complete(recipe_from_mapping(mapping), config_of(shape), device)


def batch_of(tokens: int) -> BatchShape:
    """One packed row of uneven documents."""
    lengths, left = [], tokens
    for share in (0.31, 0.07, 0.19, 0.03, 0.22, 0.11):
        lengths.append(int(tokens * share))
        left -= lengths[-1]
    return BatchShape(((*lengths, left),), num_supervised=tokens // 2)


def build_run(recipe: Recipe, shape: str, device: torch.device) -> Run:
    precision = recipe.get(Precision)
    assert precision is not None
    with torch.device(device):
        model = random_model(config_of(shape), precision.loading_dtype(recipe), seed=0)
    return build(recipe, model, device)


def one_step(run: Run, optimizer: torch.optim.Optimizer, shape: BatchShape) -> None:
    scaler = torch.amp.GradScaler(run.device.type, enabled=False)
    batch = shape.build()
    batch.labels_RL.fill_(-100)
    batch.labels_RL.view(-1)[: 2 * shape.num_supervised : 2] = 1
    set_learning_rate(optimizer, 1e-4)
    gradients(run, [batch], shape.num_supervised, scaler)
    clipped_norm(run, optimizer, scaler)
    update(run, optimizer, scaler)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class Clock:
    """Says whether there is time for another case, and counts those for which there was none."""

    def __init__(self) -> None:
        self.began, self.not_reached = time.perf_counter(), 0

    def has_time(self) -> bool:
        """Ask before each case."""
        if time.perf_counter() - self.began < MOST_SECONDS:
            return True
        self.not_reached += 1
        return False


def correctness(device: torch.device, is_tiny: bool) -> dict[str, Any]:
    """Every method alone and in pairs against the plain run on the same device."""
    rows, left_out, clock = [], [], Clock()
    for problem in list(PROBLEMS)[: 2 if is_tiny else None]:
        if not clock.has_time():
            continue
        try:
            reference = loss_and_gradients(make_run(PROBLEMS[problem], 7, device=device))
        except Conflict as conflict:  # products in int8 are the CPU's, those in FP8 need bf16 here: stage fp8
            left_out.append({"case": problem, "why": str(conflict)})
            continue
        for combination in COMBINATIONS[: 3 if is_tiny else None]:
            if not clock.has_time():
                continue
            methods = (*PROBLEMS[problem], *(SAME[name] for name in combination))
            case = f"{problem}: {'+'.join(combination)}"
            try:
                loss, found = loss_and_gradients(make_run(methods, 2, device=device))
            except Conflict as conflict:  # the compiled kernels are the CPU's
                left_out.append({"case": case, "why": str(conflict)})
                continue
            scale = max(float(gradient.norm()) for gradient in reference[1].values())
            worst = max(
                float((found[name] - gradient).norm()) / max(float(gradient.norm()), 1e-3 * scale)
                for name, gradient in reference[1].items()
            )
            loss_error = abs(loss / reference[0] - 1)
            allowed = max(1e-4, TOLERANCES.get(problem, 0.0))
            rows.append({"case": case, "loss": loss_error, "gradient": worst, "allowed": allowed})
    failed = [row for row in rows if max(row["loss"], row["gradient"]) > row["allowed"]]
    summary = {"cases": len(rows), "failed": len(failed), "left_out": len(left_out), "not_reached": clock.not_reached}
    return {"summary": summary, "failed": failed, "left_out": left_out, "rows": rows}


def profile_of_device(device: torch.device) -> DeviceProfile:
    if device.type != "cuda":
        return CPU
    return CUDA_HOPPER if torch.cuda.get_device_capability(device) >= (9, 0) else CUDA


def memory(device: torch.device, is_tiny: bool) -> dict[str, Any]:
    """The dry run's peak against what the device's allocator counted."""
    profile, clock = profile_of_device(device), Clock()
    rows, left_out = [], []
    for shape in ("tiny",) if is_tiny else ("1B", "3B", "8B"):
        for kind in KINDS:
            for variant in VARIANTS:
                for tokens in (512,) if is_tiny else (2048, 4096):
                    case = f"{shape} {kind} {variant} {tokens}"
                    if not clock.has_time():
                        continue
                    try:
                        rows.append({"case": case, **_memory_row(shape, kind, variant, tokens, device, profile)})
                    except (TunewiseError, torch.OutOfMemoryError) as error:
                        left_out.append({"case": case, "why": str(error).splitlines()[0]})
                    gc.collect()
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
    errors = [abs(row["error"]) for row in rows if row["error"] is not None]
    summary: dict[str, Any] = {"rows_used": len(rows), "rows_left_out": len(left_out), "not_reached": clock.not_reached}
    if errors:
        summary |= {"median_error": statistics.median(errors), "worst_error": max(errors)}
        reserved = [abs(row["predicted_bytes"] / row["reserved_bytes"] - 1) for row in rows]
        summary |= {"median_error_of_reserved": statistics.median(reserved), "worst_error_of_reserved": max(reserved)}
    return {"summary": summary, "rows": rows, "left_out": left_out}


def _memory_row(
    shape: str, kind: str, variant: str, tokens: int, device: torch.device, profile: DeviceProfile
) -> dict[str, Any]:
    recipe, batch = recipe_of(shape, kind, variant, device), batch_of(tokens)
    estimate = dry_run(recipe, config_of(shape), profile.kind, batch, profile=profile)
    row: dict[str, Any] = {"predicted_bytes": estimate.peak_bytes, "error": None}
    if device.type == "cuda":
        run = build_run(recipe, shape, device)
        optimizer = run.make_optimizer(parameter_groups(run))
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(2):
            one_step(run, optimizer, batch)
        row["allocated_bytes"] = torch.cuda.max_memory_allocated(device)
        row["reserved_bytes"] = torch.cuda.max_memory_reserved(device)
        row["error"] = row["predicted_bytes"] / row["allocated_bytes"] - 1
    return row


def speed(device: torch.device, is_tiny: bool) -> dict[str, Any]:
    """Tokens/s, median of timed steps after warm-up, and the share of the measured matmul ceiling."""
    machine = measure_machine(seconds=3 if is_tiny else 20, device=device.type)
    ceiling = machine.flops_per_second["bf16"]
    rows, clock = [], Clock()
    for shape in ("tiny",) if is_tiny else ("1B", "8B"):
        for kind in (
            ("lora", "lora fp8") if is_tiny else ("lora", "qlora", "lora fp8") if shape == "8B" else tuple(KINDS)
        ):
            if not clock.has_time():
                continue
            recipe, batch = recipe_of(shape, kind, "plain", device), batch_of(512 if is_tiny else 4096)
            roofline = roofline_seconds(recipe, shape, batch, machine, device)
            run = build_run(recipe, shape, device)
            optimizer = run.make_optimizer(parameter_groups(run))
            seconds = []
            for step in range(3 if is_tiny else 13):
                synchronize(device)
                started = time.perf_counter()
                one_step(run, optimizer, batch)
                synchronize(device)
                if step >= 2:
                    seconds.append(time.perf_counter() - started)
            tokens = sum(map(sum, batch.document_lengths))
            median = statistics.median(seconds)
            weights = sum(p.numel() for n, p in run.model.named_parameters() if "embed" not in n and p.ndim == 2)
            passes = 6 if kind == "full" else 4  # a frozen weight has no gradient of its own
            share = None if kind in ("qlora", "lora fp8") else passes * weights * tokens / median / ceiling
            row = {"case": f"{shape} {kind}", "tokens_per_second": tokens / median, "share_of_ceiling": share}
            rows.append({**row, "roofline_seconds": roofline, "over_roofline": median / roofline, "seconds": seconds})
            del run, optimizer
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    over = statistics.median(row["over_roofline"] for row in rows)
    summary = {"bf16_ceiling_flops": ceiling, "rows": len(rows), "not_reached": clock.not_reached}
    return {"summary": summary | {"median_over_roofline": over}, "rows": rows}


def roofline_seconds(recipe: Recipe, shape: str, batch: BatchShape, machine: Machine, device: torch.device) -> float:
    """What a plan says about the step before any correction; the host launches ahead of a GPU, not of a CPU."""
    profile = profile_of_device(device)
    found = seconds_of(dry_run(recipe, config_of(shape), profile.kind, batch, profile=profile).work, machine)
    busy = found.linear + found.attention + found.update
    host = (found.calls + found.update_calls) * launch_seconds(machine)
    return max(busy, host) if device.type == "cuda" else busy + host


def fp8_products(device: torch.device, is_tiny: bool) -> dict[str, Any]:
    """Products in FP8 against their plain twin and against bf16's time; what LoRA over them learns against bf16's."""
    rows = []
    for tokens, inputs, outputs in ((64, 128, 256),) if is_tiny else ((4096, 4096, 4096), (4096, 4096, 14336)):
        x, weight = (torch.randn(*size, device=device).bfloat16() for size in ((tokens, inputs), (outputs, inputs)))
        rounded, (packed, scale) = fp8.quantize_rows(x), fp8.quantize_rows(weight)
        twin = fp8.plain_matmul(rounded, packed, scale, torch.float32)
        error = (fp8.matmul(rounded, packed, scale, torch.bfloat16).float() - twin).abs().max() / twin.abs().max()
        back = fp8.quantize_rows(twin.bfloat16(), scale)
        twin = fp8.plain_matmul(back, packed, None, torch.float32, by_columns=True)
        made = fp8.matmul(back, packed, None, torch.bfloat16, by_columns=True)
        rows.append(
            {
                "case": f"{tokens} x {inputs} -> {outputs}",
                "forward_error": float(error),
                "backward_error": float((made.float() - twin).abs().max() / twin.abs().max()),
                "seconds_bf16": median_seconds(partial(torch.nn.functional.linear, x, weight), device),
                "seconds_fp8": median_seconds(partial(fp8.matmul, rounded, packed, scale, torch.bfloat16), device),
                "seconds_rounding": median_seconds(partial(fp8.quantize_rows, x), device),
            }
        )
    shape, steps = ("tiny", 5) if is_tiny else ("1B", 60)
    losses = {kind: learn(shape, kind, steps, device) for kind in ("lora", "lora fp8")}
    failed = [row for row in rows if max(row["forward_error"], row["backward_error"]) > 2**-7]
    summary = {
        "rows": len(rows),
        "failed": len(failed),
        "times_bf16": statistics.median(row["seconds_bf16"] / row["seconds_fp8"] for row in rows),
        "learnt_in_bf16": losses["lora"][0] - losses["lora"][-1],
        "last_loss_over_bf16s": losses["lora fp8"][-1] - losses["lora"][-1],
    }
    return {"summary": summary, "failed": failed, "rows": rows, "losses": losses}


def learn(shape: str, kind: str, steps: int, device: torch.device) -> list[float]:
    """Return the losses of steps on the same row, in which each token decides its label."""
    run, batch = build_run(recipe_of(shape, kind, "plain", device), shape, device), batch_of(512).build()
    tokens, every_2nd = torch.arange(batch.num_tokens) * 7 % 501, slice(0, 2 * batch.num_supervised, 2)
    batch.input_ids_RL.view(-1).copy_(tokens)
    batch.labels_RL.fill_(-100)
    batch.labels_RL.view(-1)[every_2nd] = (tokens * 3 % 499)[every_2nd]
    optimizer, scaler = run.make_optimizer(parameter_groups(run)), torch.amp.GradScaler(device.type, enabled=False)
    set_learning_rate(optimizer, 1e-3)
    losses = []
    for _ in range(steps):
        losses.append(float(gradients(run, [batch], batch.num_supervised, scaler)))
        clipped_norm(run, optimizer, scaler)
        update(run, optimizer, scaler)
    return losses


def median_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median of twenty, after five to warm up."""
    seconds = []
    for _ in range(25):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[5:])


STAGES = {"correctness": correctness, "memory": memory, "speed": speed, "fp8": fp8_products}


def main(stage: str, out: Path, device_name: str, is_tiny: bool) -> int:
    device = torch.device(device_name)
    started = time.perf_counter()
    result = STAGES[stage](device, is_tiny)
    result |= {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "seconds": round(time.perf_counter() - started, 1),
        "is_tiny": is_tiny,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{stage}.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result["summary"]))
    return 1 if result["summary"].get("failed") else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=sorted(STAGES), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    sys.exit(main(arguments.stage, arguments.out, arguments.device, arguments.tiny))
