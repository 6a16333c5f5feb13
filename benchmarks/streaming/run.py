"""A frozen base four times larger than its memory: trained with `stream`, gradients bit-equal to the resident model's.

    python benchmarks/streaming/run.py --json OUT

A Llama of 1.1 GB is written to a folder. Processes of their own then load it and train LoRA on it for two steps with
tunewise's engine: resident, without a limit, or with `stream` from disk, in a control group whose memory the kernel
limits to a quarter of the model's (cgroup v1, as root; everything after the imports counts, pages of files too, and
who needs more is killed). Each also samples the most memory of its own (`RssAnon`: pages of no file) that loading,
building and training took together, and keeps the hash of the gradients of every step.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tunewise.engine.assemble import assemble, settle
from tunewise.engine.step import clipped_norm, gradients, parameter_groups, set_learning_rate, update
from tunewise.methods.reading import recipe_from_mapping
from tunewise.workload.batches import GlobalBatches
from tunewise.workload.model import EMBEDDED_FOLDER

CONFIG = LlamaConfig(
    vocab_size=4096, hidden_size=1024, intermediate_size=2816, num_hidden_layers=24, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True,
)  # fmt: skip
MODES: dict[str, dict[str, Any]] = {
    "resident": {},
    "streamed": {"stream": {}},
    "resident nf4": {"quantize": {"kind": "nf4"}},
    "streamed nf4": {"quantize": {"kind": "nf4"}, "stream": {}},
}


SAME: dict[str, Any] = {
    "lora": {"rank": 4}, "checkpointing": {}, "precision": {"compute": "fp32"},
    "attention": {"kind": "per_document"},  # named, so that the compiled kernels, which round otherwise, are no default
}  # fmt: skip
STEPS = 2
CONTROL_GROUPS = Path("/sys/fs/cgroup/memory")


@contextmanager
def limited(num_bytes: int) -> Iterator[dict[str, Any]]:
    """Give this process `num_bytes` for everything that it needs from now on; afterwards, what it has used is told.

    Where control groups cannot be made nothing is limited, and that is told instead.
    """
    told: dict[str, Any] = {"limit_bytes": num_bytes}
    mine = Path("/proc/self/cgroup").read_text().split(":memory:")[-1].splitlines()[0].lstrip("/")
    group, parent = CONTROL_GROUPS / f"tunewise-{os.getpid()}", CONTROL_GROUPS / mine
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(num_bytes))
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as error:
        yield told | {"limit_bytes": None, "why": str(error)}
        return
    try:
        yield told
    finally:
        told["most_bytes"] = int((group / "memory.max_usage_in_bytes").read_text())
        (parent / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def child(mode: str, model: Path) -> dict[str, Any]:
    """Load and train in this process."""
    mapping = {
        "model": {"name": str(model), "tokenizer": str(EMBEDDED_FOLDER)},
        "data": {"source": "stdlib", "max_length": 64, "max_records": 60},
        "methods": {**SAME, **MODES[mode]},
        "batch": {"documents": 4, "micro_batch_size": 4},
        "training": {"steps": 3, "learning_rate": 1e-3},
        "device": "cpu",
    }
    plan = settle(recipe_from_mapping(mapping, "benchmark"))
    hashes: list[str] = []
    losses: list[float] = []
    seconds: list[float] = []

    def everything() -> None:
        run = assemble(plan)
        optimizer, scaler = run.make_optimizer(parameter_groups(run)), torch.amp.GradScaler("cpu", enabled=False)
        steps = GlobalBatches(plan.data.train, plan.recipe.batch, plan.recipe.seed).from_step(0)
        for _ in range(STEPS):
            started = time.perf_counter()
            documents = next(steps)[1]
            set_learning_rate(optimizer, 1e-3)
            rows = run.layout.micro_batches(documents, plan.data.train.lengths)
            batches = (run.layout.build(part, plan.data.train) for part in rows)
            num_supervised = int(plan.data.train.num_supervised[documents].sum())
            losses.append(float(gradients(run, batches, num_supervised, scaler)))
            digest = hashlib.sha256()
            for _, parameter in run.trainable():
                assert parameter.grad is not None
                digest.update(parameter.grad.numpy().tobytes())
            hashes.append(digest.hexdigest()[:16])
            clipped_norm(run, optimizer, scaler)
            update(run, optimizer, scaler)
            seconds.append(round(time.perf_counter() - started, 3))

    is_limited = mode.startswith("streamed")
    num_bytes = sum(file.stat().st_size for file in model.glob("*.safetensors")) // 4
    with limited(num_bytes) if is_limited else nullcontext({}) as told:
        peak_bytes = anonymous_bytes(everything)
    return {
        "peak_bytes": peak_bytes,
        **told,
        "losses": losses,
        "gradients": hashes,
        "seconds_per_step": seconds,
    }


def anonymous_bytes(work: Callable[[], object]) -> int:
    """Return the most memory of this process's own (pages of no file) above its level before `work`, sampled."""
    samples, done = [_anonymous()], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            samples.append(_anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return max(samples) - samples[0]


def _anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))


def main() -> None:
    """Write the model, run the modes one after another, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--child", nargs=2, metavar=("MODE", "MODEL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        options.json.write_text(json.dumps(child(options.child[0], Path(options.child[1]))))
        return
    found: dict[str, Any] = {"torch": torch.__version__}
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "model"
        torch.manual_seed(0)
        whole = AutoModelForCausalLM.from_config(CONFIG)
        found["model_bytes"] = sum(parameter.nbytes for parameter in whole.parameters())
        whole.save_pretrained(model)
        del whole
        for mode in MODES:
            out = Path(name) / "out.json"
            command = [sys.executable, __file__, "--json", str(out), "--child", mode, str(model)]
            subprocess.run(command, check=True)
            found[mode] = json.loads(out.read_text())
            times = found["model_bytes"] / found[mode]["peak_bytes"]
            limit = found[mode].get("limit_bytes")
            under = f", limited to {limit / 2**20:.0f} MiB" if limit else ""
            print(
                f"{mode}: peak {found[mode]['peak_bytes'] / 2**20:.1f} MiB, model / peak {times:.2f}{under}", flush=True
            )
    for kind in ("", " nf4"):
        found[f"bit_equal{kind}"] = found[f"resident{kind}"]["gradients"] == found[f"streamed{kind}"]["gradients"]
    found["model_over_peak"] = found["model_bytes"] / found["streamed"]["peak_bytes"]
    print({key: found[key] for key in ("bit_equal", "bit_equal nf4", "model_over_peak")})
    options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
