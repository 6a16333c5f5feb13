"""Write docs/methods.md from the methods themselves, so that the cards cannot go stale.

python docs/make_method_cards.py            # write
python docs/make_method_cards.py --check    # fail when the file differs
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

from tunewise.methods import ALL
from tunewise.recipe import Method

FILE = Path(__file__).parent / "methods.md"

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
promise says what a method may change in the numbers; `tests/laws` holds every method to it, alone and in pairs.
"""


def card(method: type[Method]) -> str:
    lines = [
        f"\n## `{method.name}`\n",
        f"Slot: {method.slot.name.lower()}. Promise: {method.fidelity} ({PROMISES[method.fidelity]}).\n",
    ]
    text, _, attributes = inspect.cleandoc(method.__doc__ or "").partition("Attributes:")
    lines.append(text.strip() + "\n")
    if method.model_fields:
        lines += ["| option | default |", "|---|---|"]
        lines += [f"| `{name}` | `{field.default!r}` |" for name, field in method.model_fields.items()]
    explained = inspect.cleandoc(attributes).strip() if attributes else ""
    if explained:
        lines += ["", "```text", explained, "```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    text = HEAD + "".join(card(method) for method in ALL)
    if "--check" in sys.argv:
        return 0 if FILE.read_text(encoding="utf-8") == text else 1
    FILE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
