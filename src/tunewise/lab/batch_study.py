"""Which batch size gives the best result: arms of batch and learning rate, halved by rounds, compared at equal tokens.

    noise        one short arm at the user's batch measures the gradient noise scale on the way
    candidates   powers of two around it
    round 1      each candidate at three learning rates or more (square-root rule first, the best one bracketed)
    round 2      each candidate at its best rate, read off a parabola between those tried, three times as long
    round 3      the best and the cheaper ones that cannot be told from it, three times as long again, with seeds

Every arm decays its learning rate to zero and keeps Adam's second moment at one half-life in tokens. Short arms favour
small batches, which make more steps of few tokens; so what goes on is decided by the loss at the run's length, which a
curve through all arms predicts (`critical`). The answer is the cheapest batch that cannot be told from the best one.
See docs/batch-size.md for the procedure's source and where it departs from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from tunewise.lab.arms import ArmResult, Arms, ArmSpec, half_life_kept
from tunewise.lab.critical import LearningCurve, Observed, fit_learning_curve
from tunewise.lab.findings import NoiseScale
from tunewise.lab.noise_scale import noise_scale
from tunewise.lab.rates import lowest_rate
from tunewise.lab.verdict import SMALLEST_BAND, Verdict, judge

GROWTHS = (3.0, 2.0, 1.5)
"""Each round is so many times as long as the one before; less only where the budget asks for it."""

FEWEST_STEPS = 8
"""An arm of the first round has at least so many steps, even at the largest batch."""

FEWEST_RUN_STEPS = 30
"""A batch that leaves fewer steps for the whole run is no candidate."""

MOST_CANDIDATES = 6
MOST_RATES = 5
MOST_SEEDS = 4
FINALISTS = 3


@dataclass(frozen=True)
class BatchQuestion:
    """What the study starts from.

    Attributes:
        batch_tokens: supervised tokens a step of the user's recipe.
        learning_rate, beta2: at that batch.
        run_tokens: supervised tokens of the whole training.
        document_tokens: of a document on average: no batch is smaller.
        budget_seconds: for all arms together.
        run_seconds: what the whole training takes at a batch, from its measured speed.
        seed: of the first arm; further seeds count on.
    """

    batch_tokens: int
    learning_rate: float
    beta2: float | None
    run_tokens: int
    document_tokens: float
    budget_seconds: float
    run_seconds: Callable[[int], float]
    seed: int = 0


@dataclass
class BatchStudy:
    """Runs the arms; `answer` is the whole procedure."""

    arms: Arms
    question: BatchQuestion
    results: list[ArmResult] = field(default_factory=list)
    noise: tuple[NoiseScale, ...] = ()
    factor: float = 1.0

    def answer(self) -> Verdict:
        """Find the batch size.

        The study never spends more than its budget knowingly: where it does not suffice for all candidates, the ones
        farthest from the user's batch are left out, and the verdict says so; where it pays for no comparison of
        batches, the user's own is kept and its rate tuned as far as the budget goes.
        """
        question = self.question
        own = _power_of_two(question.batch_tokens)
        lengths = self._lengths([own // 2, own, own * 2]) or self._lengths([own // 2, own]) or self._lengths([own])
        length = lengths[0] if lengths else FEWEST_STEPS * own
        self._measure_noise(own, length)
        candidates, lengths = self._affordable(self._candidates(), lengths[0] if lengths else None)
        if lengths is not None:
            self._first_round(candidates, lengths[0])
            for batch in candidates:
                self._run(1, batch, self._best_rate(batch), lengths[1])
            candidates = self._extended(candidates, lengths)
            finalists = self._finalists(candidates, lengths)
            self._last_round(finalists, lengths[2])
        elif self._budget_left() >= self.arms.seconds(own, length):
            # Batches cannot be compared by so few steps (short arms favour small ones), but rates of one batch can.
            self._tune_rate(own, length)
        return judge(self.results, self.curve(), question.run_tokens, question.run_seconds)

    def curve(self) -> LearningCurve | None:
        """Return the curve through every batch's best arms, None where they are too few to tell."""
        best: dict[tuple[int, int], list[float]] = {}
        for result in self.results:
            if result.loss is not None and self._is_at_its_best(result):
                best.setdefault((result.spec.batch_tokens, result.spec.budget_tokens), []).append(result.loss)
        points = [Observed(batch, tokens, sum(losses) / len(losses)) for (batch, tokens), losses in best.items()]
        return fit_learning_curve(points)

    def _measure_noise(self, own: int, length: int) -> None:
        """The first arm: the user's own batch and rate; it is one of the first round as well."""
        first = self._run(0, own, self._rule(own), length, measures_noise=True)
        if first.measurement is not None:
            two, single = first.measurement.noise_two_batch, first.measurement.noise_per_example
            scales = (noise_scale("two batches", two), noise_scale("per example", single))
            self.noise = tuple(scale for scale in scales if scale.num_batches)

    def _candidates(self) -> list[int]:
        """Powers of two around the noise scale, the user's batch among them (as the nearest power)."""
        question = self.question
        known = [scale.tokens for scale in self.noise if scale.tokens is not None]
        centre = math.exp(sum(map(math.log, known)) / len(known)) if known else float(question.batch_tokens)
        highs = [scale.high for scale in self.noise if scale.high is not None]
        ceiling = 4 * max(highs) if highs else 16 * question.batch_tokens
        largest = max(question.batch_tokens, min(ceiling, question.run_tokens / FEWEST_RUN_STEPS))
        exponents = range(math.ceil(math.log2(max(1.0, question.document_tokens))), int(math.log2(largest)) + 1)
        near = sorted({2**exponent for exponent in exponents} | {_power_of_two(question.batch_tokens)})
        own = _power_of_two(question.batch_tokens)
        # At the noise scale a batch wastes half its tokens, so the best one lies below; the user's has its reasons too.
        middle = math.sqrt(centre / 4 * own)
        closest = sorted(near, key=lambda batch: abs(math.log2(batch / middle)))[: MOST_CANDIDATES - 1]
        return sorted({*closest, own})

    def _affordable(self, candidates: list[int], first: int | None) -> tuple[list[int], tuple[int, int, int] | None]:
        """Leave out the candidates farthest from the user's batch until a study fits into the budget, if it does.

        Args:
            candidates: batches.
            first: the length of the arm that has been trained, which is kept for the first round where it can be.
        """
        own = _power_of_two(self.question.batch_tokens)
        left = list(candidates)
        while len(left) > 1:
            lengths = self._lengths(left, first) or self._lengths(left)
            if lengths is not None:
                return left, lengths
            left.remove(max(left, key=lambda batch: (abs(math.log2(batch / own)), batch)))
        return left, None

    def _lengths(self, candidates: Sequence[int], first: int | None = None) -> tuple[int, int, int] | None:
        """Return the tokens of an arm in each round: as long as the budget allows, at most the whole run.

        Rounds grow by a factor of three where that is affordable, by less where it is not; None where not even rounds
        of the shortest arms are.

        Args:
            candidates: batches.
            first: the first round's length where it is given; else it is found.
        """
        longest, shortest = self.question.run_tokens, FEWEST_STEPS * max(candidates)
        start = shortest if first is None else first
        if not shortest <= start <= longest:
            return None
        growth = next((g for g in GROWTHS if self._cost(candidates, start, g) <= self._budget_left()), None)
        if growth is None:
            return None
        low, high = float(start), max(float(start), longest / growth**2 if first is None else start)
        for _ in range(30):
            middle = math.sqrt(low * high)
            is_affordable = self._cost(candidates, middle, growth) <= self._budget_left()
            low, high = (middle, high) if is_affordable else (low, middle)
        return round(low), min(round(growth * low), longest), min(round(growth**2 * low), longest)

    def _cost(self, candidates: Sequence[int], first: float, growth: float) -> float:
        """Return the expected seconds of a study whose first round has arms of `first` tokens."""
        seconds = self.arms.seconds
        rounds = [3 * seconds(b, round(first)) + seconds(b, round(growth * first)) for b in candidates]
        last = max(seconds(b, round(growth**2 * first)) for b in candidates)
        return sum(rounds) + 4 * last

    def _budget_left(self) -> float:
        return self.question.budget_seconds - self.arms.spent_seconds

    def _first_round(self, candidates: Sequence[int], length: int) -> None:
        """Tune the learning rate at each batch; the user's batch first, whose correction to the rule all others try."""
        own = _power_of_two(self.question.batch_tokens)
        for batch in sorted(candidates, key=lambda each: abs(math.log2(each / own))):
            self._tune_rate(batch, length)
            if batch == own:
                self.factor = self._best_rate(batch) / self._rule(batch)

    def _tune_rate(self, batch: int, length: int) -> None:
        """Try the rule's rate and twice that; then go on downhill until the best one lies between two others."""
        start = self._rule(batch) * self.factor
        losses = {exponent: self._loss(0, batch, start * 2**exponent, length) for exponent in (0, 1)}
        while len(losses) < MOST_RATES:
            best = min(losses, key=lambda exponent: losses[exponent])
            step = {min(losses): min(losses) - 1, max(losses): max(losses) + 1}.get(best)
            if step is None or self._budget_left() < self.arms.seconds(batch, length):
                break
            losses[step] = self._loss(0, batch, start * 2**step, length)

    def _rule(self, batch: int) -> float:
        """The square-root rule (Malladi et al. 2022, arXiv 2205.10287)."""
        return self.question.learning_rate * math.sqrt(batch / self.question.batch_tokens)

    def _loss(self, rung: int, batch: int, rate: float, length: int) -> float:
        loss = self._run(rung, batch, rate, length).loss
        return math.inf if loss is None else loss

    def _run(
        self, rung: int, batch: int, rate: float, length: int, seed: int = 0, *, measures_noise: bool = False
    ) -> ArmResult:
        spec = ArmSpec(
            rung=rung,
            batch_tokens=batch,
            learning_rate=float(f"{rate:.4g}"),
            beta2=half_life_kept(self.question.beta2, batch / self.question.batch_tokens),
            seed=self.question.seed + seed,
            budget_tokens=length,
            measures_noise=measures_noise,
        )
        known = next((r for r in self.results if replace(r.spec, measures_noise=measures_noise) == spec), None)
        if known is None:
            known = self.arms.run(spec)
            self.results.append(known)
        return known

    def _best_rate(self, batch: int) -> float:
        """Return the rate at which the first round's losses are lowest, between those tried, else the rule's."""
        losses = self._tried_rates(batch)
        return lowest_rate(losses)[0] if losses else self._rule(batch) * self.factor

    def _tried_rates(self, batch: int) -> dict[float, float]:
        """Return the first round's loss by learning rate; the arm that measured noise, of another length, gives way."""
        return {
            result.spec.learning_rate: result.loss
            for result in self.results
            if result.spec.batch_tokens == batch and result.spec.rung == 0 and result.loss is not None
        }

    def _is_at_its_best(self, result: ArmResult) -> bool:
        """Whether the arm had the best of the rates that its round tried; later rounds try one."""
        tried = self._tried_rates(result.spec.batch_tokens)
        return result.spec.rung > 0 or result.spec.learning_rate == min(tried, key=lambda rate: tried[rate])

    def _extended(self, candidates: list[int], lengths: tuple[int, int, int]) -> list[int]:
        """Add batches beyond the edge as long as the best one lies there and the budget allows it."""
        question = self.question
        known = sorted(candidates)
        while True:
            best = min(known, key=lambda batch: self._expected(batch, lengths[1]))
            wider = best * 2 if best == known[-1] else best // 2 if best == known[0] else None
            smallest, largest = question.document_tokens, question.run_tokens / FEWEST_RUN_STEPS
            if wider is None or not smallest <= wider <= largest:
                return known
            seconds = self.arms.seconds
            cost = 3 * seconds(wider, lengths[0]) + seconds(wider, lengths[1])
            if self._budget_left() < cost + 4 * seconds(best, lengths[2]):
                return known
            self._tune_rate(wider, lengths[0])
            self._run(1, wider, self._best_rate(wider), lengths[1])
            known = sorted([*known, wider])

    def _expected(self, batch: int, measured_at: int) -> float:
        """Return the loss to expect of a batch at the run's length: measured, moved along the curve."""
        loss = self._measured(batch, measured_at)
        curve = self.curve()
        if curve is None or math.isinf(loss):
            return loss
        return loss + curve.loss(batch, self.question.run_tokens) - curve.loss(batch, measured_at)

    def _measured(self, batch: int, length: int) -> float:
        losses = [
            r.loss
            for r in self.results
            if r.spec.batch_tokens == batch and r.spec.budget_tokens == length and r.loss is not None
        ]
        return min(losses, default=math.inf)

    def _finalists(self, candidates: Sequence[int], lengths: tuple[int, int, int]) -> list[int]:
        """The best batch, the best as far as it was measured, and the cheapest that may be as good."""
        expected = {batch: self._expected(batch, lengths[1]) for batch in candidates}
        measured = {batch: self._measured(batch, lengths[1]) for batch in candidates}
        best = min(expected, key=lambda batch: expected[batch])
        chosen = [best, min(measured, key=lambda batch: measured[batch])]
        near = [b for b in candidates if expected[b] <= expected[best] + 2 * SMALLEST_BAND and b not in chosen]
        chosen += sorted(near, key=self.question.run_seconds)
        others = [b for b in candidates if b not in chosen]
        chosen += sorted(others, key=lambda batch: expected[batch])
        return list(dict.fromkeys(chosen))[:FINALISTS]

    def _last_round(self, finalists: Sequence[int], length: int) -> None:
        """Seed after seed over all finalists, at least two, as long as the budget allows and the best is in doubt."""
        for seed in range(MOST_SEEDS):
            for number, batch in enumerate(finalists):
                cost = self.arms.seconds(batch, length)
                is_needed = seed < 2 and number < 2
                if self._budget_left() < cost and not (is_needed and seed == 0):
                    return
                self._run(2, batch, self._best_rate(batch), length, seed)


def _power_of_two(tokens: float) -> int:
    return int(2 ** round(math.log2(max(1.0, tokens))))
