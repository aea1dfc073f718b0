"""Groups that a step learns from, and the reasons of the others."""

from __future__ import annotations

import math

import numpy as np
import pytest

from learners.groups import Answer, answer, chosen


def good(name: str, reward: float = 0.5, finish: str = "stop") -> Answer:
    return answer(name, reward, finish, np.array([-1.0, -2.0]), np.array([1, 1]))


@pytest.mark.parametrize(
    ("logprobs", "mask", "reward", "fault"),
    [
        ([], [], 0.5, "the response is empty"),
        ([-1.0, -1.0], [0, 0], 0.5, "no token of the response is charged to the policy"),
        ([-1.0, math.nan], [1, 1], 0.5, "the sampler gave log-probs that are not finite"),
        ([-math.inf, -1.0], [1, 1], 0.5, "the sampler gave log-probs that are not finite"),
        ([-1.0, math.nan], [1, 0], 0.5, ""),
        ([-1.0], [1], math.nan, "the reward is nan"),
        ([-1.0], [1], math.inf, "the reward is inf"),
    ],
)
def test_an_answer_that_nothing_can_be_learnt_from_has_a_fault(
    logprobs: list[float], mask: list[int], reward: float, fault: str
) -> None:
    assert answer("g/0", reward, "stop", np.array(logprobs), np.array(mask)).fault == fault


def test_a_faulty_sample_is_dropped_alone_and_its_group_goes_on() -> None:
    empty = answer("g/2", 0.0, "stop", np.array([]), np.array([]))
    kept, ends = chosen({"g": [good("g/0", 0.1), good("g/1", 0.9), empty]})
    assert [a.trajectory for a in kept["g"]] == ["g/0", "g/1"]
    assert ends == {"g/2": ("dropped_data", "the response is empty")}


def test_a_group_with_one_sample_left_teaches_nothing() -> None:
    empty = answer("g/1", 0.0, "stop", np.array([]), np.array([]))
    kept, ends = chosen({"g": [good("g/0"), empty]})
    assert not kept
    assert ends == {
        "g/0": ("dropped_filtered", "fewer than two valid samples"),
        "g/1": ("dropped_data", "the response is empty"),
    }


def test_a_group_with_equal_rewards_is_left_out_by_dynamic_sampling_alone() -> None:
    groups = {"g": [good("g/0"), good("g/1")], "h": [good("h/0", 0.1), good("h/1")]}
    assert chosen(groups)[0].keys() == {"g", "h"}
    kept, ends = chosen(groups, need_spread=True)
    assert kept.keys() == {"h"}
    assert ends == dict.fromkeys(("g/0", "g/1"), ("dropped_filtered", "all rewards of the group are equal"))


def test_a_group_of_which_all_answers_were_cut_off_is_left_out_where_those_do_not_count() -> None:
    cut = {"g": [good("g/0", 0.1, "length"), good("g/1", 0.2, "length")]}
    assert chosen(cut)[0].keys() == {"g"}
    kept, ends = chosen(cut, need_end=True)
    assert not kept and ends["g/0"] == ("dropped_filtered", "all answers of the group were cut off")
    assert chosen({"g": [*cut["g"], good("g/2")]}, need_end=True)[0].keys() == {"g"}
