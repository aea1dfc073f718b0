"""One rank in a process of its own: `python rank.py JOBS RANK OUT`.

JOBS is a pickled list of `Job`s as tuples; for each, one learner after the other, a `Result` goes to OUT as a tuple.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from learners.engine import Learner
from learners.packing import Sample, shard
from learners.step import Recipe, StepPlan, take_step
from learners.world import free_port


class Result(NamedTuple):
    """What a learner did: metrics of every step, the gradients of the first, the weights at the end."""

    metrics: list[dict[str, float]]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    advantages: Mapping[str, float] = {}


def gradients_of_step(learner: Learner, samples: Sequence[Sample]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """A step: what the optimiser was given in it, which DeepSpeed shows where it is in memory, and its metrics."""
    from deepspeed.utils import safe_get_full_grad

    seen: dict[str, Tensor] = {}
    apply = learner._engine.step

    def spy() -> None:
        trained = ((n, p) for n, p in learner.model.named_parameters() if p.requires_grad)
        if not learner._engine.zero_nvme_offload_optimizer():
            seen.update({n: safe_get_full_grad(p).clone() for n, p in trained})
        apply()

    learner._engine.step = spy
    metrics = learner.step(samples)
    learner._engine.step = apply
    return seen, metrics


class Job(NamedTuple):
    """Steps on the same samples, all of which every rank is given; from a checkpoint folder, and into one.

    With `lost`, a signal that rank 1 then sends to itself, the ranks go on after that. With `plan` and `recipe`, it is
    one `take_step` over the samples, which have the plan's names.
    """

    options: dict[str, Any]
    samples: Any
    steps: int
    load: Path | None = None
    save: Path | None = None
    lost: int | None = None
    plan: StepPlan | None = None
    recipe: Recipe = Recipe("grpo")


def run(job: Job, **options: Any) -> Result:
    """Does a job in this process."""
    with closing(Learner(**({"threads": 1, "timeout_s": 100.0} | job.options | options))) as learner:
        which, count = learner.shard
        if job.plan:
            mine = {name: job.samples[name] for name in job.plan.share(which, count)}
            step, advantages = take_step(learner, job.plan, mine, job.recipe)
            return Result([step], {}, dict(learner.weights()), advantages)
        own = shard(job.samples, count)[which]
        if job.load:
            assert learner.load(job.load, "last") == {"cursor": 7}
        gradients, first = gradients_of_step(learner, own)
        metrics = [first, *(learner.step(own) for _ in range(job.steps - 1))]
        if job.save:
            learner.save(job.save, "last", {"cursor": 7})
        if job.lost:
            if learner.rank == 1:
                os.kill(os.getpid(), job.lost)
            learner.step(own)
        return Result(metrics, gradients, dict(learner.weights()))


def launch(path: Path, jobs: Sequence[Job], stack: ExitStack) -> list[subprocess.Popen[bytes]]:
    """Two ranks in processes that `stack` ends; what they did is in `path/RANK`, what they said in `path/RANK.log`."""
    meeting = [{"world_size": 2, "master_port": free_port()} for _ in jobs]
    apart = [tuple(job._replace(options=job.options | m)) for job, m in zip(jobs, meeting, strict=True)]
    (path / "jobs").write_bytes(pickle.dumps(apart))
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    started = []
    for rank in range(2):
        log = stack.enter_context((path / f"{rank}.log").open("w"))
        command = [sys.executable, __file__, str(path / "jobs"), str(rank), str(path / f"{rank}")]
        started.append(subprocess.Popen(command, env=env, stderr=log))
        stack.callback(started[-1].kill)
    return started


if __name__ == "__main__":
    jobs, rank, out = sys.argv[1:]
    results = [tuple(run(Job(*job), rank=int(rank))) for job in pickle.loads(Path(jobs).read_bytes())]
    torch.save(results, out)
