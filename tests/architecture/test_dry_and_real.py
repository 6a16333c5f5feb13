"""The dry step and the real one are the same code: every line where they part is named here, with its reason."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "tunewise"

PARTINGS = {
    # Handed to the run; real weights are moved to the device, fake ones are there already.
    "engine/build.py build": 1,
    "engine/build.py _settle_weights": 1,
    # The kernel of the device that is planned for, not of this one; and packed documents are proved not to see each
    # other by comparing values.
    "methods/attention.py apply": 2,
    # The largest rank needs most; a dry run draws none.
    "methods/dylora.py apply": 1,
    # Kernels are compiled, and modules proved to be what they are replaced by, by comparing values.
    "methods/fused.py apply": 2,
    # The head is proved to be what we take it for by comparing values.
    "methods/loss.py verified_head": 1,
    # CUDA's paged memory cannot be fake.
    "methods/optimizers.py apply": 1,
    # Some kinds of peft's read the weights, or turn masks into numbers of places.
    "methods/peft.py apply": 2,
    # tf32 is a switch of this process.
    "methods/precision.py apply": 1,
    # A card can be asked for its generation only where there is one.
    "methods/quantization.py _check_fp8": 1,
}
"""Functions that ask `is_dry`, how often, and why. None is in the step: runs part while they are built, only there."""

STEP = (
    "begin_step",
    "gradients",
    "clipped_norm",
    "update",
    "update_in_backward",
    "parameter_groups",
    "set_learning_rate",
)


def readers(file: Path) -> list[str]:
    """Return the functions of a file that read `is_dry`, a name for each time."""
    found = []
    for function in ast.walk(ast.parse(file.read_text())):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in ast.walk(function):
                if not (isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load)):
                    continue
                if (node.attr if isinstance(node, ast.Attribute) else node.id) == "is_dry":
                    found.append(f"{file.relative_to(SOURCE)} {function.name}")
    return found


def imports_of(file: Path, module: str) -> set[str]:
    """Return the names that a file takes from a module."""
    nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in nodes if node.module == module for alias in node.names}


def test_every_place_where_a_dry_run_parts_from_a_real_one_is_named() -> None:
    found = Counter(name for file in sorted(SOURCE.rglob("*.py")) for name in readers(file))
    assert found == PARTINGS


def test_the_step_never_asks() -> None:
    for name in ("step", "evaluate", "state", "schedule"):
        text = (SOURCE / "engine" / f"{name}.py").read_text()
        assert "is_dry" not in text
        assert "fake" not in text.lower()


def test_dry_run_measurement_and_training_call_the_same_step() -> None:
    engine = SOURCE / "engine"
    for name in ("dry_run.py", "measure.py", "train.py"):
        assert set(STEP) <= imports_of(engine / name, "tunewise.engine.step"), name
    for module, shared in (("evaluate", "summed_loss"), ("state", "capture"), ("build", "build")):
        assert shared in imports_of(engine / "dry_run.py", f"tunewise.engine.{module}")
    assert "summed_loss(" in (engine / "evaluate.py").read_text().split("def _mean_loss")[1]
    assert "capture" in imports_of(engine / "train.py", "tunewise.engine.state")
    assert "build" in imports_of(engine / "assemble.py", "tunewise.engine.build")
