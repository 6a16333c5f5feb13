"""A recipe as another trainer's own configuration: TRL, axolotl, LLaMA-Factory, torchtune, Unsloth.

Every setting of the recipe is written under the tool's name for it, or named as what the tool cannot honour; the export
fails when one is forgotten (`ledger`). Whether the tools accept what is written: `benchmarks/export/accept.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from tunewise.errors import InputError, did_you_mean
from tunewise.export.peers import axolotl, llamafactory, torchtune, trl, unsloth
from tunewise.export.peers.config import Case, Draft, Facts, Missing, PeerConfig, as_yaml
from tunewise.export.peers.ledger import Ledger, settings_of
from tunewise.export.peers.retention import ledger_without_retention
from tunewise.export.peers.source import stem_of
from tunewise.export.peers.stand_ins import with_stand_ins
from tunewise.methods.compatibility import refuse_conflicts
from tunewise.planner.plan import Plan
from tunewise.recipe import Recipe
from tunewise.workload.model import load_config


@dataclass(frozen=True)
class Peer:
    """A tool: its name for people, the version whose sources were read, and what writes its configuration."""

    name: str
    version: str
    draft: Callable[[Ledger, Case], Draft]
    interpolates: bool = False  # reads "${...}" in a text as a reference


PEERS: dict[str, Peer] = {
    "trl": Peer("TRL", trl.VERSION, trl.draft),
    "axolotl": Peer("axolotl", axolotl.VERSION, axolotl.draft),
    "llamafactory": Peer("LLaMA-Factory", llamafactory.VERSION, llamafactory.draft, interpolates=True),
    "torchtune": Peer("torchtune", torchtune.VERSION, torchtune.draft, interpolates=True),
    "unsloth": Peer("Unsloth", unsloth.VERSION, unsloth.draft),
}
"""The tools that a recipe can be exported for."""


def known_peer(name: str) -> Peer:
    """Return the tool of that name.

    Raises:
        InputError: there is none.
    """
    if name not in PEERS:
        raise InputError(f"export: there is no tool '{name}'.{did_you_mean(name, PEERS)}")
    return PEERS[name]


def file_name_of(name: str, peer: str) -> str:
    """Return what the file of an export is called."""
    return f"{name}.{peer}.yaml"


def facts_of(plan: Plan, is_whole_run: bool) -> Facts:
    """Return what a plan knows of the data; `is_whole_run` says whether its times are of a run whose end is known."""
    step, speed = plan.best.step_seconds.middle, plan.best.tokens_per_second.middle
    return Facts(
        tokens_per_step=speed * step, num_steps=round(plan.best.run_seconds.middle / step) if is_whole_run else None
    )


def peer_config(
    recipe: Recipe,
    peer: str,
    *,
    config: PretrainedConfig | None = None,
    facts: Facts | None = None,
    name: str | None = None,
    folder: Path | None = None,
) -> PeerConfig:
    """Return `recipe` as the configuration of another tool; nothing is written yet, see `PeerConfig.write`.

    Args:
        recipe: complete, as plans and run folders have it (else pass it through `tunewise.methods.complete`).
        peer: "trl", "axolotl", "llamafactory", "torchtune" or "unsloth".
        config: the model's configuration; read when it is not given.
        facts: tokens and steps, where known; they make packed steps and warm-up exact.
        name: what the file is called, without tool and ending; the model's name by default.
        folder: where the file will lie; the current one by default.

    Raises:
        InputError: no such tool, or it has nothing that the recipe could become.
        Conflict: the recipe contradicts itself.
    """
    tool = known_peer(peer)
    if recipe.methods is None or recipe.batch.micro_batch_size is None or recipe.data.max_length is None:
        raise ValueError("the recipe is not complete; pass it through tunewise.methods.complete first")
    refuse_conflicts(recipe)
    written, ours = with_stand_ins(recipe, tool.name)
    ledger, written = ledger_without_retention(written, tool.name)
    name, folder = name or stem_of(recipe.model.name), folder or Path()
    case = Case(written, config or load_config(recipe.model), facts or Facts(), name, folder)
    draft = tool.draft(ledger, case)
    ledger.close()
    ledger.missing += ours
    if tool.interpolates:
        _refuse_references(recipe, tool.name)
    file_name = file_name_of(name, peer)
    command = draft.command.replace("FILE", str(folder / file_name))
    head = [f"Written by tunewise for {tool.name} {tool.version} from the recipe {recipe.id}.", *draft.intro]
    head += [f"Run it with: {line}" for line in command.splitlines()]
    if ledger.missing:
        head += ["", f"Settings of the recipe that {tool.name} cannot honour as they stand:"]
        head += [f"  {missing}" for missing in ledger.missing]
    if ledger.notes:
        head += ["", "What else is different:", *(f"  {note}" for note in ledger.notes)]
    return PeerConfig(
        peer=peer,
        text=as_yaml(draft.content, head),
        file_name=file_name,
        command=command,
        mapped=dict(ledger.mapped),
        not_expressible=tuple(ledger.missing),
        notes=tuple(ledger.notes),
        companions=draft.companions,
    )


def _refuse_references(recipe: Recipe, tool: str) -> None:
    for setting, value in settings_of(recipe).items():
        if "${" in str(value):
            raise InputError(f"export: {tool} takes '${{' in {setting} for a reference. Rename it.")


__all__ = [
    "PEERS",
    "Facts",
    "Missing",
    "Peer",
    "PeerConfig",
    "facts_of",
    "file_name_of",
    "known_peer",
    "peer_config",
    "stem_of",
]
