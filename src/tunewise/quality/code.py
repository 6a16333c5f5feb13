"""pass@k: does the code that a model writes pass the tests that belong to the question?

Records in the forms of HumanEval (prompt, test, entry_point), MBPP (text, test_list) and whatever has a "test" or
"tests" field with assertions. The answers run in the sandbox.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tunewise.errors import InputError
from tunewise.quality.sandbox import Limits, run_python
from tunewise.quality.tasks import code_of


def program_of(fields: Mapping[str, Any], prompt: str, answer: str, origin: str) -> str:
    """Return the whole program: what the model wrote, and the tests.

    An answer that defines nothing of its own goes on where the prompt ended (HumanEval).

    Raises:
        InputError: the record has no tests.
    """
    code = code_of(answer)
    entry = fields.get("entry_point")
    if isinstance(entry, str) and f"def {entry}" not in code:
        code = prompt + code
    listed = fields.get("test_list", fields.get("tests"))
    if isinstance(listed, list) and listed:
        return "\n".join([str(fields.get("test_setup_code", "")), code, *map(str, listed)])
    test = fields.get("test")
    if not isinstance(test, str):
        raise InputError(f"{origin}: pass@1 needs tests: a field 'test', 'tests' or 'test_list' with assertions.")
    call = f"check({entry})" if isinstance(entry, str) and "def check(" in test else ""
    return f"{code}\n{test}\n{call}\n"


def passes(program: str, limits: Limits | None = None) -> bool:
    """Say whether a program runs to its end in the sandbox."""
    return run_python(program, limits).outcome == "passed"


def pass_at_k(num: int, correct: int, k: int) -> float:
    """Return the unbiased estimate of pass@k from `num` samples of which `correct` pass (Chen et al. 2021, eq. 1).

    Raises:
        ValueError: fewer samples than k.
    """
    if num < k:
        raise ValueError(f"pass@{k} needs {k} samples, not {num}")
    if num - correct < k:
        return 1.0
    return 1.0 - math.prod((num - correct - i) / (num - i) for i in range(k))
