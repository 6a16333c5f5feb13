"""The arithmetic inside single experiments, on numbers whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from tunewise.lab.outcome import Failed, Interval, Measurement
from tunewise.layers.dylora import DyLoRALinear
from tunewise.layers.lora import LoRALinear
from tunewise.reproduce import forgetting, lora_rate, nf4, unknown_facts
from tunewise.reproduce.claim import Verdict, judge
from tunewise.reproduce.flash_attention import _exponent
from tunewise.reproduce.hf_single_gpu import CLAIMS, LADDER, ROWS
from tunewise.reproduce.ladder_claims import findings_of, speed_ratio, synergy
from tunewise.reproduce.ladders.ladder import Row
from tunewise.reproduce.ladders.table import Measured
from tunewise.reproduce.optimizer_states import state_bytes
from tunewise.reproduce.qdylora import cut_first


def test_the_best_rate_is_found_between_the_rates_that_were_tried() -> None:
    rates = (1e-4, 1e-3, 1e-2, 1e-1)
    losses = tuple((math.log10(rate) + 2.3) ** 2 + 1 for rate in rates)
    assert lora_rate._lowest(rates, losses) == pytest.approx((-2.3, 1.0))
    assert lora_rate._lowest(rates, (1.0, 2.0, 3.0, 4.0)) == pytest.approx((-4.0, 1.0))


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_the_exponent_of_memory_does_not_see_what_is_constant(power: float) -> None:
    assert _exponent([round(10**9 + 50 * length**power) for length in (2048, 4096, 8192, 16384)]) == pytest.approx(
        power
    )


def test_a_parabola_is_explained_and_noise_is_not() -> None:
    kl = [0.0, 0.1, 0.2, 0.4]
    row = {"kl": kl, "points": [(0.0, 3.0 + 2 * x + x**2) for x in kl]}
    assert forgetting._explained([row, row]) == pytest.approx(1.0)
    noise = np.random.default_rng(0).normal(size=4)
    noisy = {"kl": kl, "points": [(0.0, float(each)) for each in noise]}
    assert forgetting._explained([row, noisy]) < 0.7


def test_facts_are_different_and_drawn_from_the_seed() -> None:
    made = unknown_facts.facts(3, 50)
    assert made == unknown_facts.facts(3, 50)
    assert made != unknown_facts.facts(4, 50)
    assert len({fact["prompt"].split(" of ")[1] for fact in made}) == 50


def test_a_set_is_learnt_at_its_first_good_moment() -> None:
    curve = [{"epoch": 0.0, "a": 0.1}, {"epoch": 2.0, "a": 0.95}, {"epoch": 4.0, "a": 0.8}]
    assert unknown_facts.learnt_at(curve, "a") == 2.0
    assert unknown_facts.learnt_at([{"epoch": 0.0, "a": 0.0}, {"epoch": 8.0, "a": 0.1}], "a") == 8.0


def test_integers_round_to_the_nearest_of_fifteen() -> None:
    weight = torch.linspace(-1, 1, 64)[None]
    rounded = nf4.rounded_weight(weight, "int4")
    assert len(set((7 * rounded).round(decimals=4).flatten().tolist())) == 15
    assert float((rounded - weight).abs().max()) <= 1 / 14 + 1e-6


def test_only_moments_count_as_state() -> None:
    assert state_bytes({"gradient": 1, "master": 2, "computed with": 2, "exp_avg": 1, "exp_avg_sq": 2}) == 3


@pytest.mark.parametrize("is_nested", [False, True])
def test_a_cut_adapter_is_its_first_ranks(is_nested: bool) -> None:
    base = nn.Linear(8, 6, bias=False)
    layer: LoRALinear = DyLoRALinear(base, 4, 4.0, True) if is_nested else LoRALinear(base, 4, 1.0)
    nn.init.normal_(layer.lora_A.weight)
    nn.init.normal_(layer.lora_B.weight)
    scale = 2.0 if is_nested else 1.0  # alpha / b against alpha / R
    update = scale * layer.lora_B.weight[:, :2] @ layer.lora_A.weight[:2]
    assert torch.allclose(cut_first(layer, 2).merged_weight(), base.weight + update, atol=1e-6)


def as_published(row: Row) -> Measured:
    assert row.published is not None
    speed = row.published.speed
    rate = Interval(middle=speed, low=0.99 * speed, high=1.01 * speed)
    return Measured(row, (Measurement(tokens_per_second=rate, peak_tensor_bytes=round(row.published.memory)),))


def test_a_ladder_that_came_out_as_published_agrees_with_every_claim() -> None:
    results = {row.name: as_published(row) for row in LADDER.rebuilt}
    findings = findings_of(LADDER, results, ROWS) | {"synergy": synergy(LADDER, results)}
    verdicts = {claim.key: judge(claim, findings[claim.key]).verdict for claim in CLAIMS}
    assert verdicts == {
        "memory order": Verdict.SAME, "memory ratio": Verdict.SAME, "synergy": Verdict.SAME,
        **dict.fromkeys(ROWS, Verdict.SAME_DIRECTION),
    }  # fmt: skip


def test_a_ladder_of_another_order_differs_and_says_where() -> None:
    results = {row.name: as_published(row) for row in LADDER.rebuilt}
    heavy = LADDER.row("batch 1 x 4")
    results[heavy.name] = Measured(heavy, (Measurement(peak_tensor_bytes=10**6),))
    findings = findings_of(LADDER, results, ())
    assert "batch 1 x 4" in findings["memory order"].reason
    assert findings["memory order"].middle == pytest.approx(1 - 4 / 36)  # four rows were heavier


def test_what_failed_is_not_testable() -> None:
    row = LADDER.row("batch 1 x 4")
    failed = Measured(row, (Failed(reason="refused here"),))
    assert speed_ratio(failed, as_published(LADDER.row("vanilla, batch 4"))).reason == "refused here"
