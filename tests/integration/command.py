"""A run of `llmi train` in processes of its own, to be killed and taken up again."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from cluster.config import Config
from cluster.run_folder import CONFIG, SUMMARY, RunFolder
from replay.verify import verify
from tests.integration.ray_head import ROOT


class Command:
    """`llmi train` of a config.

    Args:
        config: the run's.
        path: a folder for its file and its output.
    """

    def __init__(self, config: Config, path: Path) -> None:
        self.config = config
        self._file = path / f"{config.name}.yaml"
        self._file.write_text(config.dump())

    @property
    def folder(self) -> RunFolder:
        """As it is now."""
        return RunFolder(self.config.folder)

    @contextmanager
    def started(self, *options: str, env: Mapping[str, str] = {}) -> Iterator[psutil.Popen]:
        with open(self._file.with_suffix(".log"), "a") as log:
            command = [sys.executable, "-m", "cluster.cli", "train", str(self._file), *options]
            driver = psutil.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=os.environ | env)
        try:
            yield driver
        finally:
            if driver.poll() is None:
                pull_the_plug(driver)
            driver.wait(timeout=30)

    def finish(self, env: Mapping[str, str] = {}) -> dict[str, Any]:
        """Take it up until it is done, and look at what it says and left behind; returns the summary."""
        with self.started(*self.resume(), env=env) as driver:
            status = driver.wait(timeout=900)
        assert status == 0, self.log()
        summary = json.loads(self.folder.read(SUMMARY))
        steps = self.config.learner.steps
        assert summary["steps"] == steps and summary["trajectories_lost"] == 0
        groups = steps * self.config.learner.prompts_per_step
        assert summary["groups"]["ended"] == summary["groups"]["accepted"] == groups
        assert verify(self.folder.replay).problems == []
        return summary

    def resume(self) -> list[str]:
        return ["--resume"] if self.folder.has(CONFIG) else []

    def wait_for_steps(self, n: int, driver: psutil.Popen) -> None:
        deadline = time.monotonic() + 300
        while len(self.folder.steps()) < n:
            assert driver.poll() is None, self.log()
            assert time.monotonic() < deadline, f"no {n} steps in 300 s: {self.log()}"
            time.sleep(0.2)

    def log(self) -> str:
        return self._file.with_suffix(".log").read_text()[-3000:]


def pull_the_plug(driver: psutil.Popen) -> None:
    """Kill a run's processes, all at once."""
    for process in [driver, *driver.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def gone(process: psutil.Process) -> None:
    """Wait until a process has ended by itself."""
    deadline = time.monotonic() + 60
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"{process} was left behind"
        time.sleep(0.2)
