"""Run reproductions one after another, keep each as soon as it is finished, and go on where a call was stopped."""

from __future__ import annotations

import ast
import datetime
import hashlib
import importlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from pydantic import ValidationError

from tunewise.engine.run_folder import versions, write_whole
from tunewise.errors import MissingBackend
from tunewise.reproduce.bench import Bench, Size
from tunewise.reproduce.claim import Finding, Verdict
from tunewise.reproduce.reproduction import Evidence, Reproduction, Result, judged_result

PACKAGE = "tunewise.reproduce"


class Keeper:
    """Keeps finished results in a folder, by name, size and digest."""

    def __init__(self, folder: Path, size: Size, shared: Path | None, say: Callable[[str], None]) -> None:
        self.folder, self.size, self.shared, self.say = folder, size, shared, say
        self.versions = versions()

    def result(self, reproduction: Reproduction) -> Result:
        """Return the result that is kept, or do the experiment and keep it.

        Raises:
            KeyboardInterrupt, Interrupted: stopped; the parts that are done stay for the next call.
        """
        kept = self.kept(reproduction)
        if kept is not None:
            return kept
        digest = digest_of(reproduction, self.versions, self.shared)
        place = self.folder / "work" / f"{reproduction.name}-{self.size}-{digest}"
        bench = Bench(self.size, place, self.shared, self.say)
        started = time.monotonic()
        try:
            evidence = reproduction.run(bench)
        except MissingBackend as error:
            reason = str(error).splitlines()[0]
            evidence = Evidence({claim.key: Finding.untested(reason) for claim in reproduction.claims})
        seconds = time.monotonic() - started + bench.seconds_before
        result = judged_result(
            reproduction,
            evidence,
            size=self.size,
            digest=digest,
            seconds=round(seconds, 1),
            date=datetime.datetime.now(datetime.UTC).date().isoformat(),
            versions=self.versions,
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self._file(reproduction, digest), as_json(result))
        shutil.rmtree(place, ignore_errors=True)
        return result

    def kept(self, reproduction: Reproduction) -> Result | None:
        """Return the finished result of this size, source and versions, or None."""
        file = self._file(reproduction, digest_of(reproduction, self.versions, self.shared))
        return read_result(file) if file.is_file() else None

    def _file(self, reproduction: Reproduction, digest: str) -> Path:
        return self.folder / f"{reproduction.name}-{self.size}-{digest}.json"


def as_json(result: Result) -> str:
    """Return a result as text."""
    return json.dumps(result.model_dump(mode="json"), indent=1) + "\n"


def read_result(file: Path) -> Result | None:
    """Return the result in `file`, or None where another version wrote it or it is damaged."""
    try:
        return Result.model_validate_json(file.read_text(encoding="utf-8"))
    except ValidationError:
        return None


def digest_of(reproduction: Reproduction, found_versions: dict[str, str], shared: Path | None) -> str:
    """Return twelve digits that change with the experiment's source, the libraries, and the data that it needs."""
    sources = [Path(str(module.__file__)).read_bytes() for module in _modules(reproduction.measure.__module__)]
    there = [name for name in reproduction.data if shared is not None and (shared / name).exists()]
    claims = [claim.model_dump(mode="json") for claim in reproduction.claims]
    asked = [reproduction.measure.__qualname__, reproduction.data, there, claims]
    content = json.dumps([asked, found_versions], sort_keys=True).encode()
    return hashlib.sha256(b"\0".join([*sources, content])).hexdigest()[:12]


def _modules(name: str) -> Sequence[ModuleType]:
    """Return the module of this name and those of this package that it imports, directly or not, by name."""
    found: dict[str, ModuleType] = {}
    waiting = [name]
    while waiting:
        module = importlib.import_module(waiting.pop())
        if module.__name__ in found:
            continue
        found[module.__name__] = module
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{PACKAGE}."):
                inside = (f"{node.module}.{alias.name}" for alias in node.names)
                waiting += [node.module, *(name for name in inside if name in sys.modules)]
    return [found[each] for each in sorted(found)]


def combined(results: Sequence[Result], failed: Sequence[str] = ()) -> dict[str, object]:
    """Return the content of `--json OUT`: counts of verdicts, the time, and every result."""
    return {
        "summary": {
            "reproductions": len(results),
            "claims": sum(len(result.judged) for result in results),
            **{str(verdict): sum(result.count(verdict) for result in results) for verdict in Verdict},
            "failed": list(failed),
            "seconds": round(sum(result.seconds for result in results), 1),
        },
        "results": [result.model_dump(mode="json") for result in results],
    }
