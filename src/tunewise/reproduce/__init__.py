"""Published results of the methods, tested again here: what the source says, what we measured, same or not.

A reproduction is one file with one `Reproduction`: its claims with their tolerances, and the experiment. `claim` holds
the rules of the verdicts, `keeping` runs several and keeps what is finished, `learning` trains an arm, `timing` times.
"""

from __future__ import annotations

from tunewise.reproduce import (
    accumulation,
    batch_sweep,
    beta2,
    delta_tuning,
    equal_quality,
    flash_attention,
    forgetting,
    fp8_lm,
    hf_single_gpu,
    llama_adapter,
    lora_e2e,
    lora_rank,
    lora_rate,
    nf4,
    noise_scale,
    nvidia_shapes,
    optimizers,
    peft_costs,
    peft_for_code,
    precision,
    qa_lora,
    qdylora,
    qlora,
    torchtune,
    unknown_facts,
)
from tunewise.reproduce.reproduction import Reproduction

ALL: tuple[Reproduction, ...] = tuple(
    module.REPRODUCTION
    for module in (
        hf_single_gpu,
        batch_sweep,
        accumulation,
        equal_quality,
        precision,
        optimizers,
        torchtune,
        peft_costs,
        nf4,
        qlora,
        qa_lora,
        qdylora,
        llama_adapter,
        lora_rank,
        lora_e2e,
        delta_tuning,
        peft_for_code,
        fp8_lm,
        lora_rate,
        noise_scale,
        beta2,
        flash_attention,
        nvidia_shapes,
        forgetting,
        unknown_facts,
    )
)
"""Every reproduction, in the order in which `--all` runs them."""

BY_NAME: dict[str, Reproduction] = {reproduction.name: reproduction for reproduction in ALL}
