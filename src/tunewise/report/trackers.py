"""Experiment trackers that the user already has: TensorBoard, Weights & Biases, MLflow, trackio (`report_to`).

Each is an observer of the same events that go to `metrics.jsonl`; none is imported unless the recipe names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tunewise.errors import MissingBackend
from tunewise.recipe import Recipe

LogScalars = Callable[[dict[str, float], int], None]
LogEvent = Callable[[dict[str, Any]], None]

SCALARS = {
    "step": {name: f"train/{name}" for name in ("loss", "grad_norm", "learning_rate", "memory_bytes")},
    "evaluation": {"validation_loss": "validation/loss"},
}
"""Which numbers of which event are reported, and under which names."""


@contextmanager
def open_trackers(recipe: Recipe, folder: Path) -> Iterator[LogEvent]:
    """Open the trackers that the recipe names; yield what passes the numbers of an event on to all of them.

    Raises:
        MissingBackend: one that the recipe names is not installed.
    """
    with ExitStack() as stack:
        logs = []
        for name in recipe.report_to:
            log, close = _OPEN[name](recipe, folder)
            stack.callback(close)
            logs.append(log)

        def log_event(entry: dict[str, Any]) -> None:
            names = SCALARS.get(entry["event"], {})
            scalars = {shown: float(entry[name]) for name, shown in names.items() if entry[name] is not None}
            for log in logs if scalars else ():
                log(scalars, int(entry["step"]))

        yield log_event


def _open_tensorboard(recipe: Recipe, folder: Path) -> tuple[LogScalars, Callable[[], None]]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingBackend("tensorboard", "report_to: tensorboard", "tensorboard") from None
    writer = SummaryWriter(log_dir=str(folder / "tensorboard"))

    def log(scalars: dict[str, float], step: int) -> None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)

    return log, writer.close


def _open_wandb(recipe: Recipe, folder: Path) -> tuple[LogScalars, Callable[[], None]]:
    try:
        import wandb
    except ImportError:
        raise MissingBackend("wandb", "report_to: wandb", "wandb") from None
    run = wandb.init(project="tunewise", name=folder.name, dir=str(folder), config=recipe.to_mapping())
    return lambda scalars, step: run.log(scalars, step=step), run.finish


def _open_mlflow(recipe: Recipe, folder: Path) -> tuple[LogScalars, Callable[[], None]]:
    try:
        import mlflow
    except ImportError:
        raise MissingBackend("mlflow", "report_to: mlflow", "mlflow") from None
    mlflow.start_run(run_name=folder.name)
    mlflow.log_dict(recipe.to_mapping(), "recipe.json")
    return lambda scalars, step: mlflow.log_metrics(scalars, step=step), mlflow.end_run


def _open_trackio(recipe: Recipe, folder: Path) -> tuple[LogScalars, Callable[[], None]]:
    try:
        import trackio
    except ImportError:
        raise MissingBackend("trackio", "report_to: trackio", "trackio") from None
    trackio.init(project="tunewise", name=folder.name, config=recipe.to_mapping())
    return lambda scalars, step: trackio.log(scalars, step=step), trackio.finish


_OPEN: dict[str, Callable[[Recipe, Path], tuple[LogScalars, Callable[[], None]]]] = {
    "tensorboard": _open_tensorboard,
    "wandb": _open_wandb,
    "mlflow": _open_mlflow,
    "trackio": _open_trackio,
}
