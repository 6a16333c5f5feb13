"""Blocks that are alike and blocks that are not, by what their modules are."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig, PretrainedConfig

from tests.estimate.test_dry_run import recipe_of
from tunewise.engine.extension import shallow_depths
from tunewise.engine.skeleton import block_kinds

SMALL = {
    "vocab_size": 500, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}


def config_of(architecture: str, depth: int, **options: Any) -> PretrainedConfig:
    return AutoConfig.for_model(architecture, **{**SMALL, "num_hidden_layers": depth, **options})


@pytest.mark.parametrize(
    ("architecture", "options", "pattern"),
    [
        ("llama", {}, "aaaaaaaaaaaa"),
        ("gemma2", {"sliding_window": 32}, "abababababab"),
        ("qwen3_moe", {**EXPERTS, "decoder_sparse_step": 3, "mlp_only_layers": [2]}, "aaaaabaabaab"),
        ("smollm3", {}, "aaabaaabaaab"),
        ("jamba", {"num_experts": 4, "mamba_dt_rank": 8}, "ababcbababab"),
    ],
)
def test_alike_blocks_have_one_word(architecture: str, options: dict[str, Any], pattern: str) -> None:
    kinds = block_kinds(config_of(architecture, 12, **options))
    letters = {kind: chr(ord("a") + number) for number, kind in enumerate(dict.fromkeys(kinds))}
    assert "".join(letters[kind] for kind in kinds) == pattern


def test_a_period_that_only_the_modules_show_is_found() -> None:
    config = config_of("jamba", 32, num_experts=4, mamba_dt_rank=8)
    depths = shallow_depths(config, recipe_of(config, {}))
    assert depths == (tuple(range(8)), tuple(range(16)))


def last_block_attends() -> PretrainedConfig:
    return config_of("bamba", 16, attn_layer_indices=[15], mamba_n_heads=8, mamba_d_state=16, mamba_d_head=16)


def test_a_list_of_some_blocks_numbers_is_renumbered() -> None:
    config = last_block_attends()
    assert shallow_depths(config, recipe_of(config, {})) == ((0, 1, 15), (0, 1, 2, 15))


def test_a_model_that_cannot_be_shortened_truly_is_traced_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    config = last_block_attends()
    monkeypatch.setattr("tunewise.engine.extension._NUMBERS_OF_BLOCKS", ())
    assert shallow_depths(config, recipe_of(config, {})) is None
