"""Two ranks take the steps that one would."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from learners.engine import Learner
from learners.packing import Sample
from learners.world import free_port

Result = tuple[list[dict[str, float]], dict[str, Tensor]]

STEPS = 3
#: ZeRO stage, loss, number of samples: with a single one, a rank has none.
CASES = [(2, "grpo", 12), (3, "gspo", 12), (2, "gspo", 1), (3, "grpo", 1)]


@pytest.fixture(scope="module")
def two_ranks(model_dir: Path, samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> list[list[Result]]:
    """[rank][case], all cases in one pair of processes."""
    path = tmp_path_factory.mktemp("ranks")
    cases = [
        (options(model_dir, stage, loss) | {"world_size": 2, "master_port": free_port()}, samples[:count], STEPS)
        for stage, loss, count in CASES
    ]
    (path / "cases").write_bytes(pickle.dumps(cases))
    command = [sys.executable, str(Path(__file__).with_name("rank.py")), str(path / "cases")]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with ExitStack() as stack:
        started = []
        for rank in range(2):
            log = stack.enter_context((path / f"{rank}.log").open("w"))
            process = subprocess.Popen([*command, str(rank), str(path / f"{rank}")], env=env, stderr=log)
            stack.callback(process.kill)
            started.append(process)
        codes = [process.wait() for process in started]
    assert codes == [0, 0], [(path / f"{rank}.log").read_text() for rank in range(2)]
    return [torch.load(path / f"{rank}") for rank in range(2)]


def options(model_dir: Path, stage: int, loss: str) -> dict[str, Any]:
    return {"model_dir": model_dir, "lr": 1e-3, "zero_stage": stage, "loss": loss, "tokens_per_microbatch": 32}


@pytest.mark.integration
@pytest.mark.timeout(300)  # two processes that import the whole stack
@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"stage{s}-{name}-{n}" for s, name, n in CASES])
def test_two_ranks_end_with_the_parameters_of_one(
    two_ranks: list[list[Result]], model_dir: Path, samples: list[Sample], case: int
) -> None:
    stage, loss, count = CASES[case]
    start = load_file(model_dir / "model.safetensors")
    one = Learner(**options(model_dir, stage, loss))
    try:
        metrics = [one.step(samples[:count]) for _ in range(STEPS)]
        weights = dict(one.weights())
    finally:
        one.close()
    for rank in two_ranks:
        for name, weight in weights.items():
            apart, moved = (rank[case][1][name] - weight).norm(), (weight - start[name]).norm()
            assert apart <= 1e-5 * weight.norm() and apart <= 1e-3 * moved, name
        for mine, expected in zip(rank[case][0], metrics, strict=True):
            for name in set(expected) - {"padding", "microbatches", "forward_backward_s", "optimizer_s"}:
                assert mine[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6), name
