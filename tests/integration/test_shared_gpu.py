"""A learner and engines on the same GPUs: where they are placed, and a run in which they take turns.

There is no GPU here: Ray is told of some, and an engine that sleeps frees no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray

from cluster.config import Config, load
from cluster.pools import Pools, init_ray
from cluster.run_folder import RunFolder
from cluster.train import Trainer, train

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray.init(num_cpus=16, num_gpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    yield
    ray.shutdown()


@ray.remote
class Where:
    """In the place of a learner rank or an engine."""

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def gpus(self) -> list[int]:
        return ray.get_gpu_ids()


def test_each_engine_is_on_the_gpu_of_a_learner_rank(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = ["learner.gpus=0.5", "rollout.gpus=0.3", "learner.ranks=2", "rollout.workers=2", "weights=ipc"]
    pools = Pools(load("examples/tiny.yaml", shares), "model", 0, None)
    pools.store = pools.hub = None  # type: ignore[assignment]
    for actor in ("LearnerRank", "RolloutWorker"):
        monkeypatch.setattr(f"cluster.pools.{actor}", Where)
    pools.share()
    engines, ranks = pools._rollouts(), pools._learners()  # a rank asks for more than the engines leave on a GPU
    found = ray.get([where.gpus.remote() for where in (*engines, *ranks)], timeout=120)
    assert found[:2] == found[2:] and sorted(found[:2]) == [[0], [1]]
    pools.stop()


class Watched(Pools):
    """Remembers how its workers are."""

    rollout: list[dict[str, float]] = []

    def watch(self) -> dict[str, list[dict[str, float]]]:
        found = super().watch()
        Watched.rollout = found["rollout"]
        return found


class Watching(Trainer):
    pools_class = Watched


@pytest.mark.slow
def test_a_run_whose_engines_sleep_while_it_learns(tiny: Callable[..., Config]) -> None:
    turns = ["rollout.engine.enable_sleep_mode=true", "learner.max_staleness=0"]
    init_ray()
    try:
        for steps, resume in ((2, False), (3, True)):
            config = tiny("turns", *turns, f"learner.steps={steps}")
            summary = train(config, resume=resume, trainer_class=Watching)
            assert (summary["steps"], summary["trajectories_lost"]) == (steps, 0)
            assert summary["trajectories_trained"] == steps * 3 * 4
            rows = RunFolder(config.folder).steps()
            assert [(row["step"], row["staleness_max"]) for row in rows] == [(i, 0) for i in range(1, steps + 1)]
            [worker] = Watched.rollout
            learning = sum(row["forward_backward_s"] + row["optimizer_s"] for row in rows[2 * resume :])
            assert worker["asleep_s"] > learning
    finally:
        ray.shutdown()
