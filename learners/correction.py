"""What makes up for samples that another policy drew than the one that learns: an older one, or the same one in an
engine that computes with other kernels and numbers.

`correction(log_weight, batch, **options) -> (weight, touched)`, all [rows, L]. `log_weight` is log proximal - log
sampler of each token, 0 outside the mask; the loss of a token is multiplied by the weights of all corrections that a
config names. `touched` says where a weight was capped or masked. A masked token keeps its place in the divisor of the
aggregation: a step of which much is masked learns less.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from learners.losses import MAX_LOG_RATIO
from learners.packing import Batch


def truncate_tokens(log_weight: Tensor, batch: Batch, cap: float = 2.0) -> tuple[Tensor, Tensor]:
    """min(w, cap) with w = proximal / sampler of the token.

    Truncated importance sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training", fengyao.notion.site/off-policy-rl, where the cap is 2; Ionides 2008).
    """
    weight = log_weight.exp()
    return weight.clamp(max=cap), weight > cap


def mask_tokens(log_weight: Tensor, batch: Batch, low: float = 0.5, high: float = 5.0) -> tuple[Tensor, Tensor]:
    """w where low <= w <= high, else 0 (IcePop; Ring-1T, arXiv 2510.18855)."""
    weight = log_weight.exp()
    out = (weight < low) | (weight > high)
    return weight.masked_fill(out, 0.0), out


def weigh_sequences(log_weight: Tensor, batch: Batch, cap: float = 3.0) -> tuple[Tensor, Tensor]:
    """The product of a sequence's token weights, for each of its tokens; 0 if it is above `cap`.

    Masked importance sampling (Liu, Li et al. 2025, "When speed kills stability", richardli.xyz; TRL's `sequence_mask`,
    where the cap is 3). The product of a long sequence is hardly ever near 1.
    """
    weight = batch.sums(log_weight).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    out = weight > cap
    return weight.masked_fill(out, 0.0), out


def mask_sequences(log_weight: Tensor, batch: Batch, low: float = 0.5, high: float = 2.0) -> tuple[Tensor, Tensor]:
    """1 where the geometric mean of a sequence's token weights is within low..high, else 0.

    Geometric sequence masking (Liu, Li et al. 2025, "When speed kills stability", part 3, richardli.xyz). It does not
    depend on the length. The default bounds let all pass but sequences that the policy has little to do with; those of
    thousands of tokens bear far tighter ones (0.99 to 1.01).
    """
    mean = batch.means(log_weight).exp()
    out = (mean < low) | (mean > high)
    return (~out).to(log_weight.dtype), out


#: Name in a config -> correction.
CORRECTIONS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "truncate_tokens": truncate_tokens,
    "mask_tokens": mask_tokens,
    "weigh_sequences": weigh_sequences,
    "mask_sequences": mask_sequences,
}


@torch.no_grad()
def log_weights(proximal: Tensor, batch: Batch) -> Tensor:
    """[rows, L] log proximal - log sampler, 0 outside the mask."""
    return torch.where(batch.charged, proximal - batch.logprobs, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
