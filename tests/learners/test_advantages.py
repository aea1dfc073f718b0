"""Group-normalised advantages."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learners.advantages import ADVANTAGES, group_centred, group_normalised

GROUPS = st.lists(st.floats(-10, 10), min_size=2, max_size=16)


def test_a_group_is_centred_and_scaled_by_its_unbiased_deviation() -> None:
    assert group_normalised([0.0, 1.0, 2.0]) == pytest.approx([-1.0, 0.0, 1.0], abs=1e-5)


def test_a_centred_group_keeps_the_size_of_its_spread() -> None:
    assert group_centred([0.0, 0.5, 1.0]) == pytest.approx([-0.5, 0.0, 0.5])
    assert group_centred([0.50, 0.51]) == pytest.approx([-0.005, 0.005])


@pytest.mark.parametrize("rewards", [[0.1] * 8, [0.3, 0.1 + 0.2], [0.0, 0.0]])
def test_a_group_without_spread_teaches_nothing(rewards: list[float]) -> None:
    assert group_normalised(rewards).tolist() == [0.0] * len(rewards)


@given(GROUPS)
def test_advantages_sum_to_zero_and_keep_the_order_of_rewards(rewards: list[float]) -> None:
    advantages = group_normalised(rewards)
    assert advantages.sum() == pytest.approx(0.0, abs=1e-6)
    assert (np.diff(advantages[np.argsort(rewards)]) >= 0).all()


@pytest.mark.parametrize("rewards", [[], [1.0], [1.0, float("nan")], [[1.0, 2.0]]])
@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_group_that_cannot_be_compared_is_refused(name: str, rewards: list[float]) -> None:
    with pytest.raises(ValueError, match="at least two finite rewards"):
        ADVANTAGES[name](rewards)
