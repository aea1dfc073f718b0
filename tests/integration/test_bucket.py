"""A whole run whose folder is in a bucket, killed on one machine and taken up on another that has none of its files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cluster.config import Config
from cluster.run_folder import REPORT
from cluster.serve import policy_folder
from replay.folders import fetched, is_model, subfolders
from replay.record import incarnation
from replay.view import View
from tests.integration.command import Command, pull_the_plug

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def disks() -> Iterator[list[str]]:
    """Temp dirs of two machines; Ray puts sockets into them, so their names must be short."""
    with ExitStack() as stack:
        yield [stack.enter_context(tempfile.TemporaryDirectory(prefix=f"llmi-{k}-", dir="/tmp")) for k in range(2)]


def test_a_run_in_a_bucket_is_killed_and_taken_up_on_another_machine(
    bucket: str, tiny: Callable[..., Config], disks: list[str], tmp_path: Path
) -> None:
    overrides = ["tools={code: {}}", "prompts.heldout_count=6", "learner.steps=4", "learner.checkpoint_every=2"]
    run = Command(tiny("far", f"run_dir={bucket}", *overrides), tmp_path)
    assert run.config.folder == f"{bucket}/far"
    with run.started(env={"TMPDIR": disks[0]}) as driver:
        run.wait_for_steps(3, driver)
        pull_the_plug(driver)
    committed = run.folder.checkpoints.committed()
    assert committed is not None and committed["step"] == 2 and is_model(run.folder.start)

    summary = run.finish(env={"TMPDIR": disks[1]})
    assert summary["policy_version"] == "1.4" and {"reward_before", "reward_after"} <= summary.keys()
    assert [row["step"] for row in run.folder.steps()] == [1, 2, 3, 4]
    assert run.folder.checkpoints.tags() == ["step000002.0", "step000004.1"]
    assert "Documents before and after" in run.folder.read(REPORT)
    assert sorted(subfolders(run.config.folder)) == ["checkpoints", "policy", "replay", "start"]
    _loads(fetched(policy_folder(run.config, None)))
    store = View(run.folder.replay)
    rows = store.get(store.find("train", ["trained"]), ["versions"])["versions"].to_pylist()
    assert {incarnation(v) for versions in rows for v in versions} == {0, 1}, "what was generated was used"


def _loads(folder: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 0
    assert AutoTokenizer.from_pretrained(folder).encode("Hello")
