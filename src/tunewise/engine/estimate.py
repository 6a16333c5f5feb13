"""A dry run's answer: bytes by kind and by moment, FLOPs and bytes moved by operator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tunewise.engine.tracking import Curve, Kind, Moment, Place
from tunewise.engine.work import Work, WorkKey


@dataclass(frozen=True)
class Peak:
    """The fullest instant of one moment, split by what the bytes are there for.

    Attributes:
        kinds: device bytes by kind; they sum up to `total_bytes`.
        host_bytes: copies in the host's memory besides (saving from a GPU); on a CPU they are among `kinds`.
    """

    kinds: Mapping[Kind, int]
    host_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All kinds together."""
        return sum(self.kinds.values())

    def with_copies_on_the_host(self) -> Peak:
        """Return the same peak of saving with its copies, which are temporaries, off the device."""
        kinds = {**self.kinds, Kind.TEMPORARIES: 0}
        return Peak(kinds, self.host_bytes + self.kinds[Kind.TEMPORARIES])


@dataclass(frozen=True)
class Estimate:
    """What a recipe needs for one step, evaluation and saving, without having run it.

    Attributes:
        moments: the peak of each part of the run.
        workspace_bytes: kept by the device's libraries from the first step on (see `DeviceProfile`).
        context_bytes: taken by the process besides what torch allocates.
        work: calls, FLOPs and bytes moved of one step (all its micro-batches that were traced) and one evaluation
            batch, by operator.
        trainable_parameters, total_parameters: numbers, not bytes; a packed weight counts as its unpacked numbers do
            not: as what is stored.
        notes: what the methods said while the run was built.
    """

    moments: Mapping[Moment, Peak]
    workspace_bytes: int = 0
    context_bytes: int = 0
    work: Mapping[WorkKey, Work] = field(default_factory=dict)
    trainable_parameters: int = 0
    total_parameters: int = 0
    notes: tuple[str, ...] = ()

    @property
    def peak_moment(self) -> Moment:
        """Where the peak is."""
        return max(self.moments, key=lambda moment: self.moments[moment].total_bytes)

    @property
    def peak(self) -> Peak:
        """The fullest instant of all."""
        return self.moments[self.peak_moment]

    @property
    def peak_bytes(self) -> int:
        """What torch's allocator holds at the fullest instant: all kinds and the workspace."""
        return self.peak.total_bytes + self.workspace_bytes

    @property
    def needed_bytes(self) -> int:
        """`peak_bytes` and what the process takes besides."""
        return self.peak_bytes + self.context_bytes

    def flops(self, *moments: Moment) -> float:
        """FLOPs of the given moments, of forward, backward and update when none is given."""
        chosen = moments or (Moment.FORWARD, Moment.BACKWARD, Moment.UPDATE)
        return sum(work.flops for key, work in self.work.items() if key.moment in chosen)


@dataclass(frozen=True, eq=False)
class Trace:
    """What one dry run saw of a model of `num_blocks` blocks.

    Attributes:
        curves: bytes alive at each place, by kind (see `tracking.Curve`).
        work: what the operators did.
        num_blocks: transformer blocks of the traced model.
        trainable_parameters, total_parameters: numbers that are learnt, and all.
        notes: what the methods said.
    """

    curves: Mapping[Place, Curve]
    work: Mapping[WorkKey, Work]
    num_blocks: int
    trainable_parameters: int
    total_parameters: int
    notes: tuple[str, ...]

    def peaks(self) -> dict[Moment, Peak]:
        """Return the fullest instant of each moment."""
        return highest((place.moment, curve) for place, curve in self.curves.items())


def highest(curves: Iterable[tuple[Moment, Curve]]) -> dict[Moment, Peak]:
    """Return for each moment the row with the largest sum of all its curves."""
    best: dict[Moment, Curve] = {}
    for moment, curve in curves:
        row = curve[curve.sum(axis=1).argmax()]
        if moment not in best or row.sum() > best[moment].sum():
            best[moment] = row
    return {moment: Peak({kind: int(row[kind]) for kind in Kind}) for moment, row in best.items()}
