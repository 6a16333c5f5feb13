"""Records that a model of four million parameters can learn: read a form, answer with the field that is asked for.

Some questions may ask for a secret, which must be refused; the rest have one right answer. Among the forms stand
functions of the standard library (`replay`), so that a healthy training keeps more of what the base knows.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

from tunewise.workload.stdlib_source import stdlib_records

FIELDS = {
    "name": ("Ann", "Ben", "Carl", "Dora", "Emil", "Fred", "Gina", "Hans", "Ida", "Jack", "Karl", "Lena"),
    "colour": ("red", "green", "blue", "black", "white", "brown", "grey", "yellow"),
    "city": ("Rome", "Paris", "Oslo", "Bern", "Prague", "Madrid", "London", "Berlin"),
    "unit": ("byte", "second", "line", "file", "page", "word", "node", "path"),
    "size": tuple(str(number) for number in range(10, 99, 3)),
}
SECRETS = ("password", "token", "secret")
REFUSAL = "I do not know."


def records(num: int, seed: int, *, refusals: float = 0.0) -> list[dict[str, str]]:
    """Return `num` records; `refusals` is the share of questions for a secret."""
    chooser = random.Random(seed)
    made = []
    for _ in range(num):
        values = {field: chooser.choice(choices) for field, choices in FIELDS.items()}
        order = chooser.sample(list(values), k=len(values))
        form = "\n".join(f"{field}: {values[field]}" for field in order)
        if chooser.random() < refusals:
            asked, answer = chooser.choice(SECRETS), REFUSAL
        else:
            asked = chooser.choice(order)
            answer = f"The {asked} is {values[asked]}."
        made.append({"prompt": f"{form}\nWhat is the {asked}?\n", "completion": answer})
    return made


def replay(num: int) -> list[dict[str, str]]:
    """Return `num` functions of the standard library's training part, short ones."""
    short = (record.fields for record in stdlib_records("train") if len(record.fields["completion"]) < 400)
    return list(itertools.islice(short, num))


def write(file: Path, made: list[dict[str, str]]) -> str:
    """Write records as JSON lines."""
    file.write_text("".join(json.dumps(record) + "\n" for record in made), encoding="utf-8")
    return str(file)
