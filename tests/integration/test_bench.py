"""Benchmarks, small, with the real engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import replay, weights
from cluster.config import Config

pytestmark = pytest.mark.integration


def test_the_store_is_compared_with_each_rival(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in {"ROUNDS": 2, "TOKENS": 20, "IMAGE_BYTES": 100, "APPENDED": 12, "BATCH": 4}.items():
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
