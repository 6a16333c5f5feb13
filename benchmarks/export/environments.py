"""A virtual environment for each tool, made once and kept: torch for the CPU, the tool, and what its parser imports.

Tools that pin half of PyPI are installed without their dependencies, and then with those that their parser imports.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch==2.13.0"
"""Installed first, so that no tool fetches another one with gigabytes of CUDA."""


@dataclass(frozen=True)
class Environment:
    """What pip is asked for, one call a line, after torch; the last line tells what was really tested."""

    calls: tuple[tuple[str, ...], ...]


ENVIRONMENTS = {
    "trl": Environment((("trl==1.16.0", "peft==0.21.2", "transformers==5.24.0"),)),
    "axolotl": Environment(
        (
            ("--no-deps", "axolotl==0.19.0", "trl==1.9.0", "optimum==1.16.2", "posthog==6.7.11"),
            (
                "transformers==5.16.1", "peft==0.20.0", "accelerate==1.13.0", "datasets==4.8.4", "pydantic==2.12.5",
                "huggingface_hub==1.17.0", "tokenizers==0.23.1", "addict", "art", "backoff", "colorama", "distro",
                "einops", "fire", "numba<1", "python-dotenv==1.0.1", "requests", "schedulefree==1.4.1", "scipy", "six",
                "tensorboard", "typer==0.25.1",
            ),
        )
    ),
    "llamafactory": Environment(
        (
            ("--no-deps", "llamafactory==0.9.5", "liger-kernel==0.8.1"),
            (
                "transformers==5.6.0", "peft==0.18.1", "accelerate==1.11.0", "datasets==4.0.0", "trl==0.24.0",
                "omegaconf==2.4.0",
            ),
        )
    ),
    "torchtune": Environment((("torchtune==0.6.1", "torchao==0.13.0"), ("--no-deps", "bitsandbytes"))),
    "unsloth": Environment(
        (
            ("--no-deps", "unsloth==2026.10.9"),
            ("certifi", "click", "json5", "nest-asyncio", "pydantic", "pyyaml", "rich", "structlog", "typer>=0.19"),
        )
    ),
}  # fmt: skip


def python_of(peer: str, cache: Path) -> Path:
    """Return the Python of the tool's environment, which is made when it is not there.

    Raises:
        RuntimeError: pip failed; carries what it said.
    """
    folder = cache / peer
    python, done = folder / "bin" / "python", folder / "complete"
    wanted = repr(ENVIRONMENTS[peer].calls)
    if done.is_file() and done.read_text() == wanted:
        return python
    _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    for call in ((TORCH,), *ENVIRONMENTS[peer].calls):
        _run([str(python), "-m", "pip", "install", "-q", *call])
    done.write_text(wanted)
    return python


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr[-2000:]}")
