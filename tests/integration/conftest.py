"""A tiny policy that writes well-formed documents half of the time, made once for all integration tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from cluster.config import Config, load

#: Small enough for two busy cores; the engines are the real ones.
TINY = [
    "prompts.count=64",
    "prompts.heldout_count=12",
    "prompts.unseen=null",
    "sft.documents=320",
    "sft.epochs=1",
    "rollout.max_tokens=220",
    "rollout.concurrency=16",
    "rollout.engine.max_num_seqs=16",
    "learner.steps=2",
    "learner.prompts_per_step=3",
    "learner.samples_per_prompt=4",
    "learner.updates_per_step=1",
    "learner.warmup_steps=0",
    "learner.checkpoint_every=1",
]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def tiny(runs: Path) -> Callable[..., Config]:
    """A tiny config: `tiny("name", "key=value", ...)`."""

    def make(name: str, *overrides: str) -> Config:
        return load("examples/tiny.yaml", [*TINY, f"name={name}", f"run_dir={runs}", *overrides])

    return make


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """Ray on this machine for one module."""
    from cluster.pools import init_ray

    os.environ.pop("RAY_ADDRESS", None)
    init_ray()
    yield
    ray.shutdown()
