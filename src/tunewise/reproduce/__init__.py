"""Published results of the methods, tested again here: what the source says, what we measured, same or not.

A reproduction is one file with one `Reproduction`: its claims with their tolerances, and the experiment. `claim` holds
the rules of the verdicts, `keeping` runs several and keeps what is finished, `learning` trains an arm, `timing` times.
"""

from __future__ import annotations

from tunewise.reproduce import accumulation, nf4, qa_lora
from tunewise.reproduce.reproduction import Reproduction

ALL: tuple[Reproduction, ...] = (
    accumulation.REPRODUCTION,
    nf4.REPRODUCTION,
    qa_lora.REPRODUCTION,
)
"""Every reproduction, in the order in which `--all` runs them."""

BY_NAME: dict[str, Reproduction] = {reproduction.name: reproduction for reproduction in ALL}
