"""Runs as trials of Ray Tune, on a saved store without engines: a grid, a trial that dies, and the clone of a trial."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray import tune

from cluster.config import Config
from cluster.run_folder import REPORT, SUMMARY, RunFolder
from cluster.train import Trainer
from learners.sft import build_policy
from replay.store import Store
from replay.view import View, make_shards
from tests.replay.rows import pending, row

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300), pytest.mark.usefixtures("local_ray")]

STEPS, PROMPTS, SAMPLES = 3, 2, 2


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A policy with random weights, and a store of documents that it never wrote."""
    root, rng = tmp_path_factory.mktemp("saved"), np.random.default_rng(0)
    build_policy(root / "policy", ["a red circle"], vocab_size=300, hidden_size=64, layers=1, heads=1)
    [shard] = make_shards(str(root / "store"), 1)
    store = Store(shard)
    for k in range(STEPS * PROMPTS):
        store.put("pending", pending(f"train-{k:06d}", SAMPLES))
        for name in (f"train-{k:06d}/{i}" for i in range(SAMPLES)):
            tokens = rng.integers(0, 200, 12).tolist()
            values = {"prompt_ids": tokens[:4], "token_ids": tokens[4:], "logprobs": [-5.0] * 8, "mask": [1] * 8}
            store.put("generated", row("generated", name, versions=[0] * 8, text="t", **values))
            store.put("rendered", row("rendered", name, calls=[], finished=True))
            store.put("scored", row("scored", name, reward=float(rng.random()), components=[("rule", 1.0)]))
    store.close()
    return root / "policy", root / "store"


@pytest.fixture
def space(tiny: Callable[..., Config], saved: tuple[Path, Path], tmp_path: Path) -> dict[str, Any]:
    """What a trial is given: a short run of the learner alone."""
    policy, store = saved
    config = tiny(
        "tuned",
        f"run_dir={tmp_path}",
        f"policy={{path: {policy}}}",
        "train.only=learn",
        f"train.store={store}",
        f"learner.steps={STEPS}",
        "learner.schedule=constant",
        f"learner.prompts_per_step={PROMPTS}",
        f"learner.samples_per_prompt={SAMPLES}",
    )
    return {"config": config.model_dump()}


def tuner(trainer: type[Trainer], space: dict[str, Any], folder: Path, **run: Any) -> tune.Tuner:
    return tune.Tuner(
        trainer,
        param_space=space,
        tune_config=tune.TuneConfig(max_concurrent_trials=1),
        run_config=tune.RunConfig(name="tune", storage_path=str(folder), verbose=0, **run),
    )


def runs_in(folder: Path) -> list[RunFolder]:
    return [RunFolder(str(path)) for path in sorted(folder.glob("tuned-*")) if path.is_dir()]


def trained(folder: RunFolder) -> dict[str, int]:
    return View(folder.replay).counts("train")


@pytest.mark.slow
def test_a_grid_of_two_is_two_runs_each_with_a_store_of_its_own(space: dict[str, Any], tmp_path: Path) -> None:
    space["config"]["learner"]["lr"] = tune.grid_search([1e-4, 1e-2])
    results = tuner(Trainer, space, tmp_path).fit()
    assert not results.errors
    assert [r.metrics["steps"] for r in results] == [STEPS, STEPS]
    assert sorted(r.metrics["lr"] for r in results) == [1e-4, 1e-2]
    folders = runs_in(tmp_path)
    assert len(folders) == 2
    for folder in folders:
        assert [r["step"] for r in folder.steps()] == [1, 2, 3]
        assert trained(folder) == {"trained": STEPS * PROMPTS * SAMPLES}
        assert folder.has(REPORT) and Path(folder.policy, "model.safetensors").exists()
    pointers = {json.loads((Path(r.checkpoint.path) / "run.json").read_text())["run"] for r in results}
    assert pointers == {f.url for f in folders}


class Mortal(Trainer):
    """A trial whose process dies in its second step, once."""

    def step(self) -> dict[str, Any]:
        row, mark = super().step(), Path(self.folder.url, "died")
        if row["step"] == 2 and not mark.exists():
            mark.touch()
            os._exit(1)
        return row


@pytest.mark.slow
def test_a_trial_that_dies_goes_on_where_its_manifest_says(space: dict[str, Any], tmp_path: Path) -> None:
    space["config"]["learner"]["passes"] = 100  # the third step is not done before the second is seen
    [result] = tuner(Mortal, space, tmp_path, failure_config=tune.FailureConfig(max_failures=1)).fit()
    assert result.error is None
    [folder] = runs_in(tmp_path)
    assert folder.has("died")
    assert [r["step"] for r in folder.steps()] == [1, 2, 3]
    assert json.loads(folder.read(SUMMARY))["policy_version"] == "1.3", "the second life of the run"
    assert result.metrics["trajectories_lost"] == 0
    assert trained(folder) == {"trained": STEPS * PROMPTS * SAMPLES}


@pytest.mark.slow
def test_a_clone_has_the_weights_of_the_other_run_and_a_new_store(space: dict[str, Any], tmp_path: Path) -> None:
    donor = Trainer({"config": space["config"] | {"learner": space["config"]["learner"] | {"steps": 1}}})
    clone = Trainer({"config": space["config"] | {"name": "clone"}})
    try:
        assert donor.train()["step"] == 1
        donor.save(str(tmp_path / "pointer"))
        clone.restore(str(tmp_path / "pointer"))
        assert [clone.train()["step"] for _ in range(2)] == [2, 3]
    finally:
        clone.stop()
        donor.stop()
    assert clone.folder.origin() == 1 and donor.folder.origin() == 0
    assert trained(clone.folder) == {"trained": 2 * PROMPTS * SAMPLES, "scored": PROMPTS * SAMPLES}
    assert trained(donor.folder)["trained"] == PROMPTS * SAMPLES
    assert donor.folder.checkpoints.tags() == ["step000001.0"]
