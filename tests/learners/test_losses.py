"""Values and gradients of the losses, against the formulas written out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from learners.losses import LOSSES
from learners.objective import make_objective
from learners.packing import Batch, Plan, Sample, collate


def batch_of(*samples: Sample) -> Batch:
    """One row a sample, with the totals of a step that holds nothing else."""
    batch = collate(samples, Plan(tuple((i,) for i in range(len(samples))), max(map(len, samples))))
    weights = sum(s.weight for s in samples if s.charged)
    return replace(batch, total_tokens=float(batch.mask.sum()), total_sequences=weights)


def ratios(*values: float, advantage: float, weight: float = 1.0) -> tuple[Sample, list[float]]:
    """A sample and the log-probs of a policy that has those ratios to the sampler."""
    old = [-1.0 - i for i in range(len(values))]
    n = len(values)
    sample = Sample([1], list(range(n)), old, [1] * n, advantage, weight)  # type: ignore[arg-type]
    return sample, [o + math.log(v) for o, v in zip(old, values, strict=True)]


def run(name: str, *cases: tuple[Sample, list[float]], **options: Any) -> tuple[float, torch.Tensor, dict[str, float]]:
    """The loss with nothing added, its gradient by log-prob in order, and its metrics; old is what sampled."""
    batch = batch_of(*(s for s, _ in cases))
    logprobs = torch.zeros_like(batch.logprobs)
    logprobs[batch.mask > 0] = torch.tensor([v for s, new in cases if s.weight for v in new])
    logprobs.requires_grad_()
    loss, metrics = make_objective(name, options)(logprobs, batch)
    loss.backward()
    assert logprobs.grad is not None
    assert (logprobs.grad[batch.mask == 0] == 0).all()
    return loss.item(), logprobs.grad[batch.mask > 0], {k: v.item() for k, v in metrics.items()}


def test_grpo_is_the_token_mean_of_ratio_times_advantage_inside_the_clip() -> None:
    loss, grad, metrics = run("grpo", ratios(1.1, advantage=2.0), ratios(0.9, 1.0, advantage=-1.0))
    assert loss == pytest.approx(-(1.1 * 2 - 0.9 - 1.0) / 3)
    assert grad.tolist() == pytest.approx([-2.2 / 3, 0.9 / 3, 1.0 / 3])
    assert metrics["clip_share"] == 0
    assert metrics["ratio_mean"] == pytest.approx(1.0)
    assert metrics["ratio_max"] == pytest.approx(1.1)


def test_grpo_clips_from_above_for_good_and_from_below_for_bad_tokens() -> None:
    loss, grad, metrics = run(
        "grpo", ratios(1.5, advantage=1.0), ratios(0.5, advantage=-1.0), clip_low=0.2, clip_high=0.28
    )
    assert loss == pytest.approx(-(1.28 - 0.8) / 2)
    assert grad.tolist() == [0.0, 0.0]
    assert metrics["clip_share"] == 1.0


def test_grpo_does_not_clip_what_makes_the_objective_worse() -> None:
    loss, grad, _ = run("grpo", ratios(0.5, advantage=1.0), ratios(1.5, advantage=-1.0))
    assert loss == pytest.approx(-(0.5 - 1.5) / 2)
    assert grad.tolist() == pytest.approx([-0.25, 0.75])


def test_the_dual_clip_bounds_a_bad_token_that_became_likely() -> None:
    loss, grad, metrics = run("grpo", ratios(50.0, advantage=-2.0), dual_clip=3.0)
    assert loss == pytest.approx(6.0)
    assert grad.tolist() == [0.0]
    assert metrics["clip_share"] == 1.0


def test_a_ratio_that_would_overflow_stays_finite() -> None:
    sample, _ = ratios(1.0, advantage=1.0)
    loss, grad, metrics = run("grpo", (sample, [1e4]))
    assert math.isfinite(loss) and torch.isfinite(grad).all() and all(map(math.isfinite, metrics.values()))


def test_kl_behaviour_is_the_k3_estimate() -> None:
    _, _, metrics = run("grpo", ratios(2.0, 0.5, advantage=1.0))
    assert metrics["kl_behaviour"] == pytest.approx(((2 - 1 - math.log(2)) + (0.5 - 1 - math.log(0.5))) / 2, rel=1e-5)


def test_gspo_uses_the_geometric_mean_of_ratios_and_the_mean_over_sequences() -> None:
    wide = {"clip_low": 0.9, "clip_high": 9.0}
    loss, grad, _ = run("gspo", ratios(1.0, 1.21, advantage=2.0), ratios(0.8, advantage=-1.0), **wide)
    assert loss == pytest.approx(-(1.1 * 2 - 0.8) / 2, rel=1e-5)
    assert grad.tolist() == pytest.approx([-1.1 * 2 / 2 / 2] * 2 + [0.8 / 2], rel=1e-5)


def test_gspo_clips_whole_sequences() -> None:
    loss, grad, metrics = run("gspo", ratios(1.0, 1.21, advantage=1.0), ratios(1.0, advantage=1.0))
    assert loss == pytest.approx(-(1.0004 + 1.0) / 2)
    assert grad.tolist() == pytest.approx([0.0, 0.0, -0.5])
    assert metrics["clip_share"] == pytest.approx(2 / 3)


def test_cispo_bounds_the_weight_of_a_token_and_keeps_its_gradient() -> None:
    loss, grad, metrics = run("cispo", ratios(1.5, 0.5, advantage=2.0), ratios(9.0, advantage=-1.0), clip_high=0.2)
    new = [math.log(1.5) - 1, math.log(0.5) - 2, math.log(9.0) - 1]
    assert loss == pytest.approx(-(1.2 * 2 * new[0] + 0.5 * 2 * new[1] - 1.2 * new[2]) / 3, rel=1e-5)
    assert grad.tolist() == pytest.approx([-1.2 * 2 / 3, -0.5 * 2 / 3, 1.2 / 3], rel=1e-5)
    assert metrics["clip_share"] == pytest.approx(2 / 3)


def test_rloo_in_the_first_update_is_reinforce_on_whole_sequences() -> None:
    loss, grad, _ = run("rloo", ratios(1.0, 1.0, 1.0, advantage=2.0), ratios(1.0, advantage=-1.0))
    assert loss == pytest.approx(-(2.0 - 1.0) / 2)
    assert grad.tolist() == pytest.approx([-1.0, -1.0, -1.0, 0.5])


def test_rloo_clips_the_product_of_a_sequences_ratios() -> None:
    loss, grad, metrics = run("rloo", ratios(1.1, 1.15, advantage=1.0), ratios(1.1, advantage=1.0))
    assert loss == pytest.approx(-(1.2 + 1.1) / 2)
    assert grad.tolist() == pytest.approx([0.0, 0.0, -0.55], rel=1e-5)
    assert metrics["clip_share"] == pytest.approx(2 / 3)


def test_sft_is_the_mean_negative_log_likelihood() -> None:
    loss, grad, metrics = run("sft", ratios(1.0, 1.0, advantage=0.0), ratios(1.0, advantage=0.0))
    assert loss == pytest.approx((1 + 2 + 1) / 3)
    assert grad.tolist() == pytest.approx([-1 / 3] * 3)
    assert metrics == {}


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "sft"])  # which knows no advantages
def test_a_tokens_own_advantage_moves_other_tokens_only_in_a_loss_of_whole_sequences(name: str) -> None:
    sample, new = ratios(1.0, 1.0, 1.0, advantage=0.0)
    credited = replace(sample, advantage=np.array([0.0, 1.0, 0.0]))
    _, grad, _ = run(name, (credited, new))
    assert [g != 0 for g in grad.tolist()] == [LOSSES[name].of_sequence, True, LOSSES[name].of_sequence]


@pytest.mark.parametrize("name", LOSSES)
def test_a_sample_without_weight_changes_nothing(name: str) -> None:
    kept = ratios(1.1, 0.7, advantage=0.5)
    alone = run(name, kept)
    beside = run(name, kept, ratios(3.0, advantage=-4.0, weight=0.0))
    assert beside[0] == pytest.approx(alone[0])
    assert beside[2] == pytest.approx(alone[2])


@pytest.mark.parametrize("name", LOSSES)
def test_shares_of_micro_batches_add_up_to_the_whole(name: str) -> None:
    cases = [
        ratios(1.1, 0.7, advantage=0.5),
        ratios(0.9, advantage=-1.0, weight=0.5),
        ratios(1.3, 1.0, 1.0, advantage=2.0),
    ]
    whole = batch_of(*(s for s, _ in cases))
    shares = []
    for sample, new in cases:
        batch = replace(batch_of(sample), total_tokens=whole.total_tokens, total_sequences=whole.total_sequences)
        logprobs = torch.zeros_like(batch.logprobs)
        logprobs[batch.mask > 0] = torch.tensor(new)
        shares.append(make_objective(name)(logprobs, batch)[0].item())
    assert sum(shares) == pytest.approx(run(name, *cases)[0], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("ppo", {}, "no loss 'ppo'; there are: grpo, gspo, cispo, rloo, sft"),
        ("grpo", {"clip": 0.2}, "no option 'clip'; it has: clip_low, clip_high, dual_clip"),
        ("sft", {"clip_low": 0.2}, "no option 'clip_low'; it has: none"),
        ("grpo", {"clip_low": -0.1}, "positive number"),
        ("gspo", {"clip_low": "0.1"}, "positive number"),
        ("grpo", {"dual_clip": float("nan")}, "must be a number above 1"),
        ("grpo", {"batch": 1}, "no option 'batch'"),
    ],
)
def test_an_unknown_loss_or_option_is_refused(name: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make_objective(name, options)
