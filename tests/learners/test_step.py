"""A step: what is computed before its updates, and that two ranks take the step that one would."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learners.engine import Learner
from learners.kl import k1
from learners.packing import Sample
from learners.step import Recipe, StepPlan, estimate, score, take_step
from tests.learners.rank import Job, launch, run

Make = Callable[..., Learner]


@pytest.fixture
def named(samples: list[Sample]) -> dict[str, Sample]:
    return {f"g{i // 4}/{i % 4}": replace(s, advantage=0.0, weight=1.0) for i, s in enumerate(samples)}


def plan_of(named: dict[str, Sample], updates: int = 1, passes: int = 1, **options: Any) -> StepPlan:
    """Three groups of four, a group or more an update."""
    groups = [[(f"g{g}/{i}", float((g + 2 * i) % 5), named[f"g{g}/{i}"].charged) for i in range(4)] for g in range(3)]
    parts = [[name for group in groups[u::updates] for name, *_ in group] for u in range(updates)]
    return StepPlan(groups, parts * passes, **options)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_sample_has_one_rank_and_every_part_is_shared_evenly(named: dict[str, Sample], ranks: int) -> None:
    plan = plan_of(named, updates=3, passes=2)
    shares = [plan.share(r, ranks) for r in range(ranks)]
    assert sorted(name for share in shares for name in share) == sorted(named)
    for part in plan.parts:
        counts = [len(set(part) & set(share)) for share in shares]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(
    ("updates", "passes", "recipe", "taken"),
    [
        (1, 1, Recipe("grpo", corrected=True), []),
        (3, 1, Recipe("grpo", corrected=True), ["g1", "g2"]),
        (1, 2, Recipe("grpo", corrected=True), ["g0", "g1", "g2"]),
        (3, 2, Recipe("grpo"), []),
        (1, 1, Recipe("grpo", corrected=True, kl_coef=0.1, kl_in_reward=True), ["g0", "g1", "g2"]),
        (1, 1, Recipe("grpo", kl_coef=0.1, kl_in_reward=True), []),
    ],
)
def test_proximal_log_probs_are_taken_where_an_update_came_before(
    learner: Make,
    model_dir: Path,
    named: dict[str, Sample],
    updates: int,
    passes: int,
    recipe: Recipe,
    taken: list[str],
) -> None:
    engine = learner(reference=model_dir)
    score(engine, plan_of(named, updates, passes), named, recipe)
    assert sorted({n[:2] for n, s in named.items() if s.proximal is not None}) == taken
    assert all((s.reference is not None) == (recipe.kl_coef > 0) for s in named.values())


def test_the_second_pass_keeps_the_proximal_policy_of_the_step(learner: Make, named: dict[str, Sample]) -> None:
    engine = learner(lr=1e-2, correction={"truncate_tokens": {}})
    before = dict(zip(named, engine.logprobs(list(named.values())), strict=True))
    metrics, _ = take_step(engine, plan_of(named, updates=3, passes=2), named, Recipe("grpo", corrected=True))
    for name, sample in named.items():
        assert sample.proximal is not None
        np.testing.assert_allclose(sample.proximal, before[name], atol=1e-6)
    assert metrics["ratio_max"] > 1.0 and metrics["score_s"] > 0


def test_a_kl_in_the_reward_comes_off_it_before_the_groups_are_compared(
    learner: Make, model_dir: Path, named: dict[str, Sample]
) -> None:
    engine = learner(reference=model_dir, lr=1e-2)
    engine.step([replace(s, advantage=1.0) for s in named.values()])
    recipe = Recipe("dr_grpo", corrected=True, kl_coef=0.5, kl_estimator="k1", kl_in_reward=True)
    plan = plan_of(named)
    penalties = score(engine, plan, named, recipe)
    new, old = (engine.logprobs(list(named.values()), reference=r) for r in (False, True))
    for sample, penalty, a, b in zip(named.values(), penalties.values(), new, old, strict=True):
        exact = 0.5 * k1(torch.from_numpy((a - b)[sample.mask == 1])).numpy()
        np.testing.assert_allclose(penalty, exact, atol=1e-5)
    rewards = [[reward - penalties[name].sum() for name, reward, _ in group] for group in plan.groups]
    expected = [r - np.mean(group) for group in rewards for r in group]
    assert list(estimate(plan, penalties, "dr_grpo").values()) == pytest.approx(expected)
    metrics, _ = take_step(engine, plan, named, recipe)
    assert metrics["kl_reference"] == pytest.approx(np.concatenate(list(penalties.values())).mean() / 0.5)


def test_advantages_of_tokens_reach_the_tokens_that_are_charged(learner: Make, named: dict[str, Sample]) -> None:
    _, advantages = take_step(learner(), plan_of(named), named, Recipe("reinforce_pp"))
    for name, sample in named.items():
        charged = np.asarray(sample.advantage)[sample.mask == 1]
        assert charged.mean() == pytest.approx(advantages[name])
        assert (np.asarray(sample.advantage)[sample.mask == 0] == 0).all()
    assert sum(s.charged * advantages[n] for n, s in named.items()) == pytest.approx(0.0, abs=1e-9)


def test_credit_is_added_to_the_advantage_of_charged_tokens(learner: Make, named: dict[str, Sample]) -> None:
    credit = {"g0/0": np.arange(16.0), "g2/1": np.full(3, -0.5)}
    _, plain = take_step(learner(), plan_of(named), named, Recipe("grpo"))
    _, advantages = take_step(learner(), plan_of(named), named, Recipe("grpo"), credit)
    assert advantages == plain
    for name, sample in named.items():
        expected = sample.mask * (advantages[name] + credit.get(name, 0.0))
        np.testing.assert_allclose(np.asarray(sample.advantage), expected)


def test_samples_without_weight_are_compared_with_but_not_learnt_from(learner: Make, named: dict[str, Sample]) -> None:
    plan = plan_of(named, without_weight={"g0/0", "g2/1"})
    metrics, advantages = take_step(learner(), plan, named, Recipe("grpo"))
    assert metrics["tokens_trained"] == sum(s.charged for n, s in named.items() if n not in ("g0/0", "g2/1"))
    assert len(advantages) == 12 and advantages["g0/0"] != 0


RECIPES: dict[str, tuple[dict[str, Any], Recipe]] = {
    "corrected": (
        {"correction": {"truncate_tokens": {"cap": 1.2}, "mask_sequences": {"low": 0.5, "high": 2.0}}},
        Recipe("grpo", corrected=True),
    ),
    "kl in reward": (
        {"correction": {"truncate_tokens": {}}, "zero_stage": 3},
        Recipe("reinforce_pp", corrected=True, kl_coef=0.1, kl_estimator="k2", kl_in_reward=True),
    ),
    "kl in loss": (
        {"kl": "k3", "kl_coef": 0.1, "entropy_bonus": 0.01, "aggregation": "fixed_length", "max_tokens": 16},
        Recipe("rloo", kl_coef=0.1),
    ),
}


def options(model_dir: Path, name: str) -> dict[str, Any]:
    own, recipe = RECIPES[name]
    reference = {"reference": model_dir} if recipe.kl_coef else {}
    return {"model_dir": model_dir, "lr": 1e-3, "tokens_per_microbatch": 32} | own | reference


def near(samples: dict[str, Sample], engine: Learner) -> dict[str, Sample]:
    """The samples as if a policy near to the engine's had made them."""
    rng = np.random.default_rng(0)
    found = engine.logprobs(list(samples.values()))
    return {
        name: replace(s, logprobs=p + 0.3 * rng.normal(size=len(p)), proximal=None, reference=None)
        for (name, s), p in zip(samples.items(), found, strict=True)
    }


@pytest.mark.integration
@pytest.mark.timeout(300)  # two processes that import the whole stack
def test_two_ranks_take_the_step_that_one_would(model_dir: Path, named: dict[str, Sample], tmp_path: Path) -> None:
    with closing(Learner(model_dir, lr=1e-3, threads=1)) as engine:
        made = near(named, engine)
    plan = plan_of(named, updates=2)

    def jobs() -> list[Job]:
        own = {name: {n: replace(s) for n, s in made.items()} for name in RECIPES}
        return [Job(options(model_dir, name), own[name], 1, plan=plan, recipe=RECIPES[name][1]) for name in RECIPES]

    expected = [run(job) for job in jobs()]
    with ExitStack() as stack:
        ranks = launch(tmp_path, jobs(), stack)
        assert [p.wait(timeout=250) for p in ranks] == [0, 0], (tmp_path / "0.log").read_text()
    for rank in range(2):
        for name, found, want in zip(RECIPES, torch.load(tmp_path / f"{rank}"), expected, strict=True):
            (metrics,), _, weights, advantages = found
            assert advantages == pytest.approx(want.advantages, rel=1e-4), name
            for key, weight in want.weights.items():
                assert (weights[key] - weight).norm() <= 1e-5 * weight.norm(), (name, key)
            for key in set(metrics) - {"padding", "microbatches", "forward_backward_s", "optimizer_s", "score_s"}:
                assert metrics[key] == pytest.approx(want.metrics[0][key], rel=1e-3, abs=1e-6), (name, key)
