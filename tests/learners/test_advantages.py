"""Rewards of all groups of a step become advantages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learners.advantages import (
    ADVANTAGES,
    Outcome,
    group_centred,
    group_normalised,
    leave_one_out,
    overlong,
    without_spread,
)

GROUPS = st.lists(st.floats(-10, 10), min_size=2, max_size=16)


def step(*groups: list[float], tokens: int = 1) -> list[list[Outcome]]:
    return [[Outcome(r, np.zeros(tokens)) for r in group] for group in groups]


def test_a_group_is_centred_and_scaled_by_its_unbiased_deviation() -> None:
    assert group_normalised([0.0, 1.0, 2.0]) == pytest.approx([-1.0, 0.0, 1.0], abs=1e-5)


def test_a_centred_group_keeps_the_size_of_its_spread() -> None:
    assert group_centred([0.0, 0.5, 1.0]) == pytest.approx([-0.5, 0.0, 0.5])
    assert group_centred([0.50, 0.51]) == pytest.approx([-0.005, 0.005])


def test_leaving_one_out_compares_a_sample_with_the_others_alone() -> None:
    assert leave_one_out([1.0, 2.0, 6.0]) == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5])


@pytest.mark.parametrize("rewards", [[0.1] * 8, [0.3, 0.1 + 0.2], [0.0, 0.0]])
@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_step_without_spread_teaches_nothing(name: str, rewards: list[float]) -> None:
    found = ADVANTAGES[name](step(rewards, rewards))
    assert np.allclose([float(a.mean()) for group in found for a in group], 0.0, atol=1e-12)
    assert without_spread(rewards)


@given(GROUPS)
def test_advantages_sum_to_zero_and_keep_the_order_of_rewards(rewards: list[float]) -> None:
    for estimate in (group_normalised, group_centred, leave_one_out):
        advantages = estimate(rewards)
        assert advantages.sum() == pytest.approx(0.0, abs=1e-6)
        assert (np.diff(advantages[np.argsort(rewards)]) >= -1e-12).all()


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_a_group_is_judged_by_itself_and_a_kl_comes_off_its_rewards(name: str) -> None:
    first = [Outcome(1.0, np.array([0.25, 0.25])), Outcome(0.0, np.array([0.5])), Outcome(3.0, np.zeros(4))]
    alone = ADVANTAGES[name]([first])[0]
    beside = ADVANTAGES[name]([first, *step([5.0, -7.0])])[0]
    plain = ADVANTAGES[name](step([0.5, -0.5, 3.0]))[0]
    assert alone == beside == pytest.approx(plain)


def test_reinforce_pp_normalises_over_all_tokens_of_the_step() -> None:
    """Long answers count once a token; there is no baseline of the prompt."""
    groups = [[Outcome(1.0, np.zeros(3)), Outcome(2.0, np.zeros(1))], [Outcome(5.0, np.zeros(2))]]
    found = ADVANTAGES["reinforce_pp"](groups)
    tokens = np.array([1.0, 1.0, 1.0, 2.0, 5.0, 5.0])
    expected = (tokens - tokens.mean()) / tokens.std()
    assert np.concatenate([a for group in found for a in group]) == pytest.approx(expected)


def test_reinforce_pp_charges_each_token_the_kl_from_there_on() -> None:
    kl = np.array([0.1, 0.2, 0.4])
    found = ADVANTAGES["reinforce_pp"]([[Outcome(1.0, kl), Outcome(0.0, np.zeros(1))]])
    to_go = np.array([1.0 - 0.7, 1.0 - 0.6, 1.0 - 0.4, 0.0])
    expected = (to_go - to_go.mean()) / to_go.std()
    assert np.concatenate(found[0]) == pytest.approx(expected)


def test_reinforce_pp_with_baseline_takes_the_mean_of_the_prompt_off_first() -> None:
    found = ADVANTAGES["reinforce_pp_baseline"](step([1.0, 3.0], [10.0, 10.0], tokens=2))
    centred = np.array([-1.0, -1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    assert np.concatenate([a for group in found for a in group]) == pytest.approx(centred / centred.std())


@pytest.mark.parametrize("rewards", [[], [1.0], [1.0, float("nan")], [[1.0, 2.0]]])
@pytest.mark.parametrize("estimate", [group_normalised, group_centred, leave_one_out])
def test_a_group_that_cannot_be_compared_is_refused(estimate: Callable[..., Any], rewards: list[float]) -> None:
    with pytest.raises(ValueError, match="at least two finite rewards"):
        estimate(rewards)


@pytest.mark.parametrize(("tokens", "fine"), [(1, 0.0), (60, 0.0), (70, -0.25), (80, -0.5), (100, -1.0), (130, -1.0)])
def test_an_overlong_answer_is_punished_in_a_straight_line_over_the_buffer(tokens: int, fine: float) -> None:
    assert overlong(tokens, max_tokens=100, buffer=40) == pytest.approx(fine)
    assert overlong(tokens, max_tokens=100, buffer=0) == 0.0
