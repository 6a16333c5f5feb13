"""One model out of base and adapter: every LoRA layer becomes a plain linear layer that holds the update.

A quantized base is merged into what its packed weights stand for (that is what was trained), and comes out dense;
only QA-LoRA's update fits into the base's own bits.
"""

from __future__ import annotations

from torch import nn

from tunewise.errors import InputError, MissingBackend
from tunewise.layers.linear import PackedLinear
from tunewise.layers.lora import LoRALinear
from tunewise.methods.bottleneck import BottleneckAdapter
from tunewise.methods.method import Run
from tunewise.methods.peft import Peft
from tunewise.methods.qalora import QALoRA


def merge_adapters(run: Run) -> nn.Module:
    """Return the run's model without adapters, in its storage dtype; the run must not be used any more.

    Raises:
        InputError: the adapter is of a kind that has no merged form (prompts, for example).
    """
    if run.recipe.get(BottleneckAdapter) is not None:
        raise InputError("Bottleneck adapters have no merged form: they are not linear. Export the adapter.")
    peft_method = run.recipe.get(Peft)
    if peft_method is not None:
        return _merge_peft(run, peft_method)
    if run.streamer is not None:
        run.streamer.stop()
    for name, module in list(run.model.named_modules()):
        if isinstance(module, LoRALinear):
            run.model.set_submodule(name, module.merge(run.storage_dtype))
    if run.recipe.get(QALoRA) is not None:  # the update fits into the base's bits
        return run.model
    for name, module in list(run.model.named_modules()):
        if isinstance(module, PackedLinear):
            run.model.set_submodule(name, module.to_dense(run.storage_dtype))
    run.model.config.quantization_config = None  # type: ignore[union-attr]
    return run.model


def _merge_peft(run: Run, method: Peft) -> nn.Module:
    if method.is_prompt_learning:
        raise InputError(
            f"A {method.kind} adapter has no merged form: it lives beside the weights. Export the adapter."
        )
    try:
        import peft
    except ImportError:
        raise MissingBackend("peft", "merging this adapter", "peft") from None
    assert isinstance(run.model, peft.PeftModel)
    try:
        merged = run.model.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise InputError(f"peft cannot merge a {method.kind} adapter: {error}") from error
    assert isinstance(merged, nn.Module)
    return merged
