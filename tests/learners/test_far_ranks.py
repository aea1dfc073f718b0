"""Ranks on nodes that share no disk leave a checkpoint in a bucket, and go on from it on other nodes."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor

from learners.packing import Sample
from learners.world import free_port
from replay.folders import fetched


@pytest.mark.integration
@pytest.mark.timeout(300)  # twice two processes that import the whole stack
@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_each_rank_uploads_what_it_wrote_and_loads_what_it_needs(
    bucket: str, model_dir: Path, samples: list[Sample], tmp_path: Path, stage: int
) -> None:
    options = {"model_dir": model_dir, "lr": 1e-3, "zero_stage": stage, "world_size": 2}
    expected = _run(options, samples, bucket, None, tmp_path / "first")
    parts = sorted(p.name for p in Path(fetched(f"{bucket}/one")).iterdir())
    assert sum("optim_states" in name for name in parts) == 2
    resumed = _run(options, samples, bucket, "one", tmp_path / "second")
    for weights in resumed:
        assert all(torch.equal(weights[name], expected[0][name]) for name in expected[0])


def _run(
    options: dict[str, object], samples: list[Sample], url: str, tag: str | None, path: Path
) -> list[dict[str, Tensor]]:
    path.mkdir()
    (path / "options").write_bytes(pickle.dumps((options | {"master_port": free_port()}, samples, url, tag)))
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with ExitStack() as stack:
        started = []
        for rank in range(2):
            (path / f"node{rank}").mkdir()
            command = [sys.executable, str(Path(__file__).with_name("far_rank.py")), str(path / "options")]
            command += [str(rank), str(path / f"node{rank}"), str(path / f"{rank}")]
            log = stack.enter_context((path / f"{rank}.log").open("w"))
            process = subprocess.Popen(command, env=env, stderr=log)
            stack.callback(process.kill)
            started.append(process)
        codes = [process.wait() for process in started]
    assert codes == [0, 0], [(path / f"{rank}.log").read_text()[-2000:] for rank in range(2)]
    return [torch.load(path / f"{rank}") for rank in range(2)]
