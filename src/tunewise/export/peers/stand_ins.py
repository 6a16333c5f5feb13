"""Methods that no other tool has: what is written in their place, said by name."""

from __future__ import annotations

from tunewise.export.peers.config import Missing, shown
from tunewise.methods import (
    FP8LM,
    AdamMini,
    AdamW,
    AdamW4bit,
    Apollo,
    Fused,
    Initialize,
    OffloadActivations,
    Pad,
    Stream,
)
from tunewise.methods.optimizers import AdamLike
from tunewise.recipe import Method, Recipe

_LEFT_OUT: dict[type[Method], str] = {
    Stream: "keeps all weights on the device",
    OffloadActivations: "keeps activations on the device",
    Fused: "has no such kernels for CPUs",
    Pad: "computes with the sizes as they are",
    Initialize: "keeps the architecture's own initialization",
}
_OPTIMIZERS: tuple[type[AdamLike], ...] = (AdamW4bit, AdamMini, Apollo, FP8LM)


def with_stand_ins(recipe: Recipe, tool: str) -> tuple[Recipe, list[Missing]]:
    """Return the recipe without methods that are ours alone, and what is missing of them in `tool`."""
    methods: list[Method] = []
    missing: list[Missing] = []
    for method in recipe.methods or ():
        reason = _LEFT_OUT.get(type(method))
        if isinstance(method, _OPTIMIZERS):
            reason = "has no such optimizer as we write it; AdamW stands in, with 8 bytes of moments a parameter"
            methods.append(
                AdamW(beta1=method.beta1, beta2=method.beta2, eps=method.eps, in_backward=method.in_backward)
            )
        elif reason is None:
            methods.append(method)
        if reason is not None:
            missing.append(Missing(method.name, shown(True), f"{tool} {reason}"))
            missing += [
                Missing(f"{method.name}.{option}", shown(getattr(method, option)), f"goes with {method.name}")
                for option in type(method).model_fields
                if not isinstance(method, AdamLike) or option not in AdamW.model_fields
            ]
    return recipe.replace(methods=tuple(methods)), missing
