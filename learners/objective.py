"""What a step minimises, built from parts that are chosen apart from each other: policy loss, corrections, KL to a
reference and aggregation.

`Objective(logprobs, batch) -> (share, metrics)`, a pure function. `logprobs` is [rows, L], laid out as `batch`. `share`
is this micro-batch's share of the loss: the shares of all micro-batches and ranks add up to the loss of the optimiser
step, because each divides by the step's totals, never by its own. The same holds for every metric but those that end in
`_max`, of which the largest counts; `summary` turns the step's sums into what is shown.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from learners.aggregation import AGGREGATIONS
from learners.correction import CORRECTIONS, log_weights
from learners.kl import ESTIMATORS, k3
from learners.losses import LOSSES, PerToken, log_ratio
from learners.packing import Batch

Metrics = dict[str, Tensor]
#: Name -> options, as a config has them.
Options = Mapping[str, Mapping[str, float]]
_POSITIVE: tuple[str, Callable[[float], bool]] = ("a positive number", lambda value: value > 0)
#: Option -> what it must be, where that is more than positive. The ratios and weights of the policy's own samples are
#: 1: with bounds that leave 1 out, nothing would be learnt from them.
_MUST_BE: dict[str, tuple[str, Callable[[float], bool]]] = {
    "dual_clip": ("a number above 1", lambda value: value > 1),
    "low": ("a number between 0 and 1", lambda value: 0 < value < 1),
    "high": ("a number above 1", lambda value: value > 1),
    "cap": ("a number of at least 1", lambda value: value >= 1),
}


@dataclass(frozen=True)
class Objective:
    """The loss of a step.

    Attributes:
        loss: of each token.
        aggregation: weight of each token.
        corrections: by name; they weigh tokens by proximal / sampler. Without any there is no proximal policy: the
            ratio of the loss is then taken to the sampler itself, as PPO was published.
        kl: estimator of KL(pi || reference), which is added times `kl_coef`; None if there is no such term.
        kl_unbiased: the estimate is weighed by the ratio pi / proximal, through which the gradient flows: so it is that
            of the KL with k1 and k3 (DeepSeek-V3.2, arXiv 2512.02556).
    """

    loss: Callable[[Tensor, Batch], PerToken]
    aggregation: Callable[[Batch], Tensor]
    corrections: Mapping[str, Callable[[Tensor, Batch], tuple[Tensor, Tensor]]]
    kl: Callable[[Tensor], Tensor] | None = None
    kl_coef: float = 0.0
    kl_unbiased: bool = False

    def __call__(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        if not self.corrections:
            batch = replace(batch, proximal=batch.logprobs)
        elif batch.proximal is None:
            batch = replace(batch, proximal=logprobs.detach())
        per_token, shown = self.loss(logprobs, batch)
        if self.corrections:
            weight, corrected = self._corrected(batch)
            per_token, shown = per_token * weight, shown | corrected
        if self.kl is not None:
            kl = self.kl(_to_reference(logprobs, batch))
            shown["kl_reference"] = kl.detach()
            if self.kl_unbiased:
                kl = log_ratio(logprobs, batch).exp() * kl
            per_token = per_token + self.kl_coef * kl
        if shown:  # of a loss that knows a sampler
            behind = log_weights(logprobs.detach(), batch)
            shown["kl_behaviour"] = k3(-behind)
        return (per_token * self.aggregation(batch)).sum(), _shares(shown, batch)

    @torch.no_grad()
    def _corrected(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.proximal is not None
        log_weight = log_weights(batch.proximal, batch)
        weight, total = log_weight.exp(), torch.ones_like(log_weight)
        shown = {"kl_mismatch": k3(-log_weight), "weight_mean": weight, "weight_square": weight.square()}
        for name, correct in self.corrections.items():
            factor, touched = correct(log_weight, batch)
            total, shown[f"{name}_share"] = total * factor, touched
        return total, shown


def make_objective(
    loss: str = "grpo",
    loss_options: Mapping[str, float] | None = None,
    aggregation: str | None = None,
    correction: Options | None = None,
    kl: str | None = None,
    kl_coef: float = 0.0,
    kl_unbiased: bool = False,
) -> Objective:
    """The objective of those names and options; `aggregation` None is the one that the loss was published with.

    Raises:
        ValueError: no such name, no such option, or a value with which nothing would be learnt.
    """
    entry = _named("loss", loss, LOSSES)
    return Objective(
        _bound("loss", loss, entry.function, loss_options or {}),
        _named("aggregation", aggregation or entry.aggregation, AGGREGATIONS),
        {n: _bound("correction", n, _named("correction", n, CORRECTIONS), o) for n, o in (correction or {}).items()},
        _named("KL estimator", kl, ESTIMATORS) if kl and kl_coef else None,
        kl_coef,
        kl_unbiased,
    )


def summary(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics of a whole step as they are shown.

    `ess` is the effective sample size of the weights proximal / sampler as a share of the tokens, (sum w)^2 / n sum w^2
    (Kong 1992): 1 where the sampler was the policy, near 0 where a few tokens outweigh all others.
    """
    shown = dict(metrics)
    if square := shown.pop("weight_square", 0.0):
        shown["ess"] = shown["weight_mean"] ** 2 / square
    return shown


def _to_reference(logprobs: Tensor, batch: Batch) -> Tensor:
    if batch.reference is None:
        raise ValueError("the loss has a KL to a reference, but a sample comes without the reference's log-probs")
    return log_ratio(logprobs, replace(batch, proximal=batch.reference))


@torch.no_grad()
def _shares(shown: Mapping[str, Tensor], batch: Batch) -> Metrics:
    """Means over the step's tokens, as shares; of names in `_max` the largest."""
    return {
        name: torch.where(batch.charged, values, 0.0).max()
        if name.endswith("_max")
        else (values * batch.mask).sum() / batch.total_tokens
        for name, values in shown.items()
    }


def _named(kind: str, name: str, registry: Mapping[str, Any]) -> Any:
    if name not in registry:
        raise ValueError(f"there is no {kind} '{name}'; there are: {', '.join(registry)}")
    return registry[name]


def _bound(kind: str, name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """`function` with its options bound; they are the parameters behind the first two."""
    known = list(inspect.signature(function).parameters)[2:]
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"{kind} '{name}' has no option '{option}'; it has: {', '.join(known) or 'none'}")
        what, right = _MUST_BE.get(option, _POSITIVE)
        if isinstance(value, bool) or not isinstance(value, int | float) or not right(value):
            raise ValueError(f"option '{option}' of {kind} '{name}' must be {what}, not {value!r}")
    return partial(function, **options)
