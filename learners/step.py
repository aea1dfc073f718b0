"""One step of the learner: from the rewards of its groups to advantages, log-probs and updates.

All ranks hold the same plan and their own samples, and call in the same order.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from learners.advantages import ADVANTAGES, Outcome
from learners.credit import Credit
from learners.kl import ESTIMATORS
from learners.packing import Sample
from learners.world import gathered

if TYPE_CHECKING:
    from learners.engine import Learner  # imports Transformers, which who only plans a step does not need

#: Metrics of updates that add up to those of a step.
_SUMMED = ("forward_backward_s", "optimizer_s", "tokens")


@dataclass(frozen=True)
class StepPlan:
    """What all ranks know of a step; samples go by the names of their trajectories.

    Attributes:
        groups: of each group, (name, reward, charged tokens) of every sample.
        parts: names of the samples of each update, in order; a sample may be in several.
        without_weight: names of samples that do not count in the loss.
        credits: of samples with calls that are credited.
    """

    groups: Sequence[Sequence[tuple[str, float, int]]]
    parts: Sequence[Sequence[str]]
    without_weight: Collection[str] = ()
    credits: Mapping[str, Sequence[Credit]] = field(default_factory=dict)

    def share(self, rank: int, ranks: int) -> list[str]:
        """The samples of one rank, the same in all updates: of every group and part about as many as each other's."""
        return [
            name for g, group in enumerate(self.groups) for i, (name, *_) in enumerate(group) if (g + i) % ranks == rank
        ]


@dataclass(frozen=True)
class Recipe:
    """What happens before the updates.

    Attributes:
        advantage: a name in `learners.advantages.ADVANTAGES`.
        corrected: the loss wants proximal log-probs.
        kl_coef: of the KL to the reference; 0 for none.
        kl_estimator: a name in `learners.kl.ESTIMATORS`.
        kl_in_reward: the KL is taken off the rewards; it is part of the loss otherwise.
    """

    advantage: str
    corrected: bool = False
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    kl_in_reward: bool = False


def take_step(
    engine: Learner,
    plan: StepPlan,
    mine: Mapping[str, Sample],
    recipe: Recipe,
    credit: Mapping[str, np.ndarray] | None = None,
) -> tuple[dict[str, float], dict[str, float]]:
    """All updates of a step with this rank's samples.

    Args:
        credit: of some of them, [tokens] what is added to each token's advantage.

    Returns:
        metrics: those of `Learner.step`, folded over the updates; `score_s`, the seconds before the first; and
            `kl_reference` if it is in the reward.
        advantages: of every sample of the step, the mean over its tokens, without the credit.
    """
    started = time.perf_counter()
    penalties = score(engine, plan, mine, recipe)
    advantages = estimate(plan, penalties, recipe.advantage)
    for name, sample in mine.items():
        sample.advantage = np.zeros(len(sample.mask))
        sample.advantage[sample.mask == 1] = advantages[name]
        if credit and name in credit:
            sample.advantage += credit[name] * sample.mask
        sample.weight = float(name not in plan.without_weight)
    metrics = {"score_s": time.perf_counter() - started}
    updates = [engine.step([mine[name] for name in part if name in mine]) for part in plan.parts]
    metrics |= {name: _fold(name)(u[name] for u in updates) for name in updates[0]}
    if penalties:
        metrics["kl_reference"] = float(np.concatenate(list(penalties.values())).mean()) / recipe.kl_coef
    return metrics, {name: float(np.mean(a)) for name, a in advantages.items()}


def score(engine: Learner, plan: StepPlan, mine: Mapping[str, Sample], recipe: Recipe) -> dict[str, np.ndarray]:
    """Gives this rank's samples the proximal and reference log-probs that the recipe needs.

    The samples of the first update need no pass of their own: their proximal log-probs are those of its forward pass.

    Returns:
        of all ranks' samples, what each charged token costs in the reward; nothing if the reward has no KL.
    """
    in_reward = recipe.kl_coef > 0 and recipe.kl_in_reward
    later = {name for part in plan.parts[0 if in_reward else 1 :] for name in part}
    if recipe.corrected and later:
        samples = [sample for name, sample in mine.items() if name in later]
        for sample, logprobs in zip(samples, engine.logprobs(samples), strict=True):
            sample.proximal = logprobs
    if recipe.kl_coef > 0:
        samples = list(mine.values())
        for sample, logprobs in zip(samples, engine.logprobs(samples, reference=True), strict=True):
            sample.reference = logprobs
    return gathered({n: _penalty(s, recipe) for n, s in mine.items()}) if in_reward else {}


def estimate(plan: StepPlan, penalties: Mapping[str, np.ndarray], advantage: str) -> dict[str, np.ndarray]:
    """The advantage of every sample of the step: one number, or one a charged token."""
    outcomes = [
        [Outcome(reward, penalties.get(name, np.zeros(charged))) for name, reward, charged in group]
        for group in plan.groups
    ]
    names = [name for group in plan.groups for name, *_ in group]
    found = [a for group in ADVANTAGES[advantage](outcomes) for a in group]
    return dict(zip(names, found, strict=True))


def _fold(metric: str) -> Callable[[Iterable[float]], float]:
    """How the values of a step's updates become one."""
    return sum if metric in _SUMMED else max if metric.endswith("_max") else statistics.fmean


def _penalty(sample: Sample, recipe: Recipe) -> np.ndarray:
    """[charged tokens] the KL's cost; without a proximal policy the sampler stands for it."""
    policy = sample.logprobs if sample.proximal is None else sample.proximal
    assert sample.reference is not None
    log_ratio = (policy - sample.reference)[sample.mask == 1].astype(np.float64)
    return recipe.kl_coef * ESTIMATORS[recipe.kl_estimator](torch.from_numpy(log_ratio)).numpy()
