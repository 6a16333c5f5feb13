"""Give the command line every bad input of a table, and check that it says what is wrong and loses nothing.

    python benchmarks/faults/bad_inputs.py --json bad_inputs.json --markdown docs/errors.md

The table is in `cases/`. Each case gets a folder of its own with a tiny model, good data and a killed run, spoils
something in it, and runs `tunewise.cli.main` there, in a process forked from this one, which has imported everything.
It is survived when

- the exit code is 2 (or 0 where the command rightly goes on with what is left),
- the error is all that stands on standard error: no traceback, no warnings of libraries around it,
- it says the words that the case expects: the file, line or field, and what to do,
- every file that was there before is there unchanged, byte for byte, but for those that the command is meant to change
  (and metrics.jsonl, whose lines must stay),
- no new run was begun, so the same command works once the mistake is mended.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from benchmarks.faults.cases import data, models, recipes, runs
from benchmarks.faults.cases.case import Case
from transformers import LlamaConfig, LlamaForCausalLM

import tunewise.cli
from tunewise.workload.model import EMBEDDED_FOLDER

CASES: tuple[Case, ...] = (*data.CASES, *recipes.CASES, *models.CASES, *runs.CASES)

PRELOADED = ("tunewise.api", "tunewise.report.terminal", "peft", "datasets", "pyarrow.parquet", "bitsandbytes")
"""What the forked processes need not import again; those that are not installed are passed over."""

METRICS = "run/metrics.jsonl"
"""The one file that a command may append to; the lines that were there must stay."""

LONGEST_SECONDS = 60.0
_BOX = re.compile(r"[│╭╮╰╯─]+")


@dataclass(frozen=True)
class Verdict:
    """What came of a case: the exit code, what the user saw, and what was wrong with that (nothing: survived)."""

    name: str
    command: str
    exit_code: int | None
    seen: str
    problems: tuple[str, ...]

    @property
    def survived(self) -> bool:
        """Whether nothing was wrong."""
        return not self.problems


def make_workshop(folder: Path) -> None:
    """Write what each case starts from: `model/`, `data.jsonl`, and `run/`, killed after step 5 of 6."""
    for name in PRELOADED:
        try:
            importlib.import_module(name)
        except ImportError:
            continue
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED_FOLDER / name, folder / "model" / name)
    records = ({"prompt": f"Question {number}: say it.\n", "completion": f"It is {number}."} for number in range(60))
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    recipe = {
        "training": {"steps": 6},
        "batch": {"documents": 4},
        "checkpoints": {"every": 2, "keep": 3},
        "evaluation": {"every": 6},
        "methods": {"lora": {"rank": 16}},
        "quality": "off",
        "device": "cpu",
    }
    settings = [word for key, value in recipe.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    exit_code, output, error = _run(
        folder, ("train", "--model", "model", "--data", "data.jsonl", "--out", "run", *settings)
    )
    if exit_code != 0:
        raise RuntimeError(f"The workshop's own run failed: {error}{output}")
    shutil.rmtree(folder / "run/adapter")
    shutil.rmtree(folder / "run/checkpoints/step-00000006")
    lines = (folder / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    last = next(index for index, line in enumerate(lines) if '"event": "step", "step": 6' in line)
    (folder / "run/metrics.jsonl").write_text("".join(lines[:last]), encoding="utf-8")


def cannot_try(case: Case) -> str | None:
    """Say why a case cannot be tried here, if so."""
    if case.needs == "mount" and os.geteuid() != 0:
        return "only root may mount a file system"
    return None


def try_case(case: Case, workshop: Path) -> Verdict:
    """Run one case in a copy of the workshop and judge what came of it."""
    with tempfile.TemporaryDirectory(prefix="tunewise-case-") as name, ExitStack() as stack:
        folder = Path(name).resolve() / "case"
        shutil.copytree(workshop, folder)
        case.spoil(folder)
        case.prepare(folder, stack)
        before, lines = _hashes(folder), _whole_lines(folder / METRICS)
        exit_code, output, error = _run(folder, case.arguments, case)
        after, more_lines = _hashes(folder), _whole_lines(folder / METRICS)
        begun = (folder / "out/recipe.yaml").exists()
    output, error = (text.replace(f"{folder}/", "").replace(str(folder), "/home/you") for text in (output, error))
    seen = output if case.exit_code == 0 else error
    lost = [
        f"{file} {'changed' if file in after else 'is gone'}"
        for file, digest in before.items()
        if after.get(file) != digest and not any(fnmatch.fnmatch(file, pattern) for pattern in case.may_change)
    ]
    if not more_lines.startswith(lines):
        lost.append(f"{METRICS} lost lines")
    problems = [*_complaints(case, exit_code, output, error), *lost]
    if begun and not case.begins_run:
        problems.append("a run was begun in out/, which stands in the way of a second try")
    return Verdict(case.name, " ".join(("tunewise", *case.arguments)), exit_code, _shown(seen), tuple(problems))


def _complaints(case: Case, exit_code: int | None, output: str, error: str) -> list[str]:
    problems = []
    if exit_code != case.exit_code:
        problems.append(f"exit code {exit_code}, not {case.exit_code}")
    if "Traceback" in error or "Traceback" in output:
        problems.append("a traceback")
    if case.exit_code == 0 and error:
        problems.append("something on standard error")
    if case.exit_code != 0 and not error.startswith(("error: ", "Usage: ")):
        problems.append("something before the error")
    text = " ".join(_BOX.sub(" ", output if case.exit_code == 0 else error).split())
    problems += [f"does not say: {words}" for words in case.says if " ".join(words.split()) not in text]
    return problems


def _shown(text: str) -> str:
    """Return what the user saw, at most its first twelve lines and last three."""
    lines = text.strip().splitlines()
    return "\n".join(lines if len(lines) <= 16 else [*lines[:12], "...", *lines[-3:]])


def _run(folder: Path, arguments: tuple[str, ...], case: Case | None = None) -> tuple[int | None, str, str]:
    """Run a command in `folder` in a forked process; return its exit code, standard output and standard error."""
    with tempfile.TemporaryDirectory() as name:
        output, error = Path(name, "stdout"), Path(name, "stderr")
        child = multiprocessing.get_context("fork").Process(
            target=_command, args=(folder, arguments, case, output, error)
        )
        child.start()
        child.join(LONGEST_SECONDS)
        if child.is_alive():
            child.kill()
            child.join()
            return None, output.read_text(encoding="utf-8"), f"still running after {LONGEST_SECONDS:.0f} s"
        return child.exitcode, output.read_text(encoding="utf-8"), error.read_text(encoding="utf-8")


def _command(folder: Path, arguments: tuple[str, ...], case: Case | None, output: Path, error: Path) -> None:
    """What the forked process does: the command line, with its output in files."""
    for number, file in ((1, output), (2, error)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    gc.disable()  # a collection would copy every page that is shared with the parent
    os.chdir(folder)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "100", "TERM": "dumb", "TOKENIZERS_PARALLELISM": "false"}
    torch.set_num_threads(1)
    sys.argv = ["tunewise", *arguments]
    with ExitStack() as stack:
        if case is not None:
            case.around(folder, stack)
        tunewise.cli.main()


def _hashes(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    hashes = {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    hashes.pop(METRICS, None)
    return hashes


def _whole_lines(file: Path) -> bytes:
    """Return a log up to its last line end: what may be appended to, and what a kill may have cut off, is left out."""
    content = file.read_bytes() if file.is_file() else b""
    return content[: content.rfind(b"\n") + 1]


def markdown(verdicts: list[Verdict]) -> str:
    """Return the table for the documentation."""
    lines = [
        "# What tunewise says about bad inputs",
        "",
        "Written by `python benchmarks/faults/bad_inputs.py --markdown docs/errors.md`; do not edit.",
        "Each line is a case that was tried: what was wrong, and what the user sees.",
        "The exit code is 2, unless tunewise rightly goes on.",
        "",
    ]
    for group in dict.fromkeys(verdict.name.split(": ")[0] for verdict in verdicts):
        lines += [f"## {group.capitalize()}", "", "| what is wrong | exit | what the user sees |", "|---|---|---|"]
        for verdict in verdicts:
            if verdict.name.startswith(f"{group}: "):
                seen = " <br> ".join(
                    f"`{line.strip().replace('`', chr(39)).replace('|', chr(92) + '|')}`"
                    for line in _BOX.sub(" ", verdict.seen).splitlines()
                    if line.strip()
                )
                lines.append(f"| {verdict.name.removeprefix(f'{group}: ')} | {verdict.exit_code} | {seen} |")
        lines.append("")
    return "\n".join(lines)


def main(json_file: Path | None, markdown_file: Path | None, only: str) -> int:
    started = time.monotonic()
    torch.set_num_threads(1)
    verdicts: list[Verdict] = []
    not_tried: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        make_workshop(Path(name))
        for case in CASES:
            if only not in case.name:
                continue
            reason = cannot_try(case)
            if reason is not None:
                not_tried[case.name] = reason
                continue
            verdict = try_case(case, Path(name))
            verdicts.append(verdict)
            if not verdict.survived:
                print(f"{verdict.name}\n  $ {verdict.command}", *verdict.problems, sep="\n  - ")
                print("  | " + verdict.seen.replace("\n", "\n  | "), flush=True)
    survived = sum(verdict.survived for verdict in verdicts)
    if json_file is not None:
        summary = {"tried": len(verdicts), "survived": survived, "seconds": round(time.monotonic() - started, 1)}
        cases = [{**asdict(verdict), "survived": verdict.survived} for verdict in verdicts]
        content = {"summary": summary, "not_tried": not_tried, "cases": cases}
        json_file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if markdown_file is not None:
        markdown_file.write_text(markdown(verdicts), encoding="utf-8")
    for case_name, reason in not_tried.items():
        print(f"not tried: {case_name} ({reason})")
    print(f"{len(verdicts)} tried, {survived} survived")
    return 0 if survived == len(verdicts) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=None, help="write every case and what came of it")
    parser.add_argument("--markdown", type=Path, default=None, help="write the table for the documentation")
    parser.add_argument("--only", default="", help="try only the cases whose name holds this")
    arguments = parser.parse_args()
    sys.exit(main(arguments.json, arguments.markdown, arguments.only))
