"""The split: deterministic, blind to order, and free of leaks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunewise.errors import InputError
from tunewise.workload.splits import leak_groups, split

KEYS = st.lists(st.integers(0, 15).map(lambda key: key * 0x1234567890ABCDE), min_size=2, max_size=80).filter(
    lambda keys: len(set(keys)) >= 2
)
FRACTIONS = st.floats(0.001, 0.99)
SEEDS = st.integers(0, 2**63 - 1)


@given(keys=KEYS, fraction=FRACTIONS, seed=SEEDS)
def test_groups_never_straddle_and_nothing_is_lost(keys: list[int], fraction: float, seed: int) -> None:
    array = np.array(keys, dtype=np.uint64)
    train, validation = split(array, fraction, seed)
    assert not set(array[train].tolist()) & set(array[validation].tolist())
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(len(keys)))
    assert len(train) >= 1
    assert len(validation) >= 1


@given(keys=KEYS, fraction=FRACTIONS, seed=SEEDS, data=st.data())
def test_order_does_not_matter(keys: list[int], fraction: float, seed: int, data: st.DataObject) -> None:
    array = np.array(keys, dtype=np.uint64)
    shuffled = array[data.draw(st.permutations(range(len(keys))))]
    chosen = set(array[split(array, fraction, seed)[1]].tolist())
    assert set(shuffled[split(shuffled, fraction, seed)[1]].tolist()) == chosen


def test_size_and_seed() -> None:
    keys = np.arange(1000, dtype=np.uint64) * 7919
    assert len(split(keys, 0.05, 0)[1]) == 50
    assert split(keys, 0.05, 0)[1].tolist() == split(keys, 0.05, 0)[1].tolist()
    assert split(keys, 0.05, 0)[1].tolist() != split(keys, 0.05, 1)[1].tolist()
    assert len(split(keys, 0.0, 0)[1]) == 0


def test_a_huge_group_is_not_taken_for_validation() -> None:
    keys = np.array([5] * 90 + list(range(10, 20)), dtype=np.uint64)
    train, validation = split(keys, 0.05, 3)
    assert len(validation) == 5
    assert 5 in keys[train]


def test_one_group_cannot_be_split() -> None:
    with pytest.raises(InputError, match="1 distinct record"):
        split(np.array([3, 3, 3], dtype=np.uint64), 0.1, 0)


def test_a_prompt_that_nearly_all_share_does_not_group() -> None:
    contents = np.arange(10, dtype=np.uint64)
    same_prompt = np.zeros(10, dtype=np.uint64)
    assert leak_groups(contents, same_prompt).tolist() == contents.tolist()
    pairs = contents // 2
    assert leak_groups(contents, pairs).tolist() == pairs.tolist()
