"""The page: complete, self-contained, small, readable by everybody, and nothing that a user brings in runs in it."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from functools import cache
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from tests.unit.report.sample_batch import arms, batch
from tests.unit.report.samples import CASES, NASTY, findings, training
from tunewise.errors import StorageError
from tunewise.lab.outcome import Point
from tunewise.report.html import MOST_BYTES, embedded_json, page, prose, write_report

VOID = {"meta", "br", "img", "link", "input", "hr"}
CSS = (resources.files("tunewise.report") / "templates" / "report.css").read_text(encoding="utf-8")
NAMES = sorted(CASES)


class Reader(HTMLParser):
    """Collects elements, ids, headings, scripts and visible text, and checks that every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self.headings: list[int] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text))


@cache
def made(case: str) -> str:
    return page(CASES[case]())


@cache
def read(case: str) -> Reader:
    reader = Reader()
    reader.feed(made(case))
    reader.close()
    assert reader.open == []
    return reader


def charts(case: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(read(case).scripts[0])
    return found


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for each in value.values() for text in strings(each)]
    if isinstance(value, list):
        return [text for each in value for text in strings(each)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("case", NAMES)
def test_the_page_is_small_and_asks_for_nothing(case: str) -> None:
    assert len(made(case).encode()) < MOST_BYTES
    reader = read(case)
    allowed = {"html", "head", "body", "meta", "title", "style", "script"}
    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in reader.elements}
    assert allowed <= {tag for tag, _ in reader.elements}
    for _, attributes in reader.elements:
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith("#")
        assert not [name for name in attributes if name.startswith("on")]
    assert "url(" not in CSS
    assert "@import" not in CSS


@pytest.mark.parametrize("case", NAMES)
def test_the_policy_allows_exactly_the_two_scripts(case: str) -> None:
    reader = read(case)
    policy = next(each["content"] for each in reader.all("meta") if each.get("http-equiv"))
    assert "default-src 'none'" in policy
    hashes = re.findall(r"'sha256-([^']+)'", policy)
    data, *scripts = reader.scripts
    assert json.loads(data)
    assert [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts] == hashes
    assert "unsafe-inline" not in policy.split("style-src")[0]


@pytest.mark.parametrize("case", NAMES)
def test_people_who_cannot_see_it_get_it_too(case: str) -> None:
    reader = read(case)
    ids = [attributes["id"] for _, attributes in reader.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert reader.headings[0] == 1
    assert reader.headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(reader.headings, reader.headings[1:], strict=False))
    for link in reader.all("a"):
        assert link["href"][1:] in ids
    drawn = [each for each in reader.all("div") if "data-chart" in each]
    assert {each["data-chart"] for each in drawn} == set(charts(case))
    assert all(each["role"] == "img" and len(each["aria-label"]) > 20 for each in drawn)
    regions = [each for each in reader.all("div") if each.get("role") == "region"]
    assert len(regions) == len(reader.all("table"))
    assert all(each["tabindex"] == "0" and each["aria-label"] for each in regions)
    assert all(each.get("scope") in ("col", "row") for each in reader.all("th"))
    assert reader.all("html") == [{"lang": "en"}]


@pytest.mark.parametrize("case", NAMES)
def test_plotly_understands_every_figure(case: str) -> None:
    known = set(re.findall(r"(--[a-z0-9-]+):", CSS))
    for chart in charts(case).values():
        text = json.dumps(chart["figure"])
        used = set(re.findall(r"var\((--[a-z0-9-]+)\)", text))
        assert used <= known, "colours and fonts come from the style sheet"
        go.Figure(
            json.loads(
                re.sub(
                    r"var\(--(sans|serif|mono)\)",
                    "Arial",
                    re.sub(r"var\(--(?!s(?:ans|erif))[a-z0-9-]+\)", "#123456", text),
                )
            )
        )
        for path in chart["narrow"]:
            assert path.split(".")[0] in {*chart["figure"]["layout"], "margin", "legend"}


def test_nothing_that_a_user_brings_in_becomes_markup() -> None:
    reader = read("hostile")
    assert len(reader.all("script")) == 3
    assert reader.words.count(re.sub(r"\s+", " ", NASTY)[:60]) >= 15
    assert "{{7*7}}" in reader.words
    for chart in charts("hostile").values():
        for text in strings(chart):
            assert "<" not in re.sub(r"</?b>|<br>|<extra></extra>", "", text), (
                "plotly renders links and tags in its labels"
            )
    assert "\u2028" not in made("hostile").split('id="charts">')[1].split("</script>")[0]


def test_embedded_json_cannot_end_its_element() -> None:
    text = str(embedded_json({"a": "</script><!--&", "b": [float("nan"), float("inf"), 1.23456789012]}))
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"a": "</script><!--&", "b": [None, None, 1.234568]}


def test_prose_escapes_first() -> None:
    assert str(prose("a <b> in `x<y` for 30 s")) == "a &lt;b&gt; in <code>x&lt;y</code> for 30\u00a0s"


def test_hundreds_of_long_curves_still_fit() -> None:
    curve = tuple(Point(supervised_tokens=100 * step, loss=2.0 + 1 / (step + 1)) for step in range(2500))
    many = tuple(arm.model_copy(update={"curve": curve, "seed": seed}) for seed in range(20) for arm in arms())
    long = training(curve=curve, training_curve=curve * 8)
    text = page(findings(batch=batch(arms=many), training=long))
    assert len(many) > 600
    assert len(text.encode()) < MOST_BYTES


def luminance(colour: str) -> float:
    parts = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read_in_both_schemes(scheme: str) -> None:
    light, dark = (dict(re.findall(r"(--[a-z0-9-]+): (#[0-9a-f]{6});", block)) for block in CSS.split(":root {")[1:3])
    colours = light if scheme == "light" else dark
    assert set(light) == set(dark)
    for text in ("--ink", "--soft", "--chosen", "--bad"):
        for ground in ("--paper", "--card", "--chosen-wash", "--bad-wash"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    marks = ["--measured", "--predicted", "--rounding", "--dim-mark", *(f"--series-{n}" for n in range(1, 8))]
    for mark in marks:
        assert contrast(colours[mark], colours["--paper"]) >= 3.0, mark
    for cell in ("--less", "--neutral", "--more"):
        assert contrast(colours["--ink"], colours[cell]) >= 4.5, cell


def test_a_page_replaces_an_older_one_whole(tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "report.html"
    write_report(findings(), file)
    write_report(CASES["cut_short"](), file)
    assert file.read_text(encoding="utf-8") == made("cut_short")
    assert list(file.parent.iterdir()) == [file]


def test_a_page_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Cannot write the report"):
        write_report(findings(), tmp_path / "file" / "report.html")


def test_titles_are_escaped_once() -> None:
    assert html.escape("a&b") in page(findings(model="a&b"))
    assert "a&amp;amp;b" not in page(findings(model="a&b"))
