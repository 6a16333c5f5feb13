from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from tests.unit.lab.synthetic import SyntheticLab
from tunewise.engine.noise_sums import NoiseSums
from tunewise.lab.arms import ArmResult, ArmSpec, half_life_kept, result_of
from tunewise.lab.batch_study import BatchQuestion, BatchStudy
from tunewise.lab.outcome import Failed, Interval, Measurement, OutOfMemory
from tunewise.lab.verdict import Verdict


@dataclass
class SyntheticArms:
    """Trains arms by a formula; the noise sums scatter around the critical batch as real ones do."""

    lab: SyntheticLab
    spent: float = 0.0
    overhead: float = 0.5
    breaks_at: tuple[int, ...] = ()
    runs: list[ArmSpec] = field(default_factory=list)

    def run(self, spec: ArmSpec) -> ArmResult:
        self.runs.append(spec)
        self.spent += self.seconds(spec.batch_tokens, spec.budget_tokens)
        if spec.batch_tokens in self.breaks_at:
            return result_of(spec, OutOfMemory(reason="full"))
        loss, curve, seconds = self.lab.train(
            spec.batch_tokens, spec.learning_rate, spec.beta2, spec.budget_tokens, spec.seed
        )
        if not math.isfinite(loss):
            return result_of(spec, Failed(reason="diverged"))
        rate = spec.budget_tokens / seconds
        measurement = Measurement(
            loss=loss,
            curve=curve,
            steps=math.ceil(spec.budget_tokens / spec.batch_tokens),
            training_seconds=seconds,
            tokens_per_second=Interval(middle=rate, low=rate, high=rate),
            noise_two_batch=self._sums() if spec.measures_noise else (),
        )
        return result_of(spec, measurement)

    def seconds(self, batch_tokens: int, budget_tokens: int) -> float:
        steps = math.ceil(budget_tokens / batch_tokens)
        return steps * (self.lab.t0_seconds + self.lab.t1_seconds * batch_tokens) + self.overhead

    @property
    def spent_seconds(self) -> float:
        return self.spent

    def _sums(self) -> tuple[NoiseSums, ...]:
        scatter = (0.6, 1.5, 0.8, 1.2, 0.9, 1.1, 1.4, 0.7)
        return tuple(NoiseSums(squared_norm=1.0 / s, variance=self.lab.critical_batch * s) for s in scatter)


def study(
    lab: SyntheticLab,
    *,
    seed: int = 0,
    budget_runs: float = 3.0,
    batch: int = 2048,
    run_tokens: int = 2_000_000,
    breaks_at: tuple[int, ...] = (),
    rate: float = 0.7,
) -> tuple[BatchStudy, Verdict]:
    arms = SyntheticArms(lab, breaks_at=breaks_at)
    run_seconds = arms.seconds(batch, run_tokens)
    question = BatchQuestion(
        batch_tokens=batch,
        learning_rate=rate * lab.best_learning_rate(batch),
        beta2=0.99,
        run_tokens=run_tokens,
        document_tokens=100.0,
        budget_seconds=budget_runs * run_seconds,
        run_seconds=lambda b: arms.seconds(b, run_tokens),
        seed=seed,
    )
    done = BatchStudy(arms, question)
    return done, done.answer()


def test_the_critical_batch_is_found_within_a_factor_of_two_in_nine_of_ten_seeds() -> None:
    lab, hits = SyntheticLab(critical_batch=4096.0), 0
    found = []
    for seed in range(10):
        _, verdict = study(lab, seed=100 * seed)
        middle = verdict.critical_batch.middle if verdict.critical_batch else math.nan
        found.append(round(middle) if math.isfinite(middle) else middle)
        hits += 2048 <= middle <= 8192
    assert hits >= 9, found


def test_the_answer_costs_little_and_loses_little() -> None:
    """The chosen batch at its rate is within the tie band of the best of all batches, at the run's length."""
    for seed in range(10):
        lab = SyntheticLab(critical_batch=4096.0)
        _, verdict = study(lab, seed=100 * seed)
        assert verdict.chosen is not None
        chosen = verdict.chosen
        beta2 = half_life_kept(0.99, chosen.batch_tokens / 2048)
        lost = lab.expected_loss(chosen.batch_tokens, chosen.learning_rate, beta2, 2_000_000)
        best = min(
            lab.expected_loss(2**k, lab.best_learning_rate(2**k), half_life_kept(0.99, 2**k / 2048), 2_000_000)
            for k in range(7, 17)
        )
        assert lost - best < 0.08, (seed, chosen, lost, best)


def test_the_budget_is_kept() -> None:
    for runs in (0.5, 1.0, 3.0, 10.0):
        done, _ = study(SyntheticLab(), budget_runs=runs)
        assert done.arms.spent_seconds <= 1.1 * done.question.budget_seconds


def test_equal_tokens_and_a_kept_half_life_in_each_round() -> None:
    done, _ = study(SyntheticLab())
    by_round: dict[int, set[int]] = {}
    for result in done.results[1:]:
        spec = result.spec
        by_round.setdefault(spec.rung, set()).add(spec.budget_tokens)
        assert spec.beta2 == half_life_kept(0.99, spec.batch_tokens / 2048)
    assert all(len(lengths) == 1 for lengths in by_round.values())
    assert sorted(by_round) == [0, 1, 2]


def test_every_candidates_rate_is_bracketed() -> None:
    done, _ = study(SyntheticLab(), budget_runs=10.0)
    for batch in {result.spec.batch_tokens for result in done.results if result.spec.rung == 1}:
        tried = {
            r.spec.learning_rate: r.loss for r in done.results if r.spec.batch_tokens == batch and r.spec.rung == 0
        }
        rates = sorted(tried)
        best = min(rates, key=lambda rate: tried[rate] or math.inf)
        assert best not in (rates[0], rates[-1]) or len(rates) >= 5


def test_two_seeds_at_the_end_when_the_budget_allows() -> None:
    done, verdict = study(SyntheticLab(), budget_runs=10.0)
    last = [r for r in done.results if r.spec.rung == 2]
    seeds = {batch: {r.spec.seed for r in last if r.spec.batch_tokens == batch} for batch in verdict.undecided}
    assert all(len(each) >= 2 for each in seeds.values())
    assert verdict.seed_noise is not None


def test_a_best_batch_at_the_edge_extends_the_range() -> None:
    lab = SyntheticLab(critical_batch=100_000.0)
    done, verdict = study(lab, batch=512, budget_runs=20.0, run_tokens=8_000_000)
    first = {r.spec.batch_tokens for r in done.results if r.spec.rung == 0}
    assert verdict.chosen is not None
    assert verdict.chosen.batch_tokens >= 4096
    assert max(first) > 512 * 4


def test_batches_that_cannot_be_told_apart_are_said_and_the_cheapest_is_taken() -> None:
    lab = SyntheticLab(critical_batch=1e9, seed_noise=0.03)  # every batch is as good
    unsure = 0
    for seed in range(10):
        _, verdict = study(lab, batch=4096, seed=100 * seed)
        assert verdict.chosen is not None
        tied = [point for point in verdict.curve if point.is_tied]
        assert verdict.chosen.run_seconds <= 1.02 * min(point.run_seconds for point in tied)
        assert any("could not tell" in sentence for sentence in verdict.sentences) == (len(verdict.undecided) > 1)
        unsure += len(verdict.undecided) > 1
    assert unsure >= 6


def test_a_batch_that_does_not_fit_is_no_answer() -> None:
    done, verdict = study(SyntheticLab(), breaks_at=(4096,), budget_runs=10.0)
    assert verdict.chosen is not None
    assert verdict.chosen.batch_tokens != 4096
    assert any(r.arm.outcome == "out of memory" for r in done.results)


def test_a_budget_for_nothing_keeps_the_users_batch() -> None:
    done, verdict = study(SyntheticLab(), budget_runs=0.02)
    assert verdict.chosen is not None
    assert verdict.chosen.batch_tokens == 2048
    assert len(done.results) == 1


def test_a_budget_for_no_comparison_of_batches_still_tunes_the_rate() -> None:
    """Of a rate that is a quarter of the best one, one or two doublings are found and nothing else is touched."""
    lab = SyntheticLab(seed_noise=0.0)
    one_arm = SyntheticArms(lab).seconds(2048, 8 * 2048)
    run = SyntheticArms(lab).seconds(2048, 2_000_000)
    done, verdict = study(lab, budget_runs=3.5 * one_arm / run, rate=0.25)
    assert verdict.chosen is not None
    assert {result.spec.batch_tokens for result in done.results} == {2048}
    assert verdict.chosen.learning_rate >= 0.49 * lab.best_learning_rate(2048)
    assert done.arms.spent_seconds <= done.question.budget_seconds


def test_the_same_arms_give_the_same_answer() -> None:
    assert study(SyntheticLab(), seed=3)[1] == study(SyntheticLab(), seed=3)[1]


@pytest.mark.parametrize("factor", [0.25, 1.0, 4.0])
def test_half_life_in_tokens(factor: float) -> None:
    beta2 = half_life_kept(0.99, factor)
    assert beta2 is not None
    steps = math.log(0.5) / math.log(beta2)
    assert steps * factor == pytest.approx(math.log(0.5) / math.log(0.99), rel=1e-2)
    assert half_life_kept(None, factor) is None


def losses(results: Sequence[ArmResult]) -> list[float | None]:
    return [result.loss for result in results]
