"""Processes are killed with SIGKILL wherever they stand; what was acknowledged is there, exactly once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def kill(folder: Path, kills: int, seed: int, *more: str, timeout_s: float = 110) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.replay.killing", str(folder / "store"), str(kills), str(seed), *more]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_store_whose_owner_is_killed_keeps_all_that_it_acknowledged(tmp_path: Path) -> None:
    found = kill(tmp_path, 30, seed=1)
    assert found["rows"] > 30 and sum(found["deaths"].values()) == 30


def test_a_writer_that_dies_in_the_middle_of_a_put_does_not_hurt_the_store(tmp_path: Path) -> None:
    assert kill(tmp_path, 12, 1, "served")["acknowledged"] > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(5))
def test_a_store_whose_owner_is_killed_for_long(tmp_path: Path, seed: int) -> None:
    found = kill(tmp_path, 100, seed + 10, timeout_s=880)
    assert found["trained"] > 0 and found["collected"] > 0, "the workers came far enough to tell something"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_writers_are_killed_for_long(tmp_path: Path) -> None:
    assert kill(tmp_path, 200, 2, "served", timeout_s=880)["acknowledged"] > 0
