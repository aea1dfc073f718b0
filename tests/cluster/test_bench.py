from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks import replay, rollout, train, trl
from cluster import bench, store_rivals
from cluster.config import Config, ConfigError, load
from cluster.servers import RunFailed
from replay.store import Store

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny.yaml"


def test_an_unknown_benchmark_names_those_that_exist_wherever_the_command_is_run(tmp_path: Path) -> None:
    llmi = Path(sys.executable).with_name("llmi")
    done = subprocess.run([llmi, "bench", "rolout"], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr.startswith("llmi: no benchmark 'rolout'; there are judges, overlap, replay, ")


def test_a_benchmark_runs_in_a_folder_of_its_own_and_its_numbers_come_with_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Config] = []

    def run(config: Config) -> dict[str, float]:
        seen.append(config)
        Path(config.folder).mkdir(parents=True)
        return {"worker_vs_engine": 0.912345}

    monkeypatch.setattr(rollout, "run", run)
    printed = json.loads(json.dumps(bench.run("rollout", TINY, ["rollout.max_tokens=7"])))
    assert (printed["bench"], printed["results"]) == ("rollout", {"worker_vs_engine": 0.9123})
    assert printed["machine"]["cores"] >= 1 and "torch" in printed["machine"]["packages"]
    (config,) = seen
    assert config.rollout.max_tokens == 7 and config.rollout.concurrency == 64
    assert not Path(config.folder).exists()


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


def test_without_trl_its_benchmark_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunFailed, match=r"trl and datasets cannot be imported: `pip install .*dev\.txt`"):
        bench.run("trl", TINY, [])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {
        "ROUNDS": 2,
        "TOKENS": 20,
        "IMAGE_BYTES": 100,
        "REST_S": 0,
        "APPENDED": 8,
        "BATCH": 4,
        "STORED": 24,
        "READ": 5,
    }
    sizes |= {"ROW_GROUP": 5, "CLAIMED": 20, "CLAIM": 8, "MANY": 40, "TABLE": 20}
    for name, size in sizes.items():
        monkeypatch.setattr(replay, name, size)


@pytest.mark.parametrize(
    ("part", "keys"),
    [
        ("reads", {"random_200_ms", "random_vs_parquet"}),
        ("claims", {"claims_per_s"}),
        ("opening", {"open_million_s", "open_million_mib"}),
    ],
)
def test_a_part_of_the_replay_benchmark_gives_its_numbers(
    small: None, tmp_path: Path, part: str, keys: set[str]
) -> None:
    results = getattr(replay, part)(tmp_path / part)
    assert set(results) == keys and all(value > 0 for value in results.values())


def test_parquet_and_the_store_are_asked_for_the_same_rows(small: None, tmp_path: Path) -> None:
    table, rows = replay.generated(0, 24, 20, np.random.default_rng(0)), np.array([23, 4, 11, 5])
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=replay.ROW_GROUP)
    store = Store(tmp_path / "store")
    store.put("pending", replay.pending(0, 24))
    assert set(store.put("generated", table)) == {"ok"}
    kept = store.get([replay.trajectory(i) for i in rows], replay.COLUMNS).select(replay.COLUMNS)
    assert replay.from_parquet(pq.ParquetFile(tmp_path / "rows.parquet"), rows).to_pydict() == kept.to_pydict()


@pytest.mark.parametrize("rival", ["BareFile", "Sqlite", "Redis"])
def test_a_rival_of_the_store_keeps_every_row_and_picture(small: None, tmp_path: Path, rival: str) -> None:
    if rival == "Redis" and not shutil.which("redis-server"):
        pytest.skip("leave: redis-server is not installed")
    rng = np.random.default_rng(0)
    batches = [replay.batch(first, rng) for first in range(0, 12, 4)]
    writer = getattr(store_rivals, rival)(tmp_path / rival)
    writer.append(batches)
    writer.close()
    kept = b"".join(path.read_bytes() for path in sorted((tmp_path / rival).rglob("*")) if path.is_file())
    assert all(image in kept for batch in batches for image in batch.images)
    assert all(batch.rows["token_ids"][i].values.to_numpy().tobytes() in kept for batch in batches for i in range(4))
    if rival == "Sqlite":
        with sqlite3.connect(tmp_path / rival / "rows.db") as db:
            assert db.execute("SELECT count(*) FROM rows").fetchone() == (12,)
