"""The benchmark of the replay store, small, with its actor."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import replay

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
