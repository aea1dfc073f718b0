from __future__ import annotations

import pytest

from cluster.config import Config, load
from cluster.pools import _capacity


def tiny(*overrides: str) -> Config:
    stages = ["rollout.concurrency=32", "render.concurrency=16", "score.concurrency=12", "learner.samples_per_prompt=8"]
    steps = ["learner.prompts_per_step=4", "learner.updates_per_step=1", "learner.steps=50"]
    return load("examples/tiny.yaml", [*stages, *steps, *overrides])


def test_as_many_groups_run_as_all_workers_hold_and_as_many_again() -> None:
    assert _capacity(tiny()).concurrency == 2 * (32 + 16 + 12) // 8


@pytest.mark.parametrize(
    ("only", "accepted"), [("train.only=null", 8), ("train.only=rollout", 15), ("train.only=learn", 0)]
)
def test_what_a_run_accepts_at_first_is_what_it_can_use(only: str, accepted: int) -> None:
    assert _capacity(tiny(only, "train.store=saved")).left(step=0, waiting=0, running=0) == accepted
