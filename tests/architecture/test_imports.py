"""The rooms of the house: imports go one way, and none hides in a function."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "tunewise"

ORDER = [
    {"errors", "units"},
    {"recipe"},
    {"workload", "machine"},
    {"layers"},
    {"methods"},
    {"engine"},
    {"quality"},
    {"planner"},
    {"lab"},
    {"reproduce"},
    {"export"},
    {"report"},
    {"evaluation"},
    {"api"},
    {"curing"},
    {"tuning"},
    {"cli"},
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
OPTIONAL = {
    "bitsandbytes", "datasets", "flash_attn", "lm_eval", "mlflow", "peft", "pyarrow", "tensorboard",
    "torch.utils.tensorboard", "trackio", "wandb",
}  # fmt: skip
"""Optional back-ends: imported where they are needed, because they may not be installed."""


def files() -> list[Path]:
    return sorted(path for path in SOURCE.rglob("*.py") if path.name != "__main__.py")


def room_of(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []


def test_every_room_has_its_place() -> None:
    assert {room_of(file) for file in files()} - {"__init__", "embedded"} <= LEVEL.keys()
    assert len(files()) >= 50


def test_imports_go_one_way() -> None:
    wrong = []
    for file in files():
        if room_of(file) == "__init__":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            for name in imported(node):
                if name.startswith("tunewise."):
                    room = name.split(".")[1]
                    guarded = room == "methods" and room_of(file) == "recipe"  # a type only, under TYPE_CHECKING
                    if LEVEL[room] > LEVEL[room_of(file)] and not guarded:
                        wrong.append(f"{file.relative_to(SOURCE)} imports {name}")
    assert not wrong


def test_no_import_hides_in_a_function() -> None:
    hidden = []
    for file in files():
        if room_of(file) == "cli":
            continue
        for function in ast.walk(ast.parse(file.read_text())):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                for node in ast.walk(function):
                    for name in imported(node):
                        if name not in OPTIONAL and name.split(".")[0] not in OPTIONAL:
                            hidden.append(f"{file.relative_to(SOURCE)}:{node.lineno} {name}")  # type: ignore[attr-defined]
    assert not hidden


def test_names_say_something() -> None:
    empty_words = {"utils", "util", "helpers", "helper", "common", "manager", "misc", "tools"}
    assert not [file for file in files() if empty_words & set(file.stem.split("_"))]
