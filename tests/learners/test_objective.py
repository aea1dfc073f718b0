"""Aggregation, corrections and KL: each by its formula, all of them together, and over micro-batches."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learners.aggregation import AGGREGATIONS
from learners.correction import CORRECTIONS
from learners.kl import ESTIMATORS
from learners.losses import LOSSES
from learners.objective import Objective, make_objective, summary
from learners.packing import Batch, Plan, Sample, collate

LENGTHS = [4, 1, 6, 3]


def samples(seed: int = 0, spread: float = 0.5) -> list[Sample]:
    """Samples with log-probs of a sampler, a proximal policy and a reference, some tokens not charged."""
    rng = np.random.default_rng(seed)
    made = []
    for n in LENGTHS:
        old = -3 * rng.random(n)
        mask = rng.random(n) < 0.8
        mask[0] = True
        made.append(
            Sample(
                rng.integers(0, 9, 2), rng.integers(0, 9, n), old, mask, float(rng.normal()),
                proximal=old + spread * rng.normal(size=n), reference=old + spread * rng.normal(size=n),
            )
        )  # fmt: skip
    return made


def batch_of(of: list[Sample], whole: list[Sample] | None = None) -> Batch:
    """One row a sample, with the totals of a step that holds `whole`."""
    whole = whole or of
    batch = collate(of, Plan(tuple((i,) for i in range(len(of))), max(map(len, of))))
    return replace(
        batch,
        total_tokens=sum(s.charged * s.weight for s in whole),
        total_sequences=sum(s.weight for s in whole if s.charged),
        max_tokens=8.0,
    )


def policy(batch: Batch) -> torch.Tensor:
    """Log-probs of a policy near to the proximal one."""
    assert batch.proximal is not None
    near = batch.proximal + 0.1 * torch.sin(torch.arange(batch.mask.numel())).view_as(batch.mask)
    return torch.where(batch.charged, near, 0.0).requires_grad_()


def run(objective: Objective, batch: Batch) -> tuple[float, torch.Tensor, dict[str, float]]:
    """Loss, its gradient, and metrics as they are shown."""
    logprobs = policy(batch)
    loss, metrics = objective(logprobs, batch)
    loss.backward()
    assert logprobs.grad is not None
    return loss.item(), logprobs.grad, summary({k: float(v) for k, v in metrics.items()})


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("token_mean", [1 / 4] * 4),
        ("sequence_mean", [1 / 6] * 3 + [1 / 2]),
        ("fixed_length", [1 / 16] * 4),
    ],
)
def test_an_aggregation_weighs_tokens(name: str, weights: list[float]) -> None:
    three = Sample(np.ones(1, int), np.ones(4, int), np.zeros(4), np.array([1, 0, 1, 1]))
    one = Sample(np.ones(1, int), np.ones(1, int), np.zeros(1), np.ones(1))
    batch = batch_of([three, one])
    found = AGGREGATIONS[name](batch)
    assert found[batch.charged].tolist() == pytest.approx(weights)
    assert (found[~batch.charged] == 0).all()


def test_truncation_caps_the_weight_of_single_tokens() -> None:
    batch, log_weight = _weights([[0.5, 1.0, 3.0], [2.5]])
    weight, touched = CORRECTIONS["truncate_tokens"](log_weight, batch, cap=2.0)
    assert weight[batch.charged].tolist() == pytest.approx([0.5, 1.0, 2.0, 2.0])
    assert touched[batch.charged].tolist() == [False, False, True, True]


def test_token_masks_drop_single_tokens() -> None:
    batch, log_weight = _weights([[0.4, 1.0, 3.0], [6.0]])
    weight, _ = CORRECTIONS["mask_tokens"](log_weight, batch)
    assert weight[batch.charged].tolist() == pytest.approx([0.0, 1.0, 3.0, 0.0])


def test_sequence_masks_drop_whole_sequences_by_their_mean_ratio_whatever_their_length() -> None:
    batch, log_weight = _weights([[0.5, 2.0, 4.0], [3.0], [0.3, 0.4], [1.5] * 9])
    weight, touched = CORRECTIONS["mask_sequences"](log_weight, batch)
    assert weight[batch.charged].tolist() == [1.0] * 3 + [0.0] + [0.0] * 2 + [1.0] * 9
    assert touched[batch.charged].tolist() == [False] * 3 + [True] * 3 + [False] * 9


def test_sequence_weights_are_the_product_of_their_tokens_or_nothing() -> None:
    batch, log_weight = _weights([[0.5, 3.0], [2.0, 2.0]])
    weight, _ = CORRECTIONS["weigh_sequences"](log_weight, batch)
    assert weight[batch.charged].tolist() == pytest.approx([1.5, 1.5, 0.0, 0.0])


def _weights(ratios: list[list[float]]) -> tuple[Batch, torch.Tensor]:
    batch = batch_of([Sample(np.ones(1, int), np.ones(len(r), int), np.zeros(len(r)), np.ones(len(r))) for r in ratios])
    log_weight = torch.zeros_like(batch.mask)
    log_weight[batch.charged] = torch.tensor([math.log(v) for r in ratios for v in r])
    return batch, log_weight


def test_corrections_multiply_the_loss_of_each_token_and_report_what_they_touched() -> None:
    batch = batch_of(samples())
    assert batch.proximal is not None
    weight = torch.where(batch.charged, batch.proximal - batch.logprobs, 0.0).exp()
    factor = weight.clamp(max=1.1) * CORRECTIONS["mask_sequences"](weight.log(), batch, low=0.8, high=1.25)[0]
    correction = {"truncate_tokens": {"cap": 1.1}, "mask_sequences": {"low": 0.8, "high": 1.25}}
    _, gradient, metrics = run(make_objective(correction=correction), batch)
    _, plain, _ = run(make_objective(), replace(batch, logprobs=batch.proximal))
    assert torch.allclose(gradient, plain * factor, atol=1e-7)
    charged = weight[batch.charged]
    assert metrics["truncate_tokens_share"] == pytest.approx((charged > 1.1).float().mean().item())
    assert metrics["mask_sequences_share"] == pytest.approx((factor == 0)[batch.charged].float().mean().item())
    assert metrics["kl_mismatch"] == pytest.approx((charged - 1 - charged.log()).mean().item(), rel=1e-4)
    ess = charged.sum() ** 2 / (len(charged) * charged.square().sum())
    assert metrics["ess"] == pytest.approx(ess.item(), rel=1e-5)
    assert metrics["weight_mean"] == pytest.approx(charged.mean().item(), rel=1e-5)


def test_where_the_sampler_is_the_proximal_policy_the_default_corrections_change_nothing() -> None:
    of = [replace_proximal(s, s.logprobs) for s in samples()]
    batch = batch_of(of)
    corrected = run(make_objective(correction={"truncate_tokens": {}, "mask_sequences": {}}), batch)
    plain = run(make_objective(), batch)
    assert corrected[0] == plain[0]
    assert torch.equal(corrected[1], plain[1])
    assert corrected[2]["ess"] == pytest.approx(1.0)
    assert corrected[2]["kl_mismatch"] == 0.0


def replace_proximal(sample: Sample, proximal: np.ndarray | None) -> Sample:
    sample.proximal = proximal
    return sample


def test_in_the_first_update_the_policy_is_its_own_proximal_policy() -> None:
    bare = batch_of([replace_proximal(s, None) for s in samples()])
    logprobs = policy(batch_of(samples()))
    objective = make_objective(correction={"truncate_tokens": {}})
    known = objective(logprobs, replace(bare, proximal=logprobs.detach()))
    taken = objective(logprobs, bare)
    assert taken[0] == known[0]
    assert taken[1]["ratio_max"] == 1.0 and taken[1]["clip_share"] == 0.0
    assert taken[1]["kl_mismatch"] == taken[1]["kl_behaviour"] > 0


def test_without_a_correction_the_ratio_is_to_the_sampler() -> None:
    batch = batch_of(samples())
    _, _, metrics = run(make_objective(), batch)
    ratio = (policy(batch).detach() - batch.logprobs)[batch.charged].exp()
    assert metrics["ratio_mean"] == pytest.approx(ratio.mean().item(), rel=1e-5)
    assert "ess" not in metrics


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=20))
def test_kl_estimates_have_the_sign_and_size_of_their_formulas(values: list[float]) -> None:
    r = torch.tensor(values, dtype=torch.float64)
    assert torch.equal(ESTIMATORS["k1"](r), r)
    assert torch.allclose(ESTIMATORS["k2"](r), r * r / 2)
    assert torch.allclose(ESTIMATORS["k3"](r), torch.exp(-r) - 1 + r)
    assert (ESTIMATORS["k2"](r) >= 0).all() and (ESTIMATORS["k3"](r) >= -1e-12).all()


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_gradient_of_a_kl_estimate_is_that_of_the_kl_where_it_should_be(name: str, unbiased: bool) -> None:
    """Over all tokens of a small vocabulary, each weighed by its probability, instead of over samples."""
    made = torch.Generator().manual_seed(1)
    logits = torch.randn(6, generator=made, dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(torch.randn(6, generator=made, dtype=torch.float64), 0)
    new = torch.log_softmax(logits, 0)
    exact = torch.autograd.grad((new.exp() * (new - reference)).sum(), logits, retain_graph=True)[0]
    ratio = (new - new.detach()).exp() if unbiased else 1.0
    estimate = (new.exp().detach() * ratio * ESTIMATORS[name](new - reference)).sum()
    found = torch.autograd.grad(estimate, logits)[0]
    if unbiased != (name == "k2"):
        assert torch.allclose(found, exact)
    elif name == "k1" and not unbiased:
        assert torch.allclose(found, torch.zeros(6, dtype=torch.float64), atol=1e-12)
    else:
        assert not torch.allclose(found, exact) and torch.dot(found, exact) > 0


def test_the_kl_is_added_per_token_with_its_coefficient() -> None:
    batch = batch_of(samples())
    assert batch.reference is not None
    with_kl = run(make_objective(kl="k2", kl_coef=0.3, aggregation="sequence_mean"), batch)
    without = run(make_objective(aggregation="sequence_mean"), batch)
    log_ratio = (policy(batch).detach() - batch.reference) * batch.charged
    kl = 0.5 * log_ratio.square()
    assert with_kl[0] - without[0] == pytest.approx(0.3 * (kl * AGGREGATIONS["sequence_mean"](batch)).sum().item())
    assert with_kl[2]["kl_reference"] == pytest.approx(kl[batch.charged].mean().item(), rel=1e-5)


def test_a_kl_without_reference_log_probs_is_refused() -> None:
    batch = replace(batch_of(samples()), reference=None)
    with pytest.raises(ValueError, match="without the reference's log-probs"):
        make_objective(kl="k3", kl_coef=0.1)(policy(batch), batch)


EVERYTHING: dict[str, Any] = {
    "correction": {"truncate_tokens": {"cap": 1.2}, "mask_sequences": {"low": 0.9, "high": 1.1}},
    "kl": "k3",
    "kl_coef": 0.1,
}


@pytest.mark.parametrize(("loss", "aggregation"), itertools.product(LOSSES, AGGREGATIONS))
def test_shares_of_micro_batches_add_up_whatever_is_chosen(loss: str, aggregation: str) -> None:
    whole = samples()
    whole[1].weight = 0.5
    objective = make_objective(loss, aggregation=aggregation, **EVERYTHING)
    together = batch_of(whole)
    logprobs = policy(together).detach()
    loss_value, metrics = objective(logprobs, together)
    parts = []
    for i, of in enumerate(whole):
        part = batch_of([of], whole)
        parts.append(objective(logprobs[i : i + 1, : part.mask.shape[1]], part))
    assert sum(p[0].item() for p in parts) == pytest.approx(loss_value.item(), rel=1e-5, abs=1e-7)
    for name in metrics:
        fold = max if name.endswith("_max") else sum
        assert fold(p[1][name].item() for p in parts) == pytest.approx(metrics[name].item(), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("apart", [50.0, 1e4])
def test_nothing_overflows_however_far_apart_the_policies_are(loss: str, apart: float) -> None:
    of = samples()
    for s in of:
        s.proximal, s.reference = s.logprobs + apart, s.logprobs - apart
    value, gradient, metrics = run(make_objective(loss, **EVERYTHING), batch_of(of))
    assert math.isfinite(value) and torch.isfinite(gradient).all() and all(map(math.isfinite, metrics.values()))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"aggregation": "mean"}, "no aggregation 'mean'; there are: token_mean, sequence_mean, fixed_length"),
        ({"correction": {"tis": {}}}, "no correction 'tis'; there are: truncate_tokens"),
        (
            {"correction": {"truncate_tokens": {"max": 2}}},
            "has no option 'max'; it has: cap",
        ),
        ({"loss_options": {"clip_low": 0}}, "'clip_low' of loss 'grpo' must be a positive number, not 0"),
        ({"loss_options": {"dual_clip": 1.0}}, "'dual_clip' of loss 'grpo' must be a number above 1, not 1.0"),
        ({"correction": {"mask_sequences": {"low": 3}}}, "'low' of .* must be a number between 0 and 1, not 3"),
        ({"correction": {"mask_tokens": {"low": 0.2, "high": 0.4}}}, "'high' of .* must be a number above 1, not 0.4"),
        ({"correction": {"weigh_sequences": {"cap": 0.9}}}, "'cap' of .* must be a number of at least 1, not 0.9"),
        ({"correction": {"truncate_tokens": {"cap": math.nan}}}, "must be a number of at least 1, not nan"),
        ({"kl": "k4", "kl_coef": 1.0}, "no KL estimator 'k4'"),
    ],
)
def test_an_unknown_part_or_option_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make_objective(**options)
