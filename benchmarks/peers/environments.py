"""One virtual environment a tool, built once and kept in a cache folder.

Everything but torch comes as the tool's own requirements say; torch is the release that tunewise is measured with.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PACKAGES: dict[str, tuple[str, ...]] = {
    "trl": ("torch==2.13.0", "trl==1.16.*", "peft", "datasets", "accelerate", "bitsandbytes"),
    "litgpt": ("torch==2.13.0", "litgpt==0.5.*"),
}


def python_of(environment: str, cache: Path) -> Path:
    """Return the Python of an environment, which is built if it is not there.

    Raises:
        RuntimeError: pip could not install the tool; the message is pip's last line.
    """
    folder = cache / environment
    python = folder / "bin" / "python"
    done = folder / ".installed"
    if python.is_file() and (done.is_file() or _imports(python)):
        return python
    print(f"building the environment of {environment} in {folder}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    command = [str(python), "-m", "pip", "install", "-q", *PACKAGES[environment]]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip()] or ["no message"]
        raise RuntimeError(f"{environment} does not install: {lines[-1]}")
    done.touch()
    return python


def _imports(python: Path) -> bool:
    return subprocess.run([str(python), "-c", "import torch"], capture_output=True, check=False).returncode == 0


def torch_only_bytes(python: Path) -> int:
    """Return the peak resident size of a process of this environment that has only imported torch."""
    code = "import torch, resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    return int(subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout)
