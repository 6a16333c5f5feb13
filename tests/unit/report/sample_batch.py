"""Made-up findings about batch sizes: a loss that rises beyond a critical batch, with seeded noise."""

from __future__ import annotations

import math
import random
from typing import Any

from tests.unit.report.sample_methods import interval
from tunewise.lab.findings import Arm, BatchFindings, BatchPoint, NoiseScale, Throughput, ThroughputLine
from tunewise.lab.outcome import Interval, Point

BUDGETS = (36_000, 108_000, 324_000)
BATCHES = (512, 1024, 2048, 4096, 8192, 16384)
SEED_NOISE = 0.006


def loss_at(batch: int, tokens: float, rate: float = 1.0) -> float:
    """The loss after so many tokens; `rate` is the learning rate over the best one."""
    useful = tokens / (1 + (batch / 13_000) ** 2.4)
    learnt = (1 + useful / 9000) ** -0.42
    return float(1.62 + 1.9 * learnt + 0.05 * math.log(rate) ** 2 + 20 / batch)


def arm(rung: int, batch: int, rate: float, seed: int, noise: random.Random) -> Arm:
    budget, best = BUDGETS[rung], 3e-3 * math.sqrt(batch / 4096)
    steps = max(1, budget // batch)
    shift = noise.gauss(0, SEED_NOISE)
    grid = [steps * index // 12 for index in range(1, 13)] if steps >= 12 else list(range(1, steps + 1))
    curve = [
        Point(supervised_tokens=step * batch, loss=loss_at(batch, step * batch, rate / best) + shift) for step in grid
    ]
    return Arm(
        rung=rung, batch_tokens=batch, learning_rate=rate, beta2=0.5 ** (batch / 70_000), seed=seed,
        budget_tokens=budget, steps=steps, loss=curve[-1].loss, seconds=budget / speed(batch),
        tokens_per_second=speed(batch), curve=(Point(supervised_tokens=0, loss=3.52), *curve), outcome="measured",
    )  # fmt: skip


def speed(batch: int) -> float:
    """Real tokens a second; an update costs 60 ms and a token 0.19 ms."""
    return batch / (0.06 + 0.00019 * batch)


def arms() -> tuple[Arm, ...]:
    noise = random.Random(4)
    found = []
    for batch in BATCHES:
        best = 3e-3 * math.sqrt(batch / 4096)
        found += [arm(0, batch, best * factor, 0, noise) for factor in (0.5, 1.0, 2.0)]
    for batch in BATCHES[:5]:
        found.append(arm(1, batch, 3e-3 * math.sqrt(batch / 4096), 0, noise))
    for batch in BATCHES[1:4]:
        found += [arm(2, batch, 3e-3 * math.sqrt(batch / 4096), seed, noise) for seed in (0, 1, 2)]
    return tuple(found)


def batch_point(batch: int, all_arms: tuple[Arm, ...]) -> BatchPoint:
    mine = [each for each in all_arms if each.batch_tokens == batch and each.loss is not None]
    budget = max(each.budget_tokens for each in mine)
    last = [each for each in mine if each.budget_tokens == budget]
    best = min(last, key=lambda each: each.loss or 0.0)
    losses = [each.loss for each in last if each.learning_rate == best.learning_rate and each.loss is not None]
    middle = sum(losses) / len(losses)
    half = 2 * SEED_NOISE / math.sqrt(len(losses))
    return BatchPoint(
        batch_tokens=batch, learning_rate=best.learning_rate, budget_tokens=budget,
        loss=Interval(middle=middle, low=middle - half, high=middle + half), num_seeds=len(losses),
        tokens_per_second=speed(batch), run_seconds=1_296_000 / speed(batch),
        is_tied=budget == BUDGETS[2] and batch in (1024, 2048, 4096),
    )  # fmt: skip


def batch(**changes: Any) -> BatchFindings:
    all_arms = arms()
    made = BatchFindings(
        throughput=tuple(
            Throughput(
                micro_batch_size=rows, tokens=rows * 212.0, seconds=interval(0.011 + 0.041 * rows, 0.03),
                tokens_per_second=interval(rows * 212.0 / (0.011 + 0.041 * rows), 0.03),
                peak_tensor_bytes=round((64 + 38.5 * rows) * 2**20),
            )
            for rows in (1, 2, 4, 8, 16)
        ),
        line=ThroughputLine(
            t0_seconds=0.011, t1_seconds_per_row=0.041, m0_bytes=64 * 2.0**20, m1_bytes_per_row=38.5 * 2**20,
            update_seconds=0.0031,
        ),
        noise=(
            NoiseScale(estimator="two batches", tokens=3900.0, low=2300.0, high=6900.0, num_batches=24),
            NoiseScale(estimator="per example", tokens=4600.0, low=3600.0, high=6100.0, num_batches=8),
        ),
        arms=all_arms, curve=tuple(batch_point(each, all_arms) for each in BATCHES), seed_noise=SEED_NOISE,
        tie_band=0.012, critical_batch=Interval(middle=6100, low=4300, high=8800), chosen_tokens=4096, documents=34.1,
        learning_rate=3e-3, beta2=0.96, undecided=(1024, 2048, 4096), micro_batch_size=8, num_micro_batches=2.3,
        micro_batch_reason="8 rows reach 97 % of the highest speed, and 16 would leave less than a tenth of the memory",
        sentences=(
            "4,096 supervised tokens a step (about 34 records) is the cheapest batch whose result is within the noise "
            "of the best: 0.008 nats above 2,048, where differences up to 0.012 nats are noise.",
            "The budget could not tell 1,024, 2,048 and 4,096 apart; 8,192 was worse by 0.05 nats after a third of the "
            "tokens.",
        ),
    )  # fmt: skip
    return made.model_copy(update=changes)
