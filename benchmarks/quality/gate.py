"""Plant failures in runs of the embedded model: does the gate refuse them, and does it let healthy runs be?

    python benchmarks/quality/gate.py --json gate.json [--keep FOLDER --minutes 2]

Failures of three kinds: trainings that go wrong (too long, too fast, wrong data, a bug in the loss), data that deceive
(a leaked validation set, an end that is never learnt), and files that are damaged after a healthy training (an empty
adapter, a wrong scale, a broken tie, another template). Each is caught when the gate refuses it, or when its files
cannot even be loaded. Healthy runs are judged at the end of their training and again from their files.

summary: {planted, caught, healthy, false_alarms}; every case says why it was refused, and whether for the reason that
was planted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from planted import HEALTHY, PLANTED, Workshop

from tunewise.errors import TunewiseError
from tunewise.evaluation import evaluate
from tunewise.quality.verdict import QualityReport


def main() -> None:
    """Run all cases and write what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument(
        "--keep", type=Path, help="a folder for the runs; cases that are finished there are not run again"
    )
    parser.add_argument("--minutes", type=float, default=1e9, help="begin nothing new after so long; needs --keep")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as temporary:
        shop = Workshop(options.keep or Path(temporary))
        cases: dict[str, tuple[Any, ...]] = {**{name: (make,) for name, make in HEALTHY.items()}, **PLANTED}
        found = {}
        for name, case in cases.items():
            if (options.only or "") in name and (time.monotonic() < end or result_of(name, shop).is_file()):
                found[name] = judged(name, *case, shop)
        healthy = [case for name, case in found.items() if name in HEALTHY]
        planted = [case for name, case in found.items() if name in PLANTED]
    summary = {
        "planted": len(planted),
        "caught": sum(case["refused"] for case in planted),
        "for_the_planted_reason": sum(case["expected"] in case["failed"] for case in planted),
        "healthy": len(healthy),
        "false_alarms": sum(case["refused"] for case in healthy),
        "share_of_training_time": max((case["share"] for case in healthy if case["share"]), default=None),
    }
    options.json.write_text(json.dumps({"summary": summary, "healthy": healthy, "planted": planted}, indent=1) + "\n")
    print(json.dumps(summary))


def judged(name: str, make: Callable[[Workshop], Path], *rest: Any) -> dict[str, Any]:
    """Make one case and judge it; `rest` is the check that should refuse it (planted cases) and the workshop."""
    *expected, shop = rest
    finished = result_of(name, shop)
    if finished.is_file():
        known: dict[str, Any] = json.loads(finished.read_text())
        return known
    started = time.perf_counter()
    report: QualityReport | None = None
    error = ""
    trained = None
    try:
        folder = make(shop)
        trained = shop.reports.get(folder)
        report = evaluate(folder).gate
    except TunewiseError as problem:
        error = f"{type(problem).__name__}: {problem}"
    failed = (
        ["error"] if error else [check.name for check in report.checks if check.status == "failed"] if report else []
    )
    refused = bool(failed) or (trained is not None and not trained.passed)
    case = {
        "name": name,
        "refused": refused,
        "failed": failed,
        "expected": expected[0] if expected else "",
        "reasons": [error] if error else list(report.reasons) if report else [],
        "share": trained.seconds / trained.training_seconds if trained and trained.training_seconds else None,
        "fraction": trained.fraction if trained else None,
        "training_seconds": trained.training_seconds if trained else None,
        "seconds": round(time.perf_counter() - started, 1),
        "checks": {c.name: c.measured.model_dump() for c in report.checks if c.measured} if report else {},
    }
    mark = "refused" if refused else "passed"
    print(f"{mark:<8} {name:<45} {'; '.join(case['reasons'])[:160]}", flush=True)
    finished.write_text(json.dumps(case))
    return case


def result_of(name: str, shop: Workshop) -> Path:
    """Return where a finished case lies."""
    return shop.folder / f"{'-'.join(name.split())}.json"


if __name__ == "__main__":
    main()
