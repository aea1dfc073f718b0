"""The proof: the example learns with three seeds, in time; rewards that are dealt to strangers teach nothing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.ray_head import ROOT

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(2400)]


def train(folder: Path, name: str, *overrides: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "cluster.cli", "train", "examples/tiny.yaml", f"name={name}", f"run_dir={folder}"]
    done = subprocess.run([*command, *overrides], cwd=ROOT, capture_output=True, text=True, timeout=2300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads((folder / name / "summary.json").read_text())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_example_learns_which_tool_belongs_where(tmp_path: Path, seed: int) -> None:
    summary = train(tmp_path, f"seed-{seed}", f"seed={seed}")
    assert summary["tool_accuracy_before"] < 0.7 and summary["tool_accuracy_after"] >= 0.9
    assert summary["reward_after"] - summary["reward_before"] >= 0.2
    assert summary["evaluations"]["after-heldout"]["documents"] >= 200 and summary["trajectories_lost"] == 0
    assert summary["wall_s"] <= 20 * 60 and summary["peak_pss_mib"] <= 10 * 1024


def test_rewards_dealt_to_strangers_teach_nothing(tmp_path: Path) -> None:
    summary = train(tmp_path, "shuffled", "reward.shuffled=true")
    assert summary["reward_after"] - summary["reward_before"] < 0.05
    assert summary["tool_accuracy_after"] - summary["tool_accuracy_before"] < 0.05
