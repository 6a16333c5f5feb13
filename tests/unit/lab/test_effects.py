"""Effects that are known are found, inside their intervals; so is what was not measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from tunewise.lab.design import On, pair_terms, signs, two_level
from tunewise.lab.effects import EffectModel, cumulative, fit_effects
from tunewise.lab.outcome import Interval

SEEDS = range(20)


def anything(on: On) -> bool:
    return True


def needs_lora(on: On) -> bool:
    return "int8" not in on or "lora" in on


@dataclass
class Truth:
    """log y = 1 + sum b_i x_i + sum b_ij x_i x_j, with a few interactions of about 5 %."""

    names: list[str]
    seed: int
    num_pairs: int

    def __post_init__(self) -> None:
        self.chance = np.random.default_rng(self.seed)
        self.main = self.chance.normal(0, 0.15, len(self.names))
        every = list(itertools.combinations(range(len(self.names)), 2))
        chosen = self.chance.permutation(len(every))[: self.num_pairs]
        self.pairs = {every[number]: float(self.chance.normal(0, 0.05)) for number in chosen}

    def logarithm(self, on: On) -> float:
        x = signs(self.names, [on])[0]
        return 1.0 + float(self.main @ x) + sum(b * float(x[i] * x[j]) for (i, j), b in self.pairs.items())

    def measured(self, on: On, noise: float) -> float:
        return math.exp(self.logarithm(on) + noise * float(self.chance.normal()))


def fitted(truth: Truth, runs: list[On], noise: float) -> EffectModel:
    model = fit_effects(truth.names, runs, [truth.measured(on, noise) for on in runs])
    assert model is not None
    return model


def covers(interval: Interval, value: float) -> bool:
    return interval.low <= value <= interval.high


@pytest.mark.parametrize(
    ("count", "is_allowed"),
    [(3, anything), (5, anything), (6, anything), (6, needs_lora)],
    ids=["full", "fifth", "fraction", "holes"],
)
def test_intervals_cover(count: int, is_allowed: Callable[[On], bool]) -> None:
    names = ["lora", "int8", "bf16", "packing", "loss", "flash"][:count]
    design = two_level(names, is_allowed)
    alone = [frozenset({name, "lora"} if name == "int8" else {name}) for name in names]
    runs = list(dict.fromkeys([*design.runs, *alone]))
    main, pairs, fresh = [], [], []
    for seed in SEEDS:
        truth = Truth(names, seed, num_pairs=count // 2)
        if is_allowed is needs_lora:
            truth.pairs.pop((0, 1), None)  # what never happens has no effect
        model = fitted(truth, runs, 0.02)
        by_term = {effect.term: effect.ratio for effect in model.effects}
        main += [covers(by_term[name], math.exp(2 * b)) for name, b in zip(names, truth.main, strict=True)]
        for term, members in pair_terms(names, runs):
            total = sum(sign * truth.pairs.get((one, other), 0.0) for one, other, sign in members)
            pairs.append(covers(by_term[term], math.exp(4 * total)))
        combinations = [frozenset(c) for size in range(count + 1) for c in itertools.combinations(names, size)]
        for on in [on for on in combinations if is_allowed(on)][::5]:
            fresh.append(covers(model.predict(on), truth.measured(on, 0.02)))
    assert sum(main) >= 0.9 * len(main)
    assert sum(pairs) >= 0.9 * len(pairs)
    assert sum(fresh) >= 0.9 * len(fresh)


def test_repeats_of_a_full_factorial_give_students_intervals() -> None:
    """Nothing but the scatter of repeats is left where every combination was measured."""
    names = ["a", "b", "c"]
    truth = Truth(names, 0, num_pairs=1)
    model = fitted(truth, list(two_level(names).runs) * 4, 0.02)
    for effect in model.effects[:3]:
        width = math.log(effect.ratio.high / effect.ratio.low)
        student = 2 * 2 * 2.06 * 0.02 / math.sqrt(32)  # t with 24 degrees of freedom
        assert width == pytest.approx(student, rel=0.35)


def test_an_exact_product_has_no_interactions_and_no_residual() -> None:
    names = ["a", "b", "c", "d"]
    runs = list(two_level(names).runs)
    model = fit_effects(names, runs, [8.0 * 0.5 ** ("a" in on) * 1.5 ** ("b" in on) for on in runs])
    assert model is not None
    ratios = {effect.term: effect.ratio.middle for effect in model.effects}
    assert [ratios[name] for name in names] == pytest.approx([0.5, 1.5, 1.0, 1.0], rel=2e-3)
    assert max(abs(math.log(ratio)) for term, ratio in ratios.items() if " x " in term) < 2e-3
    assert model.residual_percent < 0.5
    assert model.predict(frozenset({"a", "b"})).middle == pytest.approx(6.0, rel=5e-3)


def test_interactions_that_cannot_be_told_apart_are_named_together_and_predicted_with_doubt() -> None:
    names = list("abcdef")
    truth = Truth(names, 1, num_pairs=0)
    truth.pairs = {(0, 1): 0.1}  # a x b, which the fraction cannot tell from c x e
    runs = list(two_level(names).runs)
    model = fitted(truth, runs * 2, 0.005)
    ratios = {effect.term: effect.ratio for effect in model.effects}
    assert ratios["a x b + c x e"].middle == pytest.approx(math.exp(0.4), rel=0.1)
    assert model.effects[6].term == "a x b + c x e"  # the largest comes first
    widths = {on: math.log((p := model.predict(on)).high / p.low) for on in (runs[3], frozenset("a"))}
    assert widths[frozenset("a")] > 3 * widths[runs[3]]


def test_what_was_never_measured_is_wide_and_not_wrong() -> None:
    names = ["a", "b", "never"]
    runs = [frozenset(c) for size in range(3) for c in itertools.combinations(names[:2], size)] * 2
    model = fit_effects(names, runs, [1.0, 0.5, 2.0, 1.0] * 2)
    assert model is not None
    never = next(effect.ratio for effect in model.effects if effect.term == "never")
    assert never.high / never.low > 100
    assert model.effects[0].ratio.middle == pytest.approx(0.5, rel=0.05)


def test_too_few_runs_and_what_is_not_finite() -> None:
    names = ["a", "b", "c"]
    runs = list(two_level(names).runs)
    assert fit_effects(names, runs[:5], [1.0] * 5) is None
    assert fit_effects(names, runs, [1.0] * 5 + [math.inf] * 3) is None
    assert fit_effects([], [frozenset()] * 5, [1.0] * 5) is None


def test_the_hugging_face_ladder_does_not_multiply() -> None:
    """BERT-large on a V100 (methods.md, A10): samples per second of the single methods, and of all together."""
    accumulation, checkpointing, fp16 = 7.75 / 8.86, 5.99 / 7.75, 18.64 / 8.86
    measured = 10.09 / 8.86
    found = cumulative([accumulation, checkpointing, fp16], Interval(middle=measured, low=measured, high=measured))
    assert found.product * 8.86 == pytest.approx(12.60, abs=0.005)
    assert found.synergy == pytest.approx(0.80, abs=0.005)
    assert found.whole.middle == measured
