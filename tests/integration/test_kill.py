"""`kill -9` of parts of a run and of the whole of it: the run goes on, or is taken up again, and nothing is lost."""

from __future__ import annotations

import json
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil
import pytest

from cluster.config import Config
from replay.verify import verify
from tests.integration.ray_head import ROOT

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1800)]

#: As short as a whole run can be, but for its steps.
SHORT = ("prompts.heldout=null", "tools={code: {}}", "learner.checkpoint_every=2", "stall_s=120")


def test_a_run_outlives_its_store_and_an_engine_and_is_taken_up_after_its_own_death(
    tiny: Callable[..., Config],
) -> None:
    run = _Run(tiny, "killed", steps=8)
    with run.started() as driver:
        run.wait_for_steps(1, driver)
        _kill(driver, "StoreActor")
        run.wait_for_steps(2, driver)
        [engine] = _named(driver, "EngineCore")
        _kill(driver, "RolloutWorker")
        _gone(engine)
        run.wait_for_steps(4, driver)
        # Ray's own agents look for their node every few minutes only
        everyone = [p for p in driver.children(recursive=True) if not p.name().endswith("Agent")]
        driver.kill()
        for process in everyone:
            _gone(process)
    run.finish()


def test_ten_kills_at_any_time_of_any_process_lose_nothing(tiny: Callable[..., Config]) -> None:
    rng, run = random.Random(0), _Run(tiny, "killed-often", steps=50)  # more than ten lives of two minutes can do
    for _ in range(10):
        with run.started(*run.resume()) as driver:
            time.sleep(rng.uniform(10, 120))
            with suppress(psutil.NoSuchProcess):
                rng.choice([driver, *driver.children(recursive=True)]).kill()
            time.sleep(rng.uniform(0, 10))
    run.finish()


class _Run:
    """A run of `llmi train` in processes of its own."""

    def __init__(self, tiny: Callable[..., Config], name: str, steps: int) -> None:
        config = tiny(name, *SHORT, f"learner.steps={steps}")
        self._steps = steps
        self.folder = config.folder
        self._file = self.folder.parent / f"{name}.yaml"
        self._file.write_text(config.dump())

    @contextmanager
    def started(self, *options: str) -> Iterator[psutil.Popen]:
        with open(self._file.with_suffix(".log"), "a") as log:
            command = [sys.executable, "-m", "cluster.cli", "train", str(self._file), *options]
            driver = psutil.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            yield driver
        finally:
            if driver.poll() is None:
                for process in [driver, *driver.children(recursive=True)]:
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
            driver.wait(timeout=30)

    def finish(self) -> None:
        """Take it up until it is done, and look at what it says and left behind."""
        with self.started(*self.resume()) as driver:
            status = driver.wait(timeout=900)
        assert status == 0, self.log()
        summary = json.loads((self.folder / "summary.json").read_text())
        assert summary["steps"] == self._steps and summary["trajectories_lost"] == 0
        assert summary["groups"]["ended"] == summary["groups"]["accepted"] == self._steps * 3
        assert verify(self.folder / "replay").problems == []

    def resume(self) -> list[str]:
        return ["--resume"] if (self.folder / "config.yaml").exists() else []

    def wait_for_steps(self, n: int, driver: psutil.Popen) -> None:
        metrics, deadline = self.folder / "metrics.jsonl", time.monotonic() + 300
        while not metrics.exists() or len(metrics.read_text().splitlines()) < n:
            assert driver.poll() is None, self.log()
            assert time.monotonic() < deadline, f"no {n} steps in 300 s: {self.log()}"
            time.sleep(0.2)

    def log(self) -> str:
        return self._file.with_suffix(".log").read_text()[-3000:]


def _named(driver: psutil.Popen, name: str) -> list[psutil.Process]:
    return [p for p in driver.children(recursive=True) if name in " ".join(p.cmdline())]


def _kill(driver: psutil.Popen, name: str) -> None:
    [process] = _named(driver, f"ray::{name}")
    process.send_signal(signal.SIGKILL)


def _gone(process: psutil.Process) -> None:
    """Wait until a process has ended by itself."""
    deadline = time.monotonic() + 60
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"{process} was left behind"
        time.sleep(0.2)
