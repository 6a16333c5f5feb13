"""Write docs/methods.md from the methods themselves, so that the cards cannot go stale.

python docs/make_method_cards.py            # write
python docs/make_method_cards.py --check    # fail when the file differs
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

from tunewise.methods import ALL
from tunewise.recipe import Method
from tunewise.units import format_bytes

FILE = Path(__file__).parent / "methods.md"
EFFECTS = Path(__file__).parents[1] / "benchmarks" / "results" / "cpu-2core" / "effects.json"

PROMISES = {
    "exact": "the same numbers, bit for bit",
    "rounding": "the same mathematics, other rounding",
    "learning": "another learning problem: compare validation losses",
}

HEAD = """# The methods

One card a method, made from its code by `python docs/make_method_cards.py`. A method is switched on by its presence in
a recipe:

```yaml
methods:
  lora: {rank: 16}
  checkpointing:
```

The order in which you write methods does not matter: each has a slot, and the slots are applied in a fixed order. The
promise says what a method may change in the numbers; `tests/laws` holds every method to it, alone and in pairs, and
every method to its formula (`tests/laws/test_every_method.py`).

"Measured here" is `{command}` on {machine}, the embedded model (four million weights),
{documents} documents a step of at most {max_length} tokens, alone, in {turns} turns: the most that tensors take in the
fullest step, the time of a step with the range of the turns, and the validation loss after {learning_steps} steps over
the same documents. It is one small model on one processor: a large model's memory and a GPU's speed are other numbers,
and so few steps say little about what is learnt.
"""


def effects() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(EFFECTS.read_text(encoding="utf-8"))
    return content


def measured(method: str, row: dict[str, Any] | None) -> str:
    """Say what a method did, from its row of the benchmark."""
    if row is None:
        return f"Measured here: not yet (`python benchmarks/effects/run.py --json OUT --only {method}`).\n"
    if "not_here" in row:
        return f"Measured here: nothing, because {row['not_here']}.\n"
    without, with_it, (ratio, low, high) = row["without"], row["with"], row["time_ratio"]
    base, changed = (_written(methods) for methods in row["methods"])
    return (
        f"Measured here: `{changed}` against `{base}`: memory x {row['memory_ratio']:.2f} "
        f"({format_bytes(without['peak_bytes'])} -> {format_bytes(with_it['peak_bytes'])}), time x {ratio:.2f} "
        f"({low:.2f} to {high:.2f}), validation loss {without['loss']:.3f} -> {with_it['loss']:.3f}"
        + (
            ""
            if without["learning_rate"] == with_it["learning_rate"]
            else f" (at rates of {without['learning_rate']:g} and {with_it['learning_rate']:g})"
        )
        + ".\n"
    )


def _written(methods: dict[str, Any]) -> str:
    """Write methods as a recipe would, fp32 left out."""
    shown = {name: options for name, options in methods.items() if options != {"compute": "fp32"}}
    return ", ".join(
        name + (f" {{{', '.join(f'{key}: {value}' for key, value in options.items())}}}" if options else "")
        for name, options in shown.items()
    )


def card(method: type[Method], row: dict[str, Any] | None) -> str:
    lines = [
        f"\n## `{method.name}`\n",
        f"Slot: {method.slot.name.lower()}. Promise: {method.fidelity} ({PROMISES[method.fidelity]}).\n",
    ]
    text, _, attributes = inspect.cleandoc(method.__doc__ or "").partition("Attributes:")
    lines.append(text.strip() + "\n")
    lines.append(measured(method.name, row))
    if method.model_fields:
        lines += ["| option | default |", "|---|---|"]
        lines += [f"| `{name}` | `{field.default!r}` |" for name, field in method.model_fields.items()]
    explained = inspect.cleandoc(attributes).strip() if attributes else ""
    if explained:
        lines += ["", "```text", explained, "```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    content = effects()
    rows = {row["method"]: row for row in content["rows"]}
    head = HEAD
    for name in ("command", "machine", "documents", "max_length", "turns", "learning_steps"):
        head = head.replace(f"{{{name}}}", str(content[name]))
    text = head + "".join(card(method, rows.get(method.name)) for method in ALL)
    if "--check" in sys.argv:
        return 0 if FILE.read_text(encoding="utf-8") == text else 1
    FILE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
