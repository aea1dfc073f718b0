"""How rewards of one group become advantages: pure functions of the group's rewards, looked up by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


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
    spread = r.std(ddof=1)
    if spread < eps:  # a constant group, but for rounding
        return np.zeros_like(r)
    return (r - r.mean()) / (spread + eps)


def group_centred(rewards: Sequence[float] | np.ndarray) -> np.ndarray:
    """Dr. GRPO's advantage, r - mean over the samples of one prompt (arXiv 2503.20783).

    Without the division, a group whose samples are all about equally good weighs little: with rewards that are never
    quite equal, `group_normalised` blows its noise up to the size of a real choice.

    Args:
        rewards: [G] finite numbers, G >= 2.

    Returns:
        [G] float64.

    Raises:
        ValueError: fewer than two rewards, or one that is not finite.
    """
    r = _checked(rewards)
    return r - r.mean()


def _checked(rewards: Sequence[float] | np.ndarray) -> np.ndarray:
    r = np.asarray(rewards, dtype=np.float64)
    if r.ndim != 1 or r.size < 2 or not np.isfinite(r).all():
        raise ValueError(f"a group needs at least two finite rewards, got {r.tolist()}")
    return r


#: Name in a config -> function of one group's rewards.
ADVANTAGES: dict[str, Callable[[Sequence[float] | np.ndarray], np.ndarray]] = {
    "grpo": group_normalised,
    "dr_grpo": group_centred,
}
