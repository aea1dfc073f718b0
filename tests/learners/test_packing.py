"""Samples, packing and collation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learners.packing import FULL_ROW, Plan, Sample, collate, filler, pack, shard, uncollate
from learners.policy import Policy, load_model, score

LENGTHS = st.lists(st.integers(1, 300), max_size=60)


def sample(**change: object) -> Sample:
    good = {"prompt_ids": [1, 2], "token_ids": [3, 4], "logprobs": [-1.0, -2.0], "mask": [1, 0]}
    return Sample(**(good | change))  # type: ignore[arg-type]


@given(LENGTHS, st.integers(1, 1000))
def test_every_sequence_sits_in_exactly_one_row(lengths: list[int], budget: int) -> None:
    placed = [i for plan in pack(lengths, budget) for row in plan.rows for i in row]
    assert sorted(placed) == list(range(len(lengths)))


@given(LENGTHS, st.integers(1, 1000))
def test_rows_are_nearly_full_and_the_budget_is_kept_unless_one_sequence_is_longer(
    lengths: list[int], budget: int
) -> None:
    for plan in pack(lengths, budget):
        assert all(FULL_ROW * plan.length <= sum(lengths[i] for i in row) <= plan.length for row in plan.rows)
        assert plan.length == max(lengths[i] for row in plan.rows for i in row)
        assert len(plan.rows) * plan.length <= budget or len(plan.rows) == 1
        if plan.length > budget:
            assert len(plan.rows) == 1


@pytest.mark.parametrize("budget", [512, 1024, 4096])
def test_documents_of_usual_lengths_waste_less_than_a_tenth(budget: int) -> None:
    rng = np.random.default_rng(0)
    lengths = [int(n) for n in np.clip(rng.normal(130, 20, 64), 70, 200)]
    positions = sum(len(plan.rows) * plan.length for plan in pack(lengths, budget))
    assert sum(lengths) / positions > 0.9


@pytest.mark.parametrize(("lengths", "budget"), [([3, 0], 10), ([3], 0)])
def test_a_length_or_budget_below_one_is_refused(lengths: list[int], budget: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        pack(lengths, budget)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"logprobs": [-1.0]}, "misaligned"),
        ({"mask": [1, 0, 1]}, "misaligned"),
        ({"token_ids": [3, 4, 5]}, "misaligned"),
        ({"advantage": [1.0]}, "advantage of shape"),
        ({"proximal": [-1.0] * 3}, "proximal of shape"),
        ({"mask": [1, 2]}, "other than 0 and 1"),
        ({"logprobs": [float("nan"), 0.0]}, "not finite"),
        ({"logprobs": [float("-inf"), 0.0]}, "not finite"),
        ({"prompt_ids": []}, "non-empty"),
        ({"token_ids": [], "logprobs": [], "mask": []}, "non-empty"),
        ({"prompt_ids": [1, -2]}, "negative"),
        ({"token_ids": [1.5, 2.0]}, "integers"),
        ({"advantage": float("nan")}, "advantage"),
        ({"advantage": [0.0, float("nan")]}, "advantage"),
        ({"weight": -1.0}, "weight"),
        ({"weight": float("inf")}, "weight"),
    ],
)
def test_a_sample_that_would_poison_the_step_is_refused(change: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        sample(**change)


def test_a_log_prob_outside_the_mask_may_be_anything() -> None:
    batch = collate([sample(logprobs=[-1.0, float("nan")])], Plan(((0,),), 3))
    assert torch.isfinite(batch.logprobs).all()


def test_the_batch_says_of_each_position_what_it_predicts() -> None:
    first = sample(advantage=2.0, weight=0.5)
    second = sample(prompt_ids=[7], token_ids=[8, 9], logprobs=[-3.0, -4.0], mask=[1, 1], advantage=-1.0)
    batch = collate([first, second], Plan(((0, 1),), 6))
    assert batch.input_ids.tolist() == [[1, 2, 3, 7, 8, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2]]  # the tail goes on counting
    assert batch.targets.tolist() == [[0, 3, 4, 8, 9, 0]]
    assert batch.mask.tolist() == [[0, 0.5, 0, 1, 1, 0]]
    assert batch.logprobs.tolist() == [[0, -1, 0, -3, -4, 0]]
    assert batch.advantages.tolist() == [[0, 2, 2, -1, -1, 0]]
    assert batch.sequence.tolist() == [[0, 0, 0, 1, 1, 0]]
    assert batch.sequences == 2


def test_advantages_may_differ_from_token_to_token() -> None:
    batch = collate([sample(advantage=[2.0, -1.0])], Plan(((0,),), 3))
    assert batch.advantages.tolist() == [[0, 2, -1]]


def test_log_probs_of_other_policies_are_laid_out_like_the_samplers_if_all_samples_have_them() -> None:
    with_both = sample(proximal=[-5.0, -6.0], reference=[-7.0, -8.0])
    batch = collate([with_both], Plan(((0,),), 3))
    assert batch.proximal is not None and batch.proximal.tolist() == [[0, -5, 0]]
    assert batch.reference is not None and batch.reference.tolist() == [[0, -7, 0]]
    mixed = collate([with_both, sample()], Plan(((0,), (1,)), 3))
    assert mixed.proximal is None and mixed.reference is None


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12), st.integers(1, 40))
def test_every_token_comes_back_from_where_it_was_laid(sizes: list[tuple[int, int]], budget: int) -> None:
    samples = [
        sample(prompt_ids=[0] * p, token_ids=range(i, i + r), logprobs=[-1.0] * r, mask=[1] * r)
        for i, (p, r) in enumerate(sizes)
    ]
    for plan in pack([len(s) for s in samples], budget):
        for i, targets in uncollate(collate(samples, plan).targets.numpy(), samples, plan):
            assert targets.tolist() == samples[i].token_ids.tolist()


def test_sums_and_means_are_of_the_charged_tokens_of_each_sequence() -> None:
    other = sample(prompt_ids=[7], token_ids=[8, 9], logprobs=[-3.0, -4.0], mask=[1, 1], weight=0.5)
    batch = collate([sample(), other], Plan(((0, 1),), 5))
    values = torch.tensor([[9.0, 1.0, 9.0, 2.0, 4.0]])
    assert batch.sums(values)[batch.charged].tolist() == [1, 6, 6]
    assert batch.means(values)[batch.charged].tolist() == [1, 3, 3]
    assert batch.lengths[batch.charged].tolist() == [1, 2, 2]


def test_a_filler_has_no_weight() -> None:
    assert filler().mask.sum() == 0


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 5))
def test_shards_hold_every_sample_once_and_are_balanced(lengths: list[int], ranks: int) -> None:
    samples = [sample(prompt_ids=[0] * n) for n in lengths]
    shards = shard(samples, ranks)
    assert sorted(id(s) for part in shards for s in part) == sorted(map(id, samples))
    loads = [sum(map(len, part)) for part in shards]
    assert max(loads) - min(loads) <= max(map(len, samples), default=0)


def test_packed_sequences_score_as_if_each_were_alone(model_dir: Path, samples: list[Sample]) -> None:
    policy = Policy(load_model(model_dir, torch.float32))
    alone = {}
    gradient = {}
    for i, s in enumerate(samples):
        batch = collate([s], Plan(((0,),), len(s)))
        logprobs, _ = score(policy, batch)
        (logprobs * (i + 1)).sum().backward()
        alone[i] = logprobs[batch.mask > 0].tolist()
    for name, p in policy.named_parameters():
        gradient[name], p.grad = p.grad, None
    plans = pack([len(s) for s in samples], 64)
    assert any(len(row) > 1 for plan in plans for row in plan.rows)
    for plan in plans:
        batch = collate(samples, plan)
        logprobs, entropy = score(policy, batch)
        order = torch.tensor([i for row in plan.rows for i in row])
        (logprobs * (order[batch.sequence] + 1)).sum().backward()
        for place, i in enumerate(order.tolist()):
            mine = (batch.sequence == place) & (batch.mask > 0)
            assert logprobs[mine].tolist() == pytest.approx(alone[i], abs=1e-5)
            assert (entropy[mine] > 0).all()
    for name, p in policy.named_parameters():
        one, packed = gradient[name], p.grad
        assert one is not None and packed is not None
        assert (packed - one).norm() <= 1e-5 * one.norm()
