"""Write the pages of reproductions/ and docs/reproductions.md from the results that lie beside them.

python docs/make_reproductions.py                 # write the pages
python docs/make_reproductions.py --take OUT      # first take the results of `tunewise reproduce --json OUT`
python docs/make_reproductions.py --check         # fail when a page differs

Of a page the part from "## Same or not, and why" on is written by hand and kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tunewise.report.reproductions import page, table_of_all, table_of_claims
from tunewise.reproduce import ALL
from tunewise.reproduce.claim import Verdict
from tunewise.reproduce.keeping import as_json, read_result
from tunewise.reproduce.reproduction import Result

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "reproductions"
OVERVIEW = ROOT / "docs" / "reproductions.md"
BY_HAND = "## Same or not, and why"
NOT_YET = "Not measured yet:"

HEAD = """# Published results, tested again

`tunewise reproduce NAME` repeats a published experiment at the scale that this machine allows, and says for each claim
what the source says, what came out, and the verdict, by rules that were fixed before anything was measured
(`src/tunewise/reproduce/claim.py`):

- *same*: within the tolerance that the claim declares; *same direction*: on the side that the source says, where the
  number is not, or cannot be, the same (other hardware, other scale);
- *differs*: outside the tolerance, or not on that side. Such results are kept and explained on the reproduction's page;
- *not testable here*: not measured (mostly: it takes a GPU), or too noisy at this size.

Numbers of a source that nobody has checked are marked "from memory". Seconds are of the wall, and tell little where a
result was measured beside other work, as these were. This page is made from the results by
`python docs/make_reproductions.py`.

"""


def results() -> list[Result]:
    files = (FOLDER / each.name / "result.json" for each in ALL)
    found = [read_result(file) for file in files if file.is_file()]
    return [result for result in found if result is not None]


def pages(found: list[Result]) -> dict[Path, str]:
    made = {}
    for result in found:
        file = FOLDER / result.name / "README.md"
        _, mark, by_hand = (file.read_text(encoding="utf-8") if file.is_file() else "").partition(BY_HAND)
        made[file] = page(result) + f"\n{BY_HAND}\n" + (by_hand.removeprefix("\n") if mark else "")
    counts = ", ".join(f"{verdict}: {sum(each.count(verdict) for each in found)}" for verdict in Verdict)
    seconds = sum(each.seconds for each in found)
    names = {each.name for each in found}
    missing = [each.name for each in ALL if each.name not in names]
    not_yet = f"{NOT_YET} {', '.join(missing)}.\n\n" if missing else ""
    made[OVERVIEW] = (
        HEAD
        + f"{len(found)} reproductions, {sum(len(each.judged) for each in found)} claims; {counts}. All together took "
        f"{seconds / 60:.0f} minutes.\n\n{not_yet}{table_of_all(found)}\n\n"
        f"## What differs, and what could not be tested\n\n{table_of_claims(found)}\n"
    )
    return made


def take(file: Path) -> None:
    for content in json.loads(file.read_text(encoding="utf-8"))["results"]:
        result = Result.model_validate(content)
        folder = FOLDER / result.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").write_text(as_json(result), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--take", type=Path, metavar="OUT")
    options = parser.parse_args()
    if options.take is not None:
        take(options.take)
    made = pages(results())
    if options.check:
        stale = [file for file, text in made.items() if not file.is_file() or file.read_text(encoding="utf-8") != text]
        for file in stale:
            print(f"{file} differs from what its result says")
        return 1 if stale else 0
    for file, text in made.items():
        file.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
