"""The end of the policy: hidden states in, log-probs and entropies out. The logits of all tokens never exist at once.

They are made in pieces of rows, in the number format of the model's products, and turned into float32 powers of e piece
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
    """With z the logits, e = exp(z - max z), T = sum e, p = e / T, H the entropy and t the target:
    d log p_t / dz = 1_t - e / T, and dH / dz = -p (log p + H)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        cast, rows = weight.to(dtype), max(1, PIECE // len(weight))
        kept, scores = [], []
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
            e, *of_rows = _softmax(h, t, cast, bias)
            scores.append(of_rows)
            if len(hidden) <= rows:
                kept.append(e)
        chosen, entropies, totals = (torch.cat(parts)[:, 0] for parts in zip(*scores, strict=True))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, targets, entropies, totals, *kept)
        ctx.dtype, ctx.rows = dtype, rows
        return chosen, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, entropies, totals, *kept = ctx.saved_tensors
        of_rows = [x[:, None].split(ctx.rows) for x in (targets, entropies, totals)]
        of_chosen, of_entropy = (None if g is None else g[:, None].split(ctx.rows) for g in grads)
        cast, into_hidden = weight.to(ctx.dtype), []
        # Sums over pieces are taken in float32, whatever the weights are in.
        into_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        into_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        for i, h in enumerate(hidden.split(ctx.rows)):
            t, entropy, total = (x[i] for x in of_rows)
            e = kept[0] if kept else _softmax(h, t[:, 0], cast, bias)[0]
            d, scale = _gradient(e, t, entropy, total, of_chosen and of_chosen[i], of_entropy and of_entropy[i])
            if into_bias is not None:
                into_bias += d.T @ scale[:, 0]
            d, h = d.to(ctx.dtype), (h * scale).to(ctx.dtype)
            into_hidden.append((d @ cast) * scale)
            if into_weight is not None and ctx.dtype == into_weight.dtype:
                into_weight.addmm_(d.T, h)  # a pass over all weights less
            elif into_weight is not None:
                into_weight += d.T @ h
        return torch.cat(into_hidden).to(hidden.dtype), _as(into_weight, weight), _as(into_bias, bias), None


def _softmax(hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """e, [n, vocabulary]; and log p_t, H and T, [n, 1]; float32."""
    e = linear(hidden.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)).float()
    chosen, entropies, totals = e.new_empty(3, len(e), 1)
    for at in _hot(e):
        z = e[at]
        z -= z.amax(-1, keepdim=True)
        chosen[at] = z.gather(-1, targets[at, None])
        powers = z.exp()
        totals[at] = powers.sum(-1, keepdim=True)
        entropies[at] = -z.mul_(powers).sum(-1, keepdim=True)
        z.copy_(powers)
    logs = totals.log()
    return e, chosen - logs, entropies / totals + logs, totals


def _gradient(
    e: Tensor, targets: Tensor, entropies: Tensor, totals: Tensor, of_chosen: Tensor | None, of_entropy: Tensor | None
) -> tuple[Tensor, Tensor]:
    """[n, vocabulary], in the memory of e, and [n, 1]: their product is the gradient of the logits."""
    g = torch.zeros_like(totals) if of_chosen is None else of_chosen
    if of_entropy is None:
        return e.scatter_add_(-1, targets, -totals), -g / totals
    weights = of_entropy * (totals.log() - entropies) - g
    for at in _hot(e):
        part = e[at]
        of_logs = torch.special.entr(part).mul_(of_entropy[at])  # entr(e) = -e log e
        part.mul_(weights[at]).add_(of_logs)
    return e.scatter_add_(-1, targets, g * totals), 1 / totals


def _hot(rows: Tensor) -> list[slice]:
    """Some rows at a time, on a CPU: what is done to them then happens in its cache, and in no fresh memory."""
    n = max(1, HOT // rows.shape[1]) if rows.device.type == "cpu" else max(1, len(rows))
    return [slice(i, i + n) for i in range(0, len(rows), n)]


def _as(grad: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if grad is None or like is None else grad.to(like.dtype)
