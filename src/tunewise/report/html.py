"""The report of a tuning: one HTML file that opens offline, with all that was found.

Everything is in the file: style, figures, and plotly.js once. A content security policy forbids any request, and allows
only the two scripts that are written here (by their hashes), so that no text of a user, a model or a file can run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from contextlib import suppress
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from tunewise.errors import StorageError
from tunewise.lab.findings import Findings
from tunewise.report.blocks import charts_of
from tunewise.report.sections import sections_of
from tunewise.report.sections.head import head_of

MOST_BYTES = 6_000_000
"""A report is smaller; long curves are thinned for that."""


UNITS = "%|µs|ms|s|min|h|B|KiB|MiB|GiB|nats|times"
"""Between a number and one of these no line is broken."""


def write_report(findings: Findings, file: Path) -> None:
    """Write the page, whole or not at all.

    Raises:
        StorageError: the file cannot be written.
    """
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(page(findings), encoding="utf-8")
        aside.replace(file)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise StorageError(f"Cannot write the report {file}: {error.strerror}.") from error


def page(findings: Findings) -> str:
    """Return the whole page."""
    sections = sections_of(findings)
    charts = {chart.id: {"figure": chart.figure, "narrow": chart.narrow} for chart in charts_of(sections)}
    plotly, script = get_plotlyjs(), _file("report.js")
    return _environment().get_template("report.html").render(
        version=findings.tunewise,
        head=head_of(findings),
        sections=sections,
        css=Markup(_file("report.css")),
        charts=embedded_json(charts),
        plotly=Markup(plotly),
        script=Markup(script),
        policy=policy(plotly, script),
    )  # fmt: skip


def embedded_json(value: Any) -> Markup:
    """Return JSON that cannot end the script element it stands in; a number that is not finite becomes null, a gap."""
    text = json.dumps(_rounded(value), separators=(",", ":"), allow_nan=False)  # ASCII only, so no U+2028 either
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _rounded(value: Any) -> Any:
    """Return the value with seven digits a number: more cannot be seen, and would be bytes."""
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value


def policy(*scripts: str) -> str:
    """Return the page's content security policy: these scripts, its own style, and nothing from anywhere."""
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    parts = ("default-src 'none'", f"script-src {hashes}", "style-src 'unsafe-inline'", "img-src data:")
    return "; ".join((*parts, "base-uri 'none'", "form-action 'none'"))


def prose(text: str) -> Markup:
    """Escape a sentence; what stands between backticks is set as code, and no line breaks before a unit."""
    whole = re.sub(rf"(?<=\d) (?=(?:{UNITS})(?!\w))", "\u00a0", str(escape(text)))
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", whole))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("tunewise.report"), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["prose"] = prose
    return environment


def _file(name: str) -> str:
    return (resources.files("tunewise.report") / "templates" / name).read_text(encoding="utf-8")
