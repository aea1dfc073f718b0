"""Policy losses: pure functions of log-probs and a batch; the learner does not know one by name.

`loss(logprobs, batch, **options) -> (per_token, shown)`: the loss of every token, [rows, L] laid out as `batch`, and
what to show of it, [rows, L] values by the name of a metric. How tokens add up to the loss of a step is an aggregation
(`learners.aggregation`), what makes up for samples of an older policy a correction (`learners.correction`); the sum of
all is built by `learners.objective`.

The ratio of a loss is pi / proximal, where the proximal policy is the one before the first update of the step
(decoupled PPO, arXiv 2110.00641; used asynchronously by AReaL, arXiv 2505.24298).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from learners.packing import Batch

PerToken = tuple[Tensor, dict[str, Tensor]]

#: Bound on the size of log-ratios, so that a token the policy has all but given up cannot overflow `exp`.
MAX_LOG_RATIO = 20.0


def grpo(
    logprobs: Tensor, batch: Batch, clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float = 10.0
) -> PerToken:
    """Token-level clipped surrogate.

    min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = pi / proximal of one token (PPO, arXiv 1707.06347; with
    group advantages: DeepSeekMath, arXiv 2402.03300; with two bounds: DAPO, arXiv 2503.14476). For A < 0 the surrogate
    is at least dual_clip A (arXiv 1912.09729).
    """
    ratio, adv = log_ratio(logprobs, batch).exp(), batch.advantages
    clipped = torch.minimum(ratio * adv, ratio.clamp(1 - clip_low, 1 + clip_high) * adv)
    surrogate = torch.where(adv < 0, torch.maximum(clipped, dual_clip * adv), clipped)
    return -surrogate, _shown(ratio, surrogate != ratio * adv)


def gspo(logprobs: Tensor, batch: Batch, clip_low: float = 3e-4, clip_high: float = 4e-4) -> PerToken:
    """Sequence-level clipped surrogate (GSPO, arXiv 2507.18071).

    The ratio of a sequence is the geometric mean of its tokens' ratios, s = exp(mean_t log r_t). Each token carries
    sg[s] pi / sg[pi] (the paper's GSPO-token): the value is the sequence's, the gradient flows through the token.
    """
    mean = batch.means(log_ratio(logprobs, batch).detach())
    ratio, adv = mean.exp() * (logprobs - logprobs.detach()).exp(), batch.advantages
    surrogate = torch.minimum(ratio * adv, ratio.clamp(1 - clip_low, 1 + clip_high) * adv)
    return -surrogate, _shown(ratio, surrogate != ratio * adv)


def cispo(logprobs: Tensor, batch: Batch, clip_high: float = 4.0) -> PerToken:
    """REINFORCE with a bounded ratio as its weight: sg[min(r, 1 + clip_high)] A log pi (MiniMax-M1, arXiv 2506.13585).

    No token loses its gradient. The paper bounds the ratio from above alone and does not give the bound; 5 is what TRL
    recommends after ScaleRL (arXiv 2510.13786).
    """
    ratio = log_ratio(logprobs, batch).exp().detach()
    bounded = ratio.clamp(max=1 + clip_high)
    return -bounded * batch.advantages * logprobs, _shown(ratio, bounded != ratio)


def rloo(logprobs: Tensor, batch: Batch, clip_low: float = 0.2, clip_high: float = 0.2) -> PerToken:
    """Clipped surrogate of whole sequences, whose ratio is the product of their tokens' (RLOO, arXiv 2402.14740).

    In the first update of a step the ratio is 1 and its gradient that of the paper, A grad log pi(sequence). For later
    updates the bounds are PPO's, as in TRL's RLOOTrainer.
    """
    product = batch.sums(log_ratio(logprobs, batch)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio, adv = product.exp(), batch.advantages
    surrogate = torch.minimum(ratio * adv, ratio.clamp(1 - clip_low, 1 + clip_high) * adv)
    return -surrogate, _shown(ratio, surrogate != ratio * adv)


def sft(logprobs: Tensor, batch: Batch) -> PerToken:
    """Negative log-likelihood."""
    return -logprobs, {}


class Entry(NamedTuple):
    """A loss.

    Attributes:
        aggregation: the one that it was published with.
        of_sequence: its gradient at a token is that of the whole sequence's probability, so that one advantage a
            sequence is all it can tell apart.
    """

    function: Callable[..., PerToken]
    aggregation: str
    of_sequence: bool = False


#: Name in a config -> loss.
LOSSES: dict[str, Entry] = {
    "grpo": Entry(grpo, "token_mean"),
    "gspo": Entry(gspo, "sequence_mean"),
    "cispo": Entry(cispo, "token_mean"),
    "rloo": Entry(rloo, "sequence_mean", of_sequence=True),
    "sft": Entry(sft, "token_mean"),
}


def log_ratio(logprobs: Tensor, batch: Batch) -> Tensor:
    """[rows, L] log pi - log proximal, 0 outside the mask; where there is no proximal, pi is."""
    proximal = logprobs.detach() if batch.proximal is None else batch.proximal
    return torch.where(batch.charged, logprobs - proximal, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _shown(ratio: Tensor, clipped: Tensor) -> dict[str, Tensor]:
    """`clip_share` is the share of tokens whose surrogate was clipped."""
    return {"ratio_mean": ratio.detach(), "ratio_max": ratio.detach(), "clip_share": clipped}
