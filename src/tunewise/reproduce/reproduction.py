"""A reproduction: a source, its claims, and the experiment that tests them; and the result that it writes as JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tunewise.methods.precision import default_compute
from tunewise.recipe import Value
from tunewise.reproduce.bench import Bench, Size
from tunewise.reproduce.claim import Claim, Finding, Judged, Verdict, judge

Cell = str | int | float | None


class Table(Value):
    """Figures behind a verdict, for people to read.

    Attributes:
        title: what it shows, with the unit.
        columns: heads.
        rows: one cell a column; None prints as a dash.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Evidence:
    """What an experiment came to.

    Attributes:
        findings: for each claim's key what was found.
        tables: the figures behind them.
    """

    findings: Mapping[str, Finding]
    tables: tuple[Table, ...] = field(default=())


@dataclass(frozen=True)
class Reproduction:
    """One source's claims and how they are tested.

    Attributes:
        name: of the folder in `reproductions/` and on the command line.
        title: one line.
        source: where the claims stand.
        setting: what the source measured on what.
        here: what we measure instead.
        claims: with the tolerances, which are fixed before anything is measured.
        measure: the experiment.
        data: folders under the shared data that the experiment cannot do without.
        needs_bf16: whether it computes in bf16, for which a processor without such products takes hundreds of times as
            long.
    """

    name: str
    title: str
    source: str
    setting: str
    here: str
    claims: tuple[Claim, ...]
    measure: Callable[[Bench], Evidence]
    data: tuple[str, ...] = ()
    needs_bf16: bool = False

    def run(self, bench: Bench) -> Evidence:
        """Do the experiment; where data or products in bf16 are missing, say so for every claim."""
        missing = [name for name in self.data if bench.shared_folder(name) is None]
        reason = f"needs {', '.join(missing)} (see --shared)" if missing else ""
        if self.needs_bf16 and bench.size != Size.TINY and default_compute(torch.device("cpu")) != "bf16":
            reason = "this processor has no products in bf16"
        if reason:
            return Evidence({claim.key: Finding.untested(reason) for claim in self.claims})
        evidence = self.measure(bench)
        unknown = evidence.findings.keys() ^ {claim.key for claim in self.claims}
        if unknown:
            raise AssertionError(f"{self.name}: claims and findings do not match: {sorted(unknown)}")
        return evidence


class Result(Value):
    """What `tunewise reproduce` writes for one reproduction.

    Attributes:
        digest: of the experiment's source and the libraries' versions; another digest is another result.
        seconds: that the experiment took, over all calls that it needed.
        versions: libraries and the machine.
    """

    name: str
    title: str
    source: str
    setting: str
    here: str
    size: Size
    judged: tuple[Judged, ...]
    tables: tuple[Table, ...]
    digest: str
    seconds: float
    date: str
    versions: dict[str, str]

    def count(self, verdict: Verdict) -> int:
        """Return how many claims got this verdict."""
        return sum(each.verdict == verdict for each in self.judged)

    @property
    def summary(self) -> str:
        """The verdicts with their numbers, as "same 2, differs 1"."""
        return ", ".join(f"{verdict} {count}" for verdict in Verdict if (count := self.count(verdict)))


def judged_result(reproduction: Reproduction, evidence: Evidence, **circumstances: Any) -> Result:
    """Return the result of an experiment: every claim beside its finding, with the verdict."""
    return Result(
        name=reproduction.name,
        title=reproduction.title,
        source=reproduction.source,
        setting=reproduction.setting,
        here=reproduction.here,
        judged=tuple(judge(claim, evidence.findings[claim.key]) for claim in reproduction.claims),
        tables=evidence.tables,
        **circumstances,
    )
