"""Estimates of KL(pi || reference) from one sampled token: functions of log pi - log reference of any shape.

From http://joschu.net/blog/kl-approx.html. As a reward k1 is unbiased. As a loss it is not the value that counts but
the gradient: k2's is that of the KL, k3's approximates it, and k1's is 0 on average (arXiv 2510.01555); weighed by the
ratio (`kl_unbiased`), k1's and k3's are those of the KL.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def k1(log_ratio: Tensor) -> Tensor:
    """log(pi / reference): unbiased, of either sign."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """Half of its square: biased, never negative."""
    return 0.5 * log_ratio.square()


def k3(log_ratio: Tensor) -> Tensor:
    """reference / pi - 1 - log(reference / pi): unbiased, never negative (GRPO's, DeepSeekMath, arXiv 2402.03300)."""
    return (-log_ratio).exp() - 1 + log_ratio


#: Name in a config -> estimator.
ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
