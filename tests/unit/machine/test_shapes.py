"""NVIDIA's shape rules with the guide's own numbers."""

from __future__ import annotations

import math

import pytest

from tunewise.machine.catalogue import find
from tunewise.machine.shapes import (
    LayerShapes,
    advice,
    arithmetic_intensity,
    num_tiles,
    padded,
    tile_efficiency,
    tokens_to_be_math_bound,
    wave_efficiency,
    waves,
)

GPT2 = LayerShapes(hidden_size=768, intermediate_size=3072, vocab_size=50257, num_attention_heads=12)
LLAMA_8B = LayerShapes(
    hidden_size=4096,
    intermediate_size=14336,
    vocab_size=128256,
    num_attention_heads=32,
    num_key_value_heads=8,
)


@pytest.mark.parametrize(
    ("M", "N", "K", "intensity"), [(8192, 128, 8192, 124.1), (8192, 8192, 8192, 2730.7), (8192, 1, 8192, 1.0)]
)
def test_arithmetic_intensity_of_the_guide(M: int, N: int, K: int, intensity: float) -> None:
    assert arithmetic_intensity(M, N, K) == pytest.approx(intensity, abs=0.05)


@pytest.mark.parametrize(("hidden", "tokens"), [(768, 445), (2048, 258), (4096, 229)])
def test_tokens_to_be_math_bound_on_an_h200(hidden: int, tokens: int) -> None:
    ridge = find("H200").ridge_point("bf16")
    exact = tokens_to_be_math_bound(ridge, hidden)
    assert round(exact) == tokens
    assert exact == pytest.approx(ridge * hidden / (hidden - 2 * ridge))


@pytest.mark.parametrize(("K", "N", "size"), [(4096, 14336, 2), (2048, 2048, 4), (4096, 1024, 1)])
def test_intensity_at_the_bound_is_the_ridge(K: int, N: int, size: int) -> None:
    tokens = 1000 * tokens_to_be_math_bound(150.0, K, N, size)
    assert 2 * tokens * N * K / (size * (tokens * K + 1000 * K * N + tokens * N)) == pytest.approx(150.0)


def test_a_narrow_layer_is_never_math_bound() -> None:
    assert tokens_to_be_math_bound(206.0, 400) == math.inf
    assert tokens_to_be_math_bound(206.0, 4096, 16) == math.inf


def test_tiles_and_waves() -> None:
    assert num_tiles(256, 128) == 1
    assert num_tiles(257, 128) == 2
    assert tile_efficiency(257, 128) == pytest.approx(257 / 512)
    # 108 multiprocessors: 27 x 4 tiles fill one wave, one tile more takes a second.
    assert waves(27 * 256, 4 * 128, 108) == 1
    assert wave_efficiency(27 * 256, 4 * 128, 108) == 1.0
    assert waves(109 * 256, 128, 108) == 2
    assert wave_efficiency(109 * 256, 128, 108) == pytest.approx(109 / 216)


def test_padding() -> None:
    assert padded(50257, 64) == 50304
    assert padded(50304, 64) == 50304


def test_vocabulary_is_padded_to_the_machines_multiple() -> None:
    on_a100 = advice(GPT2, find("A100 80GB"), "bf16", 8192)
    assert on_a100[0].sentence == "vocabulary 50257: pad to 50304 (multiple of 64)"
    assert (on_a100[0].value, on_a100[0].better) == (50257, 50304)
    on_t4 = advice(GPT2, find("T4"), "fp16", 8192)
    assert on_t4[0].sentence == "vocabulary 50257: pad to 50264 (multiple of 8)"


def test_unaligned_hidden_size_and_head_width_are_named() -> None:
    odd = LayerShapes(hidden_size=1000, intermediate_size=4096, vocab_size=512, num_attention_heads=20, head_dim=50)
    found = advice(odd, find("H100"), "bf16", 65536)
    about = {each.about: each.better for each in found if each.rule == "alignment"}
    assert about == {"hidden_size": 1024, "head_dim": 56}


def test_few_tokens_wait_for_memory() -> None:
    found = [each for each in advice(LLAMA_8B, find("H200"), "bf16", 128) if each.rule == "intensity"]
    # The narrowest product is key and value: 4096 -> 1024.
    needed = math.ceil(tokens_to_be_math_bound(find("H200").ridge_point("bf16"), 4096, 1024))
    assert [(each.about, each.better) for each in found] == [("tokens", needed)]
    assert str(needed) in found[0].sentence
    assert not [each for each in advice(LLAMA_8B, find("H200"), "bf16", needed) if each.rule == "intensity"]


def test_a_layer_too_narrow_is_said_to_be_so() -> None:
    tiny = LayerShapes(hidden_size=256, intermediate_size=1024, vocab_size=512, num_attention_heads=4)
    found = [each for each in advice(tiny, find("H100"), "bf16", 4096) if each.rule == "intensity"]
    assert any(each.better is None and "query projection" in each.sentence for each in found)


def test_wave_advice_names_a_number_of_tokens_that_is_better() -> None:
    machine = find("A100 80GB")
    found = {each.about: each for each in advice(LLAMA_8B, machine, "bf16", 1024) if each.rule == "waves"}
    # 4 x 32 tiles on 108 multiprocessors: two waves, 128 of 216 places busy; 3 x 32 tiles fit into one.
    one = found["attention output"]
    assert one.better == 768
    assert "128 tiles for 108 multiprocessors of A100 SXM 80GB, 2 waves, 59% busy" in one.sentence
    tiles = [(256, 128), (128, 256)]
    assert min(waves(one.value, 4096, 108, tile) for tile in tiles) == 2
    assert min(waves(one.better, 4096, 108, tile) for tile in tiles) == 1


def test_a_well_shaped_model_gets_no_advice() -> None:
    assert advice(LLAMA_8B, find("A100 80GB"), "bf16", 65536) == []
