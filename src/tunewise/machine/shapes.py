"""Which matrix shapes run well: NVIDIA's rules of alignment, quantization and arithmetic intensity.

Sources: NVIDIA, "Matrix Multiplication Background User's Guide" and "Linear/Fully-Connected Layers User's
    Guide";
wave arithmetic as in S. Bekman, ml-engineering ("Tile and wave quantization"). A product is (M, K) x (K,
N); in a linear layer's forward M is the micro-batch's tokens, K the input features and N the output
features.
"""

from __future__ import annotations

import math
from typing import Literal

from tunewise.machine.machine import DTYPE_BYTES, Dtype, Machine
from tunewise.recipe import PositiveInt, Value

TILE = (256, 128)
"""Rows and columns of the largest tile that cuBLAS commonly uses; it may lie either way."""

POOR_WAVE_EFFICIENCY = 0.75
"""Below this a matmul's last wave is worth a word."""


class LayerShapes(Value):
    """The numbers of a `config.json` that become dimensions of matrix products (Hugging Face's names)."""

    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    vocab_size: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None

    def width(self) -> int:
        """Return the width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def matmuls(self) -> dict[str, tuple[int, int]]:
        """Return (input features, output features) of the forward's matrix products by name."""
        query = self.num_attention_heads * self.width()
        key = (self.num_key_value_heads or self.num_attention_heads) * self.width()
        return {
            "query projection": (self.hidden_size, query),
            "key and value projection": (self.hidden_size, key),
            "attention output": (query, self.hidden_size),
            "feed-forward up": (self.hidden_size, self.intermediate_size),
            "feed-forward down": (self.intermediate_size, self.hidden_size),
            "vocabulary": (self.hidden_size, self.vocab_size),
        }


class Advice(Value):
    """One sentence about a shape, and what it is about."""

    rule: Literal["alignment", "intensity", "waves"]
    about: str
    value: int
    better: int | None
    sentence: str


def padded(value: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def arithmetic_intensity(M: int, N: int, K: int, bytes_per_element: int = 2) -> float:
    """Return FLOPs per byte moved of an (M, K) x (K, N) product: 2 M N K / (bytes (M K + K N + M N)).

    Source: NVIDIA matmul guide, section 2; 8192 x 128 x 8192 in fp16 gives 124.1.
    """
    return 2 * M * N * K / (bytes_per_element * (M * K + K * N + M * N))


def tokens_to_be_math_bound(
    ridge_point: float, in_features: int, out_features: int | None = None, bytes_per_element: int = 2
) -> float:
    """Return the tokens at which a linear layer's intensity reaches `ridge_point` (FLOP/B); inf for never.

    The intensity solved for the tokens, T = b r K N / (2 K N - b r (K + N)); for a square layer in 16 bits
    T = r h / (h - 2 r).
    """
    K, N = in_features, out_features or in_features
    room = 2 * K * N - bytes_per_element * ridge_point * (K + N)
    return bytes_per_element * ridge_point * K * N / room if room > 0 else math.inf


def num_tiles(M: int, N: int, tile: tuple[int, int] = TILE) -> int:
    """Return the number of tiles, each one thread block, that cover an (M, N) output."""
    return -(-M // tile[0]) * -(-N // tile[1])


def tile_efficiency(M: int, N: int, tile: tuple[int, int] = TILE) -> float:
    """Return which part of the tiles' area is output that somebody asked for."""
    return M * N / (num_tiles(M, N, tile) * tile[0] * tile[1])


def waves(M: int, N: int, num_multiprocessors: int, tile: tuple[int, int] = TILE) -> int:
    """Return how many rounds the multiprocessors need when each works on one tile at a time."""
    return -(-num_tiles(M, N, tile) // num_multiprocessors)


def wave_efficiency(M: int, N: int, num_multiprocessors: int, tile: tuple[int, int] = TILE) -> float:
    """Return the part of the multiprocessors' rounds that is busy: tiles / (waves x multiprocessors)."""
    return num_tiles(M, N, tile) / (waves(M, N, num_multiprocessors, tile) * num_multiprocessors)


def advice(shapes: LayerShapes, machine: Machine, dtype: Dtype, tokens: int) -> list[Advice]:
    """Return what the rules say about a model's shapes on `machine`, the weightiest rule first.

    Args:
        shapes: the model's dimensions.
        machine: where it runs.
        dtype: of the matrix products.
        tokens: rows of one micro-batch's products (documents times length, or packed tokens).

    Alignment of `tokens` is not advised about: rows of a flattened batch "usually have little to no impact"
    (S. Bekman, ml-engineering, against the guide's batch-of-8 rule), and aligning hidden sizes needs
    another model.

    Raises:
        InputError: the machine does not multiply in `dtype`.
    """
    found = _about_alignment(shapes, machine, dtype)
    found += _about_intensity(shapes, machine, dtype, tokens)
    if machine.kind == "cuda" and machine.num_multiprocessors is not None:
        found += _about_waves(shapes, machine.name, machine.num_multiprocessors, tokens)
    return found


def _about_alignment(shapes: LayerShapes, machine: Machine, dtype: Dtype) -> list[Advice]:
    multiple = machine.alignment(dtype)
    found: list[Advice] = []
    if shapes.vocab_size % multiple:
        better = padded(shapes.vocab_size, multiple)
        sentence = f"vocabulary {shapes.vocab_size}: pad to {better} (multiple of {multiple})"
        found.append(_alignment("vocab_size", shapes.vocab_size, better, sentence))
    fixed = {
        "hidden_size": shapes.hidden_size,
        "intermediate_size": shapes.intermediate_size,
        # Inside attention a head's width is a matmul dimension; its kernels ask for 16 bytes everywhere.
        "head_dim": shapes.width(),
    }
    for field, value in fixed.items():
        needed = min(multiple, 16 // DTYPE_BYTES[dtype]) if field == "head_dim" else multiple
        if value % needed:
            sentence = (
                f"{field} {value} is no multiple of {needed}: matmuls run below full speed on {machine.name} "
                f"in {dtype}; a model designed anew would take {padded(value, needed)}"
            )
            found.append(_alignment(field, value, padded(value, needed), sentence))
    return found


def _alignment(about: str, value: int, better: int, sentence: str) -> Advice:
    return Advice(rule="alignment", about=about, value=value, better=better, sentence=sentence)


def _about_intensity(shapes: LayerShapes, machine: Machine, dtype: Dtype, tokens: int) -> list[Advice]:
    ridge, size = machine.ridge_point(dtype), DTYPE_BYTES[dtype]
    needs = {
        name: tokens_to_be_math_bound(ridge, K, N, size)
        for name, (K, N) in shapes.matmuls().items()
        if name != "vocabulary"
    }
    never = [name for name, need in needs.items() if math.isinf(need)]
    reachable = [need for need in needs.values() if not math.isinf(need)]
    found: list[Advice] = []
    if reachable and tokens < max(reachable):
        enough = math.ceil(max(reachable))
        sentence = (
            f"{tokens} tokens a micro-batch: below {enough} tokens some matmuls wait for memory on "
            f"{machine.name} in {dtype} (ridge {ridge:.0f} FLOP/B); a larger micro-batch or packing is "
            f"faster per token"
        )
        found.append(Advice(rule="intensity", about="tokens", value=tokens, better=enough, sentence=sentence))
    if never:
        sentence = (
            f"{', '.join(never)}: too narrow to be bound by arithmetic on {machine.name} in {dtype} at any "
            f"batch (ridge {ridge:.0f} FLOP/B)"
        )
        hidden = shapes.hidden_size
        found.append(Advice(rule="intensity", about="hidden_size", value=hidden, better=None, sentence=sentence))
    return found


def _about_waves(shapes: LayerShapes, name: str, num_multiprocessors: int, tokens: int) -> list[Advice]:
    found: list[Advice] = []
    for matmul, (_, N) in shapes.matmuls().items():
        tile = max((TILE, TILE[::-1]), key=lambda way: wave_efficiency(tokens, N, num_multiprocessors, way))
        efficiency = wave_efficiency(tokens, N, num_multiprocessors, tile)
        rounds = waves(tokens, N, num_multiprocessors, tile)
        # With a single wave smaller tiles help and cuBLAS takes them; with two or more the tail is real.
        if rounds < 2 or efficiency >= POOR_WAVE_EFFICIENCY:
            continue
        better = _tokens_that_fill(rounds - 1, N, num_multiprocessors, tile)
        if better * rounds <= tokens * (rounds - 1):  # not more tokens a wave than now
            continue
        sentence = (
            f"{matmul}: {tokens} tokens make {num_tiles(tokens, N, tile)} tiles for {num_multiprocessors} "
            f"multiprocessors of {name}, {rounds} waves, {efficiency:.0%} busy; {better} tokens would take "
            f"{rounds - 1}"
        )
        found.append(Advice(rule="waves", about=matmul, value=tokens, better=better, sentence=sentence))
    return found


def _tokens_that_fill(num_waves: int, N: int, num_multiprocessors: int, tile: tuple[int, int]) -> int:
    """Return the most tokens that fit into `num_waves` waves; 0 when one row of tiles is already more."""
    return num_waves * num_multiprocessors // -(-N // tile[1]) * tile[0]
