"""Dry runs' answers as plain data, for the cache: what JSON can hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from tunewise.engine.estimate import Estimate, Peak
from tunewise.engine.tracking import Kind, Moment
from tunewise.engine.work import Work, WorkKey

WorkTable = Mapping[WorkKey, Work]


def work_to_plain(work: WorkTable) -> list[list[Any]]:
    """Return a table of work as plain data."""
    return [
        [str(key.moment), key.operator, None if key.dtype is None else str(key.dtype), list(key.shape), *entry]
        for key, entry in work.items()
    ]


def work_from_plain(rows: Iterable[Sequence[Any]]) -> dict[WorkKey, Work]:
    """Read what `work_to_plain` wrote."""
    return {
        WorkKey(moment, operator, _dtype(dtype), tuple(shape)): Work(*entry)
        for moment, operator, dtype, shape, *entry in rows
    }


def _dtype(name: str | None) -> torch.dtype | None:
    found = None if name is None else getattr(torch, name.removeprefix("torch."))
    return found if isinstance(found, torch.dtype) else None


def estimate_to_plain(made: Estimate) -> dict[str, Any]:
    """Return a dry run's answer as plain data."""
    moments = {str(m): [{str(int(k)): v for k, v in p.kinds.items()}, p.host_bytes] for m, p in made.moments.items()}
    return {
        "moments": moments,
        "workspace": made.workspace_bytes,
        "context": made.context_bytes,
        "work": work_to_plain(made.work),
        "parameters": [made.trainable_parameters, made.total_parameters],
        "notes": list(made.notes),
    }


def estimate_from_plain(plain: Mapping[str, Any]) -> Estimate:
    """Read what `estimate_to_plain` wrote."""
    return Estimate(
        moments={
            Moment(name): Peak({Kind(int(kind)): size for kind, size in kinds.items()}, host)
            for name, (kinds, host) in plain["moments"].items()
        },
        workspace_bytes=plain["workspace"],
        context_bytes=plain["context"],
        work=work_from_plain(plain["work"]),
        trainable_parameters=plain["parameters"][0],
        total_parameters=plain["parameters"][1],
        notes=tuple(plain["notes"]),
    )
