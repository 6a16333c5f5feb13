"""What can be done to a finished run without training again: scale its change, average its states, export it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunewise.engine.finished import Finished, open_finished
from tunewise.engine.scaling import FACTORS, ScalePoint, best_within, sweep
from tunewise.errors import InputError
from tunewise.export.finish import Saved, cut_run, save_cut, save_merged, save_result
from tunewise.workload.general_text import DEFAULT, general_corpus
from tunewise.workload.model import context_length
from tunewise.workload.prepare import default_max_length


@dataclass(frozen=True)
class Sweep:
    """A sweep of the factor, and the factor to take: the lowest task loss within the budget; None when none is."""

    points: tuple[ScalePoint, ...]
    budget: float | None
    best: ScalePoint | None

    @property
    def base(self) -> ScalePoint:
        """The base model: factor 0."""
        return next(point for point in self.points if point.factor == 0.0)


def sweep_scale(
    folder: str | Path,
    *,
    factors: Sequence[float] = FACTORS,
    general_text: str | None = None,
    budget: float | None = None,
) -> Sweep:
    """Measure task and general loss of a finished run at several factors of its change; nothing is written.

    Args:
        folder: of the run.
        factors: where to look; 0, the base, is always among them.
        general_text: what forgetting is measured on; by default what the recipe names, else "default".
        budget: how much the general loss may rise, in nats per token; by default the recipe's, else no bound.

    Raises:
        InputError: there is no run, or no validation data.
        Conflict: the run's adapter cannot be scaled (PiSSA, peft's kinds).
    """
    finished = open_finished(folder, "scaled", with_line=True)
    assert finished.line is not None
    plan, spec = finished.plan, finished.plan.recipe.evaluation
    if len(plan.data.validation) == 0:
        raise InputError(f"The run in '{folder}' has no validation documents, so nothing says what a factor is worth.")
    general = plan.data.general
    if general is None or general_text is not None:
        general = general_corpus(
            general_text or spec.general_text or DEFAULT,
            "measured",
            plan.tokenizer,
            max_length=plan.recipe.data.max_length or default_max_length(context_length(plan.config)),
            max_tokens=spec.general_tokens,
        )
    wanted = sorted({0.0, *factors})
    points = sweep(finished.run, finished.line, wanted, plan.data.validation, general, spec.max_documents)
    budget = spec.forgetting_budget if budget is None else budget
    return Sweep(points, budget, best_within(points, budget))


def export_merged(
    folder: str | Path,
    destination: str | Path,
    *,
    rank: int | None = None,
    scale: float = 1.0,
    last: int = 1,
    others: tuple[str | Path, ...] = (),
) -> Saved:
    """Merge a finished run's adapter into its base and save one model, read again and compared.

    Args:
        folder: of the run.
        destination: a new folder.
        rank: of what 'dylora' trained, how many ranks; None: all of the adapter.
        scale: factor on what was trained, see `engine.scaling`.
        last: average so many of the newest checkpoints.
        others: average with these runs of the same base.

    Raises:
        InputError: there is no run, it has no checkpoint, or the destination is not empty.
        VerificationError: the saved model's logits differ from the trained one's.
    """
    target = _new(destination)
    finished = _opened(folder, scale, last, others)
    if rank is not None:
        cut_run(finished.run, rank)
    return save_merged(finished.run, finished.plan.tokenizer, target)


def export_adapter(
    folder: str | Path,
    destination: str | Path,
    *,
    scale: float = 1.0,
    last: int = 1,
    others: tuple[str | Path, ...] = (),
) -> tuple[Saved, float]:
    """Save a finished run's result anew, scaled or averaged, as `adapter/` or `model/` below `destination`.

    The arguments and errors are those of `export_merged`.

    Returns:
        What was saved, and the largest share of an averaged update that the adapter's rank could not hold.
    """
    target = _new(destination)
    finished = _opened(folder, scale, last, others)
    return save_result(finished.run, finished.plan.tokenizer, target), finished.lost


def export_rank(folder: str | Path, rank: int, destination: str | Path | None = None) -> Saved:
    """Save the first `rank` ranks of a finished DyLoRA run as an ordinary PEFT LoRA adapter, read again and compared.

    Args:
        folder: the run.
        rank: how many ranks.
        destination: a new folder; None: `adapter-rank-R` in the run's.

    Raises:
        InputError: as `export_merged`, or the run has no such rank.
        VerificationError: the saved adapter's logits differ from the trained one's.
    """
    target = _new(destination if destination is not None else Path(folder) / f"adapter-rank-{rank}")
    finished = open_finished(folder, "exported")
    return save_cut(finished.run, rank, finished.plan.tokenizer, target)


def _opened(folder: str | Path, scale: float, last: int, others: tuple[str | Path, ...]) -> Finished:
    if scale <= 0.0:
        raise InputError(f"--scale: a factor of {scale:g} is no fine-tuned model; 0 would be the base itself.")
    finished = open_finished(folder, "exported", last=last, others=others, with_line=scale != 1.0)
    if finished.line is not None:
        finished.line.move_to(scale)
    return finished


def _new(destination: str | Path) -> Path:
    target = Path(destination)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"The destination '{target}' is not empty; name a new folder.")
    return target
