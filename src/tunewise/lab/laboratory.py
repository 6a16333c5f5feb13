"""The one place where trials are run: looked up first, run in a process of their own, kept, and counted as spent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunewise.lab.executor import Executor, finished_outcome
from tunewise.lab.findings import Cost
from tunewise.lab.outcome import Failed, Measurement, OutOfMemory
from tunewise.lab.storage import STUDIES, Storage
from tunewise.lab.trial import Trial

WORKER = "tunewise.lab.worker:run_trial"

SHORTEST_TIMEOUT = 60.0
"""No trial is stopped before; a machine may be busy."""

MOST_PACE = 5.0
"""Expectations are corrected by this factor at most."""

PATIENCE = 8.0
"""A trial may take so many times what was expected."""

Tell = Callable[[str, float], None]
"""Called before and after each trial with what is tried and the seconds that all trials so far have cost."""


@dataclass
class Spent:
    """What a part of the tuning has cost."""

    num_trials: int = 0
    num_failed: int = 0
    num_reused: int = 0
    seconds: float = 0.0
    expected_seconds: float = 0.0


@dataclass
class Laboratory:
    """Runs the trials of one tuning.

    Attributes:
        storage: where finished trials are kept.
        executor: how they are run.
        folder: gets a folder a trial, with its log.
        data_folder: the tokenized data.
        circumstances: what outcomes depend on besides the trial: fingerprints, machine, versions, memory limit.
        retry_failed: whether trials that failed before are tried again.
        tell: who watches.
        spent: by study.
        seen: keys of the trials that are counted in `spent`.
    """

    storage: Storage
    executor: Executor
    folder: Path
    data_folder: Path
    circumstances: dict[str, Any]
    retry_failed: bool = False
    tell: Tell = lambda what, seconds: None
    spent: dict[str, Spent] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)

    def run(
        self,
        study: str,
        trial: Trial,
        *,
        params: Mapping[str, Any],
        role: str,
        expected_seconds: float,
        function: str | None = None,
        **places: str,
    ) -> Measurement | OutOfMemory | Failed:
        """Return the outcome of `trial`: from the storage, or by running it.

        Args:
            study: one of `storage.STUDIES`.
            trial: what is tried.
            params: what the study varies, for its dashboard.
            role: what the trial is for, in words.
            expected_seconds: a trial that takes many times longer is stopped.
            function: "package.module:name", which does it (None: `WORKER`); gets `trial`, `data_folder`, `folder` and
                `places`.
            places: folders that the function needs besides, on which the outcome does not depend.
        """
        key = trial.key(self.circumstances)
        account = self.spent.setdefault(study, Spent())
        known = self.storage.find(key)
        if known is not None and not (self.retry_failed and isinstance(known, Failed)):
            if key not in self.seen:  # asked for twice in one tuning it was paid for once
                self._count(account, known, expected_seconds, is_reused=True)
            self.seen.add(key)
            return known
        self.tell(role, self.spent_seconds)
        # A trial that ended while we were killed has its outcome in its folder and was not kept.
        ended = finished_outcome(self.folder / key) if known is None else None
        outcome = ended or self.executor.run(
            function or WORKER,
            {
                "trial": trial.model_dump(mode="json"),
                "data_folder": str(self.data_folder),
                "folder": str(self.folder / key),
                **places,
            },
            self.folder / key,
            timeout=max(SHORTEST_TIMEOUT, PATIENCE * expected_seconds),
        )
        self.storage.add(
            study,
            key,
            outcome,
            params=params,
            values=_values(study, outcome),
            attributes={"role": role, "outcome kind": outcome.kind, "reason": getattr(outcome, "reason", "")},
        )
        self.seen.add(key)
        self._count(account, outcome, expected_seconds, is_reused=ended is not None)
        self.tell(role, self.spent_seconds)
        return outcome

    @property
    def spent_seconds(self) -> float:
        """What all trials of this tuning have cost, those that were found again included."""
        return sum(each.seconds for each in self.spent.values())

    def pace(self, study: str) -> float:
        """Return what the study's trials have taken over what was expected; 1 before the second one.

        It depends on kept outcomes only, so a tuning that is continued plans as the interrupted one did.
        """
        account = self.spent.get(study)
        if account is None or account.num_trials < 2 or account.expected_seconds <= 0:
            return 1.0
        return min(MOST_PACE, max(1 / MOST_PACE, account.seconds / account.expected_seconds))

    def costs(self) -> tuple[Cost, ...]:
        """Return the account, by study."""
        return tuple(
            Cost(
                part=name,
                num_trials=each.num_trials,
                num_failed=each.num_failed,
                num_reused=each.num_reused,
                seconds=each.seconds,
            )
            for name, each in self.spent.items()
        )

    @staticmethod
    def _count(
        account: Spent, outcome: Measurement | OutOfMemory | Failed, expected_seconds: float, *, is_reused: bool
    ) -> None:
        account.num_trials += 1
        account.num_failed += not isinstance(outcome, Measurement)
        account.num_reused += is_reused
        account.seconds += outcome.trial_seconds
        account.expected_seconds += expected_seconds


def _values(study: str, outcome: Measurement | OutOfMemory | Failed) -> tuple[float, ...] | None:
    """Return what the study minimizes, None where the outcome does not have all of it."""
    if not isinstance(outcome, Measurement):
        return None
    if len(STUDIES[study]) == 1:
        return None if outcome.loss is None else (outcome.loss,)
    if study == "cures":
        return _values_of_states(outcome)
    if outcome.step_seconds is None or outcome.peak_tensor_bytes is None:
        return None
    return outcome.step_seconds.middle, float(outcome.peak_tensor_bytes)


def _values_of_states(outcome: Measurement) -> tuple[float, float] | None:
    """Return (minus the gain, forgetting) of the state that gained most."""
    known = [(-s.gain.middle, s.forgetting.middle) for s in outcome.states if s.gain and s.forgetting]
    return min(known, default=None)
