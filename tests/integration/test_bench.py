"""Benchmarks, small, with the real engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.store import StoreActor
from benchmarks import judges, replay, scaling, serve, tools, weights
from cluster import bench
from cluster.config import Config, TinyPolicy, load
from cluster.synchronous import InTurns
from tests.integration.by_heart import by_heart
from tests.replay.rows import pending, row
from tests.security import code_attacks, web_attacks

pytestmark = pytest.mark.integration


def test_the_store_is_compared_with_each_rival(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in {"ROUNDS": 2, "TOKENS": 20, "IMAGE_BYTES": 100, "REST_S": 0, "APPENDED": 12, "BATCH": 4}.items():
        monkeypatch.setattr(replay, name, size)
    results = replay.appends(tmp_path)
    assert (
        {"append_vs_raw", "append_vs_sqlite"} <= set(results) <= {f"append_vs_{r}" for r in ("raw", "sqlite", "redis")}
    )
    assert all(ratio > 0 for ratio in results.values())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_weights_take_both_ways_to_a_real_engine(
    local_ray: None, tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "WARM", 1)
    monkeypatch.setattr(weights, "ROUNDS", 2)
    results = weights.run(tiny("weights"))
    rates = {"memcpy_gb_s", "shm_gb_s", "object_store_gb_s"}
    assert set(results) == rates | {"shm_vs_memcpy", "update_s", "pause_s", "mb"}
    assert all(value > 0 for value in results.values()) and results["pause_s"] < results["update_s"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_tool_servers_are_measured_and_attacked(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in {"ROUNDS": 2, "CHARTS": 4, "PAIRS": 5, "DOCUMENTS": 1}.items():
        monkeypatch.setattr(tools, name, size)
    monkeypatch.setattr(code_attacks, "ATTACKS", {"fork": code_attacks.ATTACKS["fork"]})
    monkeypatch.setattr(web_attacks, "ATTACKS", web_attacks.ATTACKS[:3])
    results = tools.run(load("examples/tiny.yaml", [f"run_dir={tmp_path}", *tools.OVERRIDES]))
    assert results["attacks_tried"] == results["attacks_contained"] == 4
    assert results["chart_vs_fresh_python"] > 1 and results["charts_per_s"] > 0
    assert 0 < results["document_overhead_s"] < 5 and results["server_overhead_ms"] > 0


def test_stages_that_take_turns_wait_for_the_last_document_before_them(local_ray: None, tmp_path: Path) -> None:
    shard: Any = StoreActor
    store = InTurns([shard.options(num_cpus=0.01).remote(str(tmp_path / "replay"))])
    options = {"limit": 9, "lease_s": 60.0, "columns": []}
    store.now(store.put("pending", pending()))
    store.now(store.put("generated", row("generated", "g0/0", versions=[0])))
    assert store.now(store.claim("generated", wait_s=0.2, **options)) is None
    store.now(store.put("generated", row("generated", "g0/1", versions=[0])))
    found = store.now(store.claim("generated", wait_s=0.2, **options))
    assert found is not None and found.trajectories == ["g0/0", "g0/1"]
    store.now(store.put("rendered", row("rendered", "g0/0")))
    assert store.now(store.claim("rendered", wait_s=0.2, **options)) is None


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_model_judge_is_measured_and_every_verdict_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"ROUNDS": 1, "STEP": 8, "PLAIN": 1, "TOKENS": 16}.items():
        monkeypatch.setattr(judges, name, size)
    results = bench.run("judges", Path("examples/tiny.yaml"), [])["results"]
    assert results["parse_failures"] == 0
    assert results["batched_vs_plain"] > 1 and results["score_vs_generate"] > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_runs_of_the_overlap_benchmark_do_the_same_work() -> None:
    ray.shutdown()  # the benchmark's own package must be there before Ray is
    small = ["sft.documents=960", "learner.steps=2", "learner.prompts_per_step=2", "learner.samples_per_prompt=4"]
    small += ["prompts.heldout_count=4", "tools.paint.options.seconds=0.1"]
    small += [f"judges.{name}.options.seconds=0.1" for name in ("text", "image")]
    results = bench.run("overlap", Path("examples/tiny.yaml"), small)["results"]
    assert results["async_vs_sync"] > 0
    assert results["sync_staleness"] == results["sync_written_again"] == 0
    assert 0.5 < results["sync_calls"] <= 1.5


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_this_project_and_trl_train_the_same_small_policy() -> None:
    ray.shutdown()
    small = ["policy.tiny={vocab_size: 1024, hidden_size: 64, layers: 1, heads: 1}", "sft.documents=160"]
    small += ["rollout.max_tokens=16", "learner.prompts_per_step=2", "learner.samples_per_prompt=4"]
    small += ["learner.steps=3", "learner.checkpoint_every=2"]
    results = bench.run("trl", Path("examples/tiny.yaml"), small)["results"]
    assert results["samples_vs_trl"] > 0
    assert all(0.4 <= results[f"reward_{who}"] <= 1.0 for who in ("before", "trl", "ours"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_service_is_measured_from_first_token_to_last_document(monkeypatch: pytest.MonkeyPatch) -> None:
    ray.shutdown()
    sizes = {"CLIENTS": {1: 1, 8: 1, 32: 1}, "SOAK_S": 2.0, "ROUNDS": 1, "TOKENS": 16}
    for name, size in (sizes | {"LARGE": TinyPolicy(vocab_size=512, hidden_size=64, layers=1, heads=1)}).items():
        monkeypatch.setattr(serve, name, size)
    small = ["policy.tiny={vocab_size: 512, hidden_size: 64, layers: 1, heads: 1}", "sft.documents=320"]
    results = bench.run("serve", Path("examples/tiny.yaml"), small)["results"]
    times = {f"{what}_ms_{n}" for what in ("first_token", "document") for n in (1, 8, 32)}
    assert times | {"service_vs_engine", "errors_32", "early_dispatch_saving"} <= set(results)
    assert results["errors_32"] == 0 and results["early_dispatch_saving"] >= 0.4


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_stage_of_test_time_scaling_is_measured_alone_and_all_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "SIZES", (2,))
    policy = by_heart(tmp_path, "What is a fish?", "It swims.")
    small = [f"policy={{path: {policy}, system_prompt: none}}", "prompts.heldout_count=3"]
    results = bench.run("scaling", Path("examples/tiny.yaml"), small)["results"]
    assert {f"reward_{name}_2" for name in ("checks", "selection", "enhancement", "polishing", "all")} < set(results)
    assert results["reward_all_2"] >= results["reward_one"] and results["tokens_all_2"] > results["tokens_one"]
