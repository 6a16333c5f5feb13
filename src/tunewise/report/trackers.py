"""Experiment trackers that the user already has: TensorBoard, Weights & Biases, MLflow, trackio (`report_to`).

Each is an observer of the same events that go to `metrics.jsonl`; none is imported unless the recipe names it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tunewise.engine.assemble import Plan
from tunewise.errors import MissingBackend

LogScalars = Callable[[dict[str, float], int], None]

SCALARS = {
    "step": ("loss", "grad_norm", "learning_rate", "memory_bytes"),
    "evaluation": ("validation_loss",),
}
"""Which numbers of which event are reported."""


class Trackers:
    """Passes the numbers of a run on to every tracker that its recipe names."""

    def __init__(self) -> None:
        self._log: list[LogScalars] = []
        self._close: list[Callable[[], None]] = []

    def announce(self, plan: Plan, folder: Path) -> None:
        """Open the trackers of this run.

        Raises:
            MissingBackend: one that the recipe names is not installed.
        """
        for name in plan.recipe.report_to:
            log, close = _OPEN[name](plan, folder)
            self._log.append(log)
            self._close.append(close)

    def observe(self, entry: dict[str, Any]) -> None:
        """Pass on the numbers of one event; the last event closes the trackers."""
        names = SCALARS.get(entry["event"], ())
        if names:
            scalars = {f"train/{name}": float(entry[name]) for name in names}
            for log in self._log:
                log(scalars, int(entry["step"]))
        if entry["event"] == "finished":
            self.close()

    def close(self) -> None:
        """Close every tracker; a second call does nothing."""
        for close in self._close:
            close()
        self._log, self._close = [], []


def _open_tensorboard(plan: Plan, folder: Path) -> tuple[LogScalars, Callable[[], None]]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingBackend("tensorboard", "report_to: tensorboard", "tensorboard") from None
    writer = SummaryWriter(log_dir=str(folder / "tensorboard"))

    def log(scalars: dict[str, float], step: int) -> None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)

    return log, writer.close


def _open_wandb(plan: Plan, folder: Path) -> tuple[LogScalars, Callable[[], None]]:
    try:
        import wandb
    except ImportError:
        raise MissingBackend("wandb", "report_to: wandb", "wandb") from None
    run = wandb.init(project="tunewise", name=folder.name, dir=str(folder), config=plan.recipe.to_mapping())
    return lambda scalars, step: run.log(scalars, step=step), run.finish


def _open_mlflow(plan: Plan, folder: Path) -> tuple[LogScalars, Callable[[], None]]:
    try:
        import mlflow
    except ImportError:
        raise MissingBackend("mlflow", "report_to: mlflow", "mlflow") from None
    mlflow.start_run(run_name=folder.name)
    mlflow.log_dict(plan.recipe.to_mapping(), "recipe.json")
    return lambda scalars, step: mlflow.log_metrics(scalars, step=step), mlflow.end_run


def _open_trackio(plan: Plan, folder: Path) -> tuple[LogScalars, Callable[[], None]]:
    try:
        import trackio
    except ImportError:
        raise MissingBackend("trackio", "report_to: trackio", "trackio") from None
    trackio.init(project="tunewise", name=folder.name, config=plan.recipe.to_mapping())
    return lambda scalars, step: trackio.log({**scalars, "step": step}), trackio.finish


_OPEN: dict[str, Callable[[Plan, Path], tuple[LogScalars, Callable[[], None]]]] = {
    "tensorboard": _open_tensorboard,
    "wandb": _open_wandb,
    "mlflow": _open_mlflow,
    "trackio": _open_trackio,
}
