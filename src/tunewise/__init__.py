"""tunewise finds the cheapest way to fine-tune or train a language model well, proves it by experiment, and does it.

import tunewise
result = tunewise.train({"model": "embedded", "data": "stdlib"})
print(result.outcome.best_loss, result.saved.folder)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunewise.api import export_adapter, export_merged, export_rank, resume, sweep_scale, train
    from tunewise.errors import Conflict, DoesNotFit, InputError, MissingBackend, TunewiseError
    from tunewise.evaluation import evaluate
    from tunewise.export.parts import load_adapter
    from tunewise.export.quantized import load_quantized
    from tunewise.export.result import Result
    from tunewise.planner.plan import Plan, plan
    from tunewise.recipe import Recipe
    from tunewise.tuning import tune

_HOMES = {
    "train": "tunewise.api",
    "tune": "tunewise.tuning",
    "resume": "tunewise.api",
    "export_merged": "tunewise.api",
    "export_rank": "tunewise.api",
    "load_adapter": "tunewise.export.parts",
    "load_quantized": "tunewise.export.quantized",
    "evaluate": "tunewise.evaluation",
    "export_adapter": "tunewise.api",
    "sweep_scale": "tunewise.api",
    "Result": "tunewise.export.result",
    "plan": "tunewise.planner.plan",
    "Plan": "tunewise.planner.plan",
    "Recipe": "tunewise.recipe",
    "TunewiseError": "tunewise.errors",
    "InputError": "tunewise.errors",
    "Conflict": "tunewise.errors",
    "MissingBackend": "tunewise.errors",
    "DoesNotFit": "tunewise.errors",
}

__all__ = [
    "Conflict",
    "DoesNotFit",
    "InputError",
    "MissingBackend",
    "Plan",
    "Recipe",
    "Result",
    "TunewiseError",
    "evaluate",
    "export_adapter",
    "export_merged",
    "export_rank",
    "load_adapter",
    "load_quantized",
    "plan",
    "resume",
    "sweep_scale",
    "train",
    "tune",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import tunewise` (and `--help`) costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tunewise' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
