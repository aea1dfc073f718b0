"""How rewards become advantages: pure functions of all groups of a step, looked up by name.

An estimator is given, group by group (the samples of one prompt), what became of each sample (`Outcome`), and returns
in the same order an advantage for each: one number, or one a charged token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

#: Rewards nearer to each other than this are equal, but for rounding.
EQUAL = 1e-6


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of one sample.

    Attributes:
        reward: of the whole sequence, finite.
        penalties: [charged tokens] what each token costs: a KL that is charged in the reward; zeros without one.
    """

    reward: float
    penalties: np.ndarray

    @property
    def total(self) -> float:
        return float(self.reward - self.penalties.sum())

    @property
    def to_go(self) -> np.ndarray:
        """[charged tokens] the reward less the penalties from this token on."""
        return self.reward - self.penalties[::-1].cumsum()[::-1]


Group = Sequence[Outcome]
Advantages = list[list[np.ndarray]]


def group_normalised(rewards: Sequence[float] | np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """GRPO's advantage, (r - mean) / (std + eps) over the samples of one prompt (DeepSeekMath, arXiv 2402.03300).

    The standard deviation is the unbiased one (divided by G - 1). A group without spread teaches nothing: all zeros.

    Args:
        rewards: [G] finite numbers, G >= 2.

    Returns:
        [G] float64.

    Raises:
        ValueError: fewer than two rewards, or one that is not finite.
    """
    r = _checked(rewards)
    return np.zeros_like(r) if without_spread(r) else (r - r.mean()) / (r.std(ddof=1) + eps)


def group_centred(rewards: Sequence[float] | np.ndarray) -> np.ndarray:
    """Dr. GRPO's advantage, r - mean over the samples of one prompt (arXiv 2503.20783).

    Without the division, a group whose samples are all about equally good weighs little: with rewards that are never
    quite equal, `group_normalised` blows its noise up to the size of a real choice.

    Args, Returns and Raises as `group_normalised`.
    """
    r = _checked(rewards)
    return r - r.mean()


def leave_one_out(rewards: Sequence[float] | np.ndarray) -> np.ndarray:
    """RLOO's advantage, r less the mean of the other samples of the prompt (arXiv 2402.14740).

    Args, Returns and Raises as `group_normalised`.
    """
    r = _checked(rewards)
    return (r - r.mean()) * r.size / (r.size - 1)


def batch_normalised(groups: Sequence[Group]) -> Advantages:
    """REINFORCE++'s advantage, (A - mean) / std over all tokens of the step, without a baseline of the prompt.

    A of a token is the reward less the KL from this token on (arXiv 2501.03262, eq. 8-10).
    """
    return _normalised([[o.to_go for o in group] for group in groups])


def centred_batch_normalised(groups: Sequence[Group]) -> Advantages:
    """REINFORCE++ with baseline: the mean reward of the prompt is taken off first (arXiv 2501.03262)."""
    means = [_checked([o.reward for o in group]).mean() for group in groups]
    return _normalised([[o.to_go - mean for o in group] for group, mean in zip(groups, means, strict=True)])


def by_group(one: Callable[[np.ndarray], np.ndarray]) -> Callable[[Sequence[Group]], Advantages]:
    """The estimator that takes each group by itself, and each sample's penalties off its reward."""

    def estimate(groups: Sequence[Group]) -> Advantages:
        return [list(one(np.array([o.total for o in group]))) for group in groups]

    return estimate


#: Name in a config -> estimator.
ADVANTAGES: dict[str, Callable[[Sequence[Group]], Advantages]] = {
    "grpo": by_group(group_normalised),
    "dr_grpo": by_group(group_centred),
    "rloo": by_group(leave_one_out),
    "reinforce_pp": batch_normalised,
    "reinforce_pp_baseline": centred_batch_normalised,
}
#: Those that charge each token the penalties which follow it, so that tokens of one sample may differ.
BY_TOKEN = ("reinforce_pp", "reinforce_pp_baseline")


def without_spread(rewards: Sequence[float] | np.ndarray) -> bool:
    """Whether all rewards of a group are equal, so that no sample of it is better than another."""
    return bool(np.ptp(rewards) < EQUAL)


def overlong(tokens: int, max_tokens: int, buffer: int) -> float:
    """DAPO's soft punishment (arXiv 2503.14476, eq. 13): 0 up to `max_tokens - buffer` tokens, then down to -1 at
    `max_tokens` in a straight line."""
    return -min(max(tokens - (max_tokens - buffer), 0) / buffer, 1.0) if buffer else 0.0


def _normalised(returns: list[list[np.ndarray]]) -> Advantages:
    """Centred and scaled by mean and standard deviation over all tokens."""
    tokens = np.concatenate([r for group in returns for r in group])
    if without_spread(tokens):
        return [[np.zeros_like(r) for r in group] for group in returns]
    mean, std = tokens.mean(), tokens.std()
    return [[(r - mean) / std for r in group] for group in returns]


def _checked(rewards: Sequence[float] | np.ndarray) -> np.ndarray:
    r = np.asarray(rewards, dtype=np.float64)
    if r.ndim != 1 or r.size < 2 or not np.isfinite(r).all():
        raise ValueError(f"a group needs at least two finite rewards, got {r.tolist()}")
    return r
