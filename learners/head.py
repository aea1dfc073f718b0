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
#: Float32 that fit into half of a core's cache (512 KiB), beside what is made of them.
HOT = 2**17


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
        bias = None if self.bias is None else self.bias / temperature
        return _Scores.apply(hidden / temperature, self.weight, bias, targets)


class _Scores(torch.autograd.Function):
    """With z the logits, p = softmax(z), H the entropy and t the target: d log p_t / dz = 1_t - p, and
    dH / dz = -p (log p + H)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        cast, rows = weight.to(dtype), max(1, PIECE // len(weight))
        kept, scores = [], []
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
            logp, entropy = _log_probs(h, cast, bias)
            scores.append((logp.gather(-1, t[:, None])[:, 0], entropy))
            if len(hidden) <= rows:
                kept.append(logp)
        chosen, entropies = map(torch.cat, zip(*scores, strict=True))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, targets, *kept)
        ctx.dtype, ctx.rows = dtype, rows
        return chosen, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, *kept = ctx.saved_tensors
        of_chosen, of_entropy = (None if g is None else g[:, None].split(ctx.rows) for g in grads)
        cast, into_hidden = weight.to(ctx.dtype), []
        # Sums over pieces are taken in float32, whatever the weights are in.
        into_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        into_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        for i, (h, t) in enumerate(zip(hidden.split(ctx.rows), targets.split(ctx.rows), strict=True)):
            logp = kept[i] if kept else _log_probs(h, cast, bias)[0]
            dz = _gradient(logp, t, of_chosen and of_chosen[i], of_entropy and of_entropy[i])
            if into_bias is not None:
                into_bias += dz.sum(0)
            dz = dz.to(ctx.dtype)
            into_hidden.append(dz @ cast)
            if into_weight is not None and ctx.dtype == into_weight.dtype:
                into_weight.addmm_(dz.T, h.to(ctx.dtype))  # a pass over all weights less
            elif into_weight is not None:
                into_weight += dz.T @ h.to(ctx.dtype)
        return torch.cat(into_hidden).to(hidden.dtype), _as(into_weight, weight), _as(into_bias, bias), None


def _log_probs(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """[n, hidden size] -> [n, vocabulary] and, the entropies, [n]; float32."""
    logits = linear(hidden.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)).float()
    entropies = logits.new_empty(len(logits))
    for at in _hot(logits):
        z = logits[at]
        z -= z.amax(-1, keepdim=True)
        p = z.exp()
        total = p.sum(-1)
        entropies[at] = total.log() - p.mul_(z).sum(-1) / total
        z -= total.log()[:, None]
    return logits, entropies


def _gradient(logp: Tensor, targets: Tensor, of_chosen: Tensor | None, of_entropy: Tensor | None) -> Tensor:
    """[n, vocabulary] of the logits, in the memory of the log-probs; from gradients [n, 1] of what was made of them."""
    zeros = logp.new_zeros(len(logp), 1)
    g = zeros if of_chosen is None else of_chosen
    for at in _hot(logp):
        part = logp[at]
        if of_entropy is None:
            part.exp_().mul_(-g[at])
        else:
            p = part.exp()
            entropy = -(p * part).sum(-1, keepdim=True)
            part.add_(entropy).mul_(-of_entropy[at]).sub_(g[at]).mul_(p)
    return logp.scatter_add_(-1, targets[:, None], g)


def _hot(rows: Tensor) -> list[slice]:
    """Some rows at a time, on a CPU: what is done to them then happens in its cache, and in no fresh memory."""
    n = max(1, HOT // rows.shape[1]) if rows.device.type == "cpu" else max(1, len(rows))
    return [slice(i, i + n) for i in range(0, len(rows), n)]


def _as(grad: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if grad is None or like is None else grad.to(like.dtype)
