"""Which of the claimed groups a step may learn from, and why not from the others: pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from learners.advantages import without_spread


@dataclass(frozen=True)
class Answer:
    """A scored sample, as far as it takes to choose.

    Attributes:
        trajectory: its name.
        reward: of the whole answer.
        tokens: length of the response.
        charged: tokens that the policy is charged for.
        cut_off: it ended at the token limit.
        fault: why nothing can be learnt from it, "" if something can.
    """

    trajectory: str
    reward: float
    tokens: int
    charged: int
    cut_off: bool
    fault: str


Groups = dict[str, list[Answer]]
#: Trajectory -> (status, reason).
Ends = dict[str, tuple[str, str]]


def answer(trajectory: str, reward: float, finish: str, logprobs: np.ndarray, mask: np.ndarray) -> Answer:
    """Checks one sample: `logprobs` and `mask` are [response tokens]."""
    charged = mask == 1
    fault = ""
    if not len(mask):
        fault = "the response is empty"
    elif not charged.any():
        fault = "no token of the response is charged to the policy"
    elif not np.isfinite(logprobs[charged]).all():
        fault = "the sampler gave log-probs that are not finite"
    elif not np.isfinite(reward):
        fault = f"the reward is {reward}"
    return Answer(trajectory, reward, len(mask), int(charged.sum()), finish == "length", fault)


def chosen(
    groups: Mapping[str, Sequence[Answer]], *, need_spread: bool = False, need_end: bool = False
) -> tuple[Groups, Ends]:
    """The groups to learn from, without their faulty samples, and the ends of all other samples.

    Args:
        need_spread: leave out groups whose rewards are all equal (DAPO's dynamic sampling, arXiv 2503.14476).
        need_end: leave out groups of which no answer came to its end.
    """
    kept: Groups = {}
    ends: Ends = {}
    for name, answers in groups.items():
        ends |= {a.trajectory: ("dropped_data", a.fault) for a in answers if a.fault}
        sound = [a for a in answers if not a.fault]
        if reason := _useless(sound, need_spread, need_end):
            ends |= {a.trajectory: ("dropped_filtered", reason) for a in sound}
        else:
            kept[name] = sound
    return kept, ends


def _useless(answers: Sequence[Answer], need_spread: bool, need_end: bool) -> str:
    if len(answers) < 2:
        return "fewer than two valid samples"
    if need_spread and without_spread([a.reward for a in answers]):
        return "all rewards of the group are equal"
    if need_end and all(a.cut_off for a in answers):
        return "all answers of the group were cut off"
    return ""
