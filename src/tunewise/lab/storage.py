"""Where finished trials are kept: Optuna studies, SQLite in the folder of the tuning or any URL that Optuna knows.

A trial is added when it has ended, in one transaction, with its whole outcome as an attribute. So a kill loses nothing
but the trial that was running, optuna-dashboard and Optuna's plots work, and a trial that was paid for is found again
by its key.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from tunewise.errors import InputError, StorageError
from tunewise.lab.outcome import Failed, Measurement, OutOfMemory, outcome_from_json

STUDIES: dict[str, tuple[str, ...]] = {
    "batch size": ("validation loss (nats per supervised token)",),
    "methods": ("seconds a step", "peak bytes of tensors"),
    "confirmation": ("validation loss (nats per supervised token)",),
    "cures": ("gain lost (nats per supervised token, below zero)", "forgetting (nats per token)"),
}
"""The studies of a tuning and what each one minimizes."""


class Storage:
    """The trials of one tuning."""

    def __init__(self, url: str, prefix: str) -> None:
        """Open (or make) the studies.

        Args:
            url: "sqlite:///path/study.db", "postgresql://...", ...
            prefix: put before the studies' names, so that tunings can share a storage.

        Raises:
            InputError: the storage cannot be opened.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.url = url
        try:
            self._storage = storage = optuna.storages.RDBStorage(url)
            self._studies = {name: self._open(storage, f"{prefix}{name}", metrics) for name, metrics in STUDIES.items()}
        except (SQLAlchemyError, StorageInternalError, ImportError, RuntimeError, ValueError) as error:
            raise InputError(f"The storage '{url}' cannot be opened: {_reason(error)}") from error
        self._known = {
            trial.user_attrs["key"]: outcome_from_json(trial.user_attrs["outcome"])
            for study in self._studies.values()
            for trial in study.get_trials(deepcopy=False)
            if "outcome" in trial.user_attrs
        }

    @staticmethod
    def in_folder(folder: Path) -> Storage:
        """Open the SQLite storage of a tuning's folder, or make it.

        It is made under another name and moved into its place whole: Optuna makes a table first and then the index that
        keeps a study's name unique, and a kill between the two would leave a storage in which studies stand twice.
        """
        folder.mkdir(parents=True, exist_ok=True)
        file = folder.resolve() / "study.db"
        if not file.exists():
            partial = file.with_name(f".{file.name}.partial")
            for left_by_a_kill in (partial, partial.with_name(f"{partial.name}-journal")):
                left_by_a_kill.unlink(missing_ok=True)
            Storage(f"sqlite:///{partial}", "")._storage.engine.dispose()
            partial.replace(file)
        return Storage(f"sqlite:///{file}", "")

    @staticmethod
    def _open(storage: Any, name: str, metrics: tuple[str, ...]) -> optuna.Study:
        directions = [optuna.study.StudyDirection.MINIMIZE] * len(metrics)
        study = optuna.create_study(storage=storage, study_name=name, directions=directions, load_if_exists=True)
        if study.metric_names != list(metrics):
            with warnings.catch_warnings(category=ExperimentalWarning, action="ignore"):
                study.set_metric_names(list(metrics))  # experimental since Optuna 3.2; names for its dashboard only
        return study

    def find(self, key: str) -> Measurement | OutOfMemory | Failed | None:
        """Return the outcome of a trial that has ended before, or None."""
        return self._known.get(key)

    def add(
        self,
        study: str,
        key: str,
        outcome: Measurement | OutOfMemory | Failed,
        *,
        params: Mapping[str, Any],
        values: Sequence[float] | None,
        attributes: Mapping[str, Any],
    ) -> None:
        """Keep a trial that has ended.

        Args:
            study: one of `STUDIES`.
            key: of the trial.
            outcome: what became of it.
            params: what was varied, by name.
            values: what the study minimizes; None for a trial that gave none.
            attributes: anything else worth seeing in a dashboard.

        Raises:
            StorageError: it cannot be written; trials that were kept before stay.
        """
        curve = outcome.curve if isinstance(outcome, Measurement) else ()
        is_single = len(STUDIES[study]) == 1
        trial = optuna.trial.create_trial(
            state=TrialState.FAIL if values is None else TrialState.COMPLETE,
            params=dict(params),
            distributions={name: _distribution(value) for name, value in params.items()},
            values=values,
            user_attrs={**attributes, "key": key, "outcome": outcome.model_dump_json()},
            intermediate_values={p.supervised_tokens: p.loss for p in curve} if is_single else {},
        )
        try:
            self._studies[study].add_trial(trial)
        except (SQLAlchemyError, StorageInternalError) as error:
            raise StorageError(
                f"A finished trial cannot be written to '{self.url}': {_reason(error)}. All earlier ones are kept; "
                "make room and start the same command again."
            ) from error
        self._known[key] = outcome


def _reason(error: Exception) -> str:
    """Return the first line of what went wrong; Optuna puts an error of its own around the database's."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ is not None else error
    return str(cause).splitlines()[0]


def _distribution(value: object) -> BaseDistribution:
    """The widest range of its kind, so that trials of one study agree whatever was tried first."""
    match value:
        case bool():
            return CategoricalDistribution((False, True))
        case int():
            return IntDistribution(0, 2**62)
        case float():
            return FloatDistribution(1e-12, 1e6, log=True)
        case _:
            raise TypeError(f"a parameter of a study must be a bool, an int or a float, not {value!r}")
