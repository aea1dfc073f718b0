"""The end of the policy: hidden states in, log-probs and entropies out. The logits of all tokens never exist at once.

They are made in pieces of rows, in the number format of the model's products, and turned into float32 log-probs piece
by piece. The backward pass makes them again, unless all of them were few enough to keep.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

#: Most float32 logits that exist at a time (256 MiB): rows of a piece x vocabulary.
PIECE = 2**26


class ScoringHead(nn.Linear):
    """A language model's output head that answers with scores of given targets. Set as the `__class__` of the head.

    It stays the module it was, with its name, its tie to the embedding and its hooks: ZeRO-3 gathers a module's weights
    when the module is called, and nowhere else.
    """

    def forward(  # type: ignore[override]
        self, hidden: Tensor, targets: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Log-probs of the targets, and entropies of the distributions they were drawn from.

        Args:
            hidden: [N, hidden size].
            targets: [N] int64.
            temperature: logits are divided by it.

        Returns:
            Both [N] float32, in nats, with gradients.
        """
        return _Scores.apply(hidden, self.weight, self.bias, targets, temperature)


class _Scores(torch.autograd.Function):
    """With z the logits over the temperature, p = softmax(z), H the entropy and t the target:
    d log p_t / dz = 1_t - p, and dH / dz = -p (log p + H)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        cast, rows = weight.to(dtype), max(1, PIECE // len(weight))
        kept, scores = [], []
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
            logp = _log_probs(h, cast, bias, temperature)
            entropy = logp.exp().mul_(logp).sum(-1).neg_()
            scores.append((logp.gather(-1, t[:, None])[:, 0], entropy))
            if len(hidden) <= rows:
                kept.append(logp)
        chosen, entropies = map(torch.cat, zip(*scores, strict=True))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, targets, entropies, *kept)
        ctx.dtype, ctx.rows, ctx.temperature = dtype, rows, temperature
        return chosen, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, entropies, *kept = ctx.saved_tensors
        of_chosen, of_entropy = (torch.zeros_like(entropies) if g is None else g for g in grads)
        cast, into_hidden = weight.to(ctx.dtype), []
        # Sums over pieces are taken in float32, whatever the weights are in.
        into_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        into_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        pieces = (v.split(ctx.rows) for v in (hidden, targets, of_chosen[:, None], of_entropy[:, None], entropies))
        for i, (h, t, g, g_entropy, entropy) in enumerate(zip(*pieces, strict=True)):
            logp = kept[i] if kept else _log_probs(h, cast, bias, ctx.temperature)
            dz = -g if grads[1] is None else (logp + entropy[:, None]).mul_(-g_entropy).sub_(g)
            dz = logp.exp().mul_(dz).scatter_add_(-1, t[:, None], g).div_(ctx.temperature)
            if into_bias is not None:
                into_bias += dz.sum(0)
            dz = dz.to(ctx.dtype)
            into_hidden.append(dz @ cast)
            if into_weight is not None:
                into_weight += dz.T @ h.to(ctx.dtype)
        return torch.cat(into_hidden).to(hidden.dtype), _as(into_weight, weight), _as(into_bias, bias), None, None


def _log_probs(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """[n, hidden size] -> [n, vocabulary] float32."""
    logits = linear(hidden.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)).float()
    logits.div_(temperature)
    return logits.sub_(logits.logsumexp(-1, keepdim=True))


def _as(grad: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if grad is None or like is None else grad.to(like.dtype)
