"""Losses: pure functions of log-probs and a batch; the learner does not know one by name.

`loss(logprobs, batch, **options) -> (share, metrics)`. `logprobs` is [rows, L], laid out as `batch`. `share` is this
micro-batch's share of the loss: the shares of all micro-batches and ranks add up to the mean over the optimiser step,
because each divides by the step's totals, never by its own. The same holds for every metric but those that end in
`_max`, of which the largest counts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from learners.packing import Batch

Metrics = dict[str, Tensor]
Loss = Callable[[Tensor, Batch], tuple[Tensor, Metrics]]

#: Bound on the size of log-ratios, so that a token the policy has all but given up cannot overflow `exp`.
MAX_LOG_RATIO = 20.0


def grpo(
    logprobs: Tensor, batch: Batch, clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float = 10.0
) -> tuple[Tensor, Metrics]:
    """Token-level clipped surrogate, mean over the tokens of the step.

    min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = pi / sampler of one token (PPO, arXiv 1707.06347; group
    advantages: DeepSeekMath, arXiv 2402.03300; separate bounds and token mean: DAPO, arXiv 2503.14476). For A < 0 the
    surrogate is at least dual_clip A (arXiv 1912.09729).
    """
    log_ratio = _log_ratio(logprobs, batch)
    ratio, adv = log_ratio.exp(), batch.advantages
    clipped = torch.minimum(ratio * adv, ratio.clamp(1 - clip_low, 1 + clip_high) * adv)
    surrogate = torch.where(adv < 0, torch.maximum(clipped, dual_clip * adv), clipped)
    per_token = batch.mask / batch.total_tokens
    share = -(surrogate * per_token).sum()
    return share, _off_policy(log_ratio, ratio, surrogate != ratio * adv, batch)


def gspo(logprobs: Tensor, batch: Batch, clip_low: float = 3e-4, clip_high: float = 4e-4) -> tuple[Tensor, Metrics]:
    """Sequence-level clipped surrogate, mean over sequences of the mean over tokens (GSPO, arXiv 2507.18071).

    The ratio of a sequence is the geometric mean of its tokens' ratios, s = exp(mean_t log r_t). Each token carries
    sg[s] pi / sg[pi] (the paper's GSPO-token): the value is the sequence's, the gradient flows through the token.
    """
    log_ratio = _log_ratio(logprobs, batch)
    charged = (batch.mask > 0).to(logprobs.dtype)
    length = _per_sequence(charged, batch).clamp(min=1.0)
    mean_log_ratio = _per_sequence(log_ratio.detach() * charged, batch) / length
    ratio = mean_log_ratio.exp()[batch.sequence] * (logprobs - logprobs.detach()).exp()
    adv = batch.advantages
    surrogate = torch.minimum(ratio * adv, ratio.clamp(1 - clip_low, 1 + clip_high) * adv)
    per_token = batch.mask / length[batch.sequence] / batch.total_sequences
    share = -(surrogate * per_token).sum()
    return share, _off_policy(log_ratio, ratio, surrogate != ratio * adv, batch)


def sft(logprobs: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
    """Negative log-likelihood, mean over the tokens of the step."""
    return -(logprobs * batch.mask / batch.total_tokens).sum(), {}


#: Name in a config -> loss.
LOSSES: dict[str, Callable[..., tuple[Tensor, Metrics]]] = {"grpo": grpo, "gspo": gspo, "sft": sft}


def make_loss(name: str, options: Mapping[str, Any] | None = None) -> Loss:
    """The loss of that name with its options bound.

    Raises:
        ValueError: no such loss, no such option, or a value that is not a positive number.
    """
    if name not in LOSSES:
        raise ValueError(f"there is no loss '{name}'; there are: {', '.join(LOSSES)}")
    known = list(inspect.signature(LOSSES[name]).parameters)[2:]
    for option, value in (options or {}).items():
        if option not in known:
            raise ValueError(f"loss '{name}' has no option '{option}'; it has: {', '.join(known) or 'none'}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"option '{option}' of loss '{name}' must be a positive number, not {value!r}")
    return partial(LOSSES[name], **(options or {}))


def _log_ratio(logprobs: Tensor, batch: Batch) -> Tensor:
    """[rows, L] log pi - log sampler, 0 outside the mask."""
    return torch.where(batch.mask > 0, logprobs - batch.logprobs, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _per_sequence(values: Tensor, batch: Batch) -> Tensor:
    """[sequences] sums of [rows, L] values, which are 0 outside the mask."""
    sums = values.new_zeros(batch.sequences)
    return sums.index_add(0, batch.sequence.flatten(), values.flatten())


@torch.no_grad()
def _off_policy(log_ratio: Tensor, ratio: Tensor, clipped: Tensor, batch: Batch) -> Metrics:
    """How far the policy has moved from the sampler.

    `kl_behaviour` is the k3 estimate of KL(sampler || pi), r - 1 - log r (joschu.net/blog/kl-approx.html).
    `clip_share` is the share of tokens whose surrogate was clipped.
    """
    per_token = batch.mask / batch.total_tokens
    charged = batch.mask > 0
    return {
        "ratio_mean": (ratio * per_token).sum(),
        "ratio_max": torch.where(charged, ratio, 0.0).max(),
        "kl_behaviour": ((log_ratio.exp() - 1 - log_ratio) * per_token).sum(),
        "clip_share": ((clipped & charged) * per_token).sum(),
    }
