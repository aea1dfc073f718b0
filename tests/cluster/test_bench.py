from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import rollout, train
from cluster import bench
from cluster.config import Config, ConfigError, load

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny.yaml"


def test_an_unknown_benchmark_names_those_that_exist_wherever_the_command_is_run(tmp_path: Path) -> None:
    llmi = Path(sys.executable).with_name("llmi")
    done = subprocess.run([llmi, "bench", "rolout"], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr == "llmi: no benchmark 'rolout'; there are rollout, train\n"


def test_a_benchmark_runs_in_a_folder_of_its_own_and_its_numbers_come_with_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Config] = []

    def run(config: Config) -> dict[str, float]:
        seen.append(config)
        config.folder.mkdir(parents=True)
        return {"worker_vs_engine": 0.912345}

    monkeypatch.setattr(rollout, "run", run)
    printed = json.loads(json.dumps(bench.run("rollout", TINY, ["rollout.max_tokens=7"])))
    assert (printed["bench"], printed["results"]) == ("rollout", {"worker_vs_engine": 0.9123})
    assert printed["machine"]["cores"] >= 1 and "torch" in printed["machine"]["packages"]
    (config,) = seen
    assert config.rollout.max_tokens == 7 and config.rollout.concurrency == 64
    assert not config.folder.exists()


def test_an_override_that_the_config_does_not_know_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'rollout\.maxtokens'"):
        bench.run("rollout", TINY, ["rollout.maxtokens=7"])


def test_the_seconds_of_a_step_are_medians_over_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = [dict.fromkeys(train.SECONDS, s) for s in (1.0, 9.0, 2.0)]
    idle = {"rollout": 0.1, "render": 0.2, "score": 0.3, "learn": 0.4}
    monkeypatch.setattr(train, "train", lambda config: {"idle": idle})
    monkeypatch.setattr(train.RunFolder, "steps", lambda folder: rows)
    results = train.run(load(TINY, list(train.OVERRIDES)))
    assert results == dict.fromkeys(train.SECONDS, 2.0) | {f"idle_{stage}": share for stage, share in idle.items()}
