"""`tunewise report RUN`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tests.unit.report.samples import findings
from tunewise.cli import report
from tunewise.errors import InputError

app = typer.Typer()
app.command()(report.run)


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    folder = tmp_path / "tuned"
    folder.mkdir()
    (folder / "findings.json").write_text(findings().model_dump_json(), encoding="utf-8")
    return folder


def test_it_writes_the_page_and_prints_the_summary(tuned: Path) -> None:
    done = CliRunner().invoke(app, [str(tuned)], catch_exceptions=False)
    assert done.exit_code == 0
    assert "Train with 4,096 supervised tokens a step" in done.output
    assert f"report  {tuned / 'report.html'}" in done.output.replace("\n", "")
    assert (tuned / "report.html").stat().st_size > 4_000_000


def test_the_page_can_go_elsewhere_and_be_opened(tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def launch(url: str) -> int:
        opened.append(url)
        return 0

    monkeypatch.setattr(typer, "launch", launch)
    file = tmp_path / "pages" / "a.html"
    done = CliRunner().invoke(app, [str(tuned), "--out", str(file), "--open"], catch_exceptions=False)
    assert done.exit_code == 0
    assert opened == [file.as_uri()]
    assert file.is_file()
    assert not (tuned / "report.html").exists()


def test_a_folder_without_findings(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"There is no findings\.json in"):
        CliRunner().invoke(app, [str(tmp_path)], catch_exceptions=False)


def test_it_needs_no_torch(tuned: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom tunewise.cli import report\n"
        f"report.run(Path({str(tuned)!r}), None, False)\n"
        "print([name for name in ('torch', 'transformers', 'numpy', 'plotly.graph_objs') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
