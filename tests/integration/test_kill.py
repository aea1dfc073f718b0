"""`kill -9` of parts of a run and of the whole of it: the run goes on, or is taken up again, and nothing is lost."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from cluster.config import Config
from tests.integration.command import Command, gone

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1800)]

#: As short as a whole run can be, but for its steps.
SHORT = ("prompts.heldout=null", "tools={code: {}}", "learner.checkpoint_every=2", "stall_s=120")


def test_a_run_outlives_its_store_and_an_engine_and_is_taken_up_after_its_own_death(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    run = Command(tiny("killed", *SHORT, "learner.steps=8"), tmp_path)
    with run.started() as driver:
        run.wait_for_steps(1, driver)
        _kill(driver, "StoreActor")
        run.wait_for_steps(2, driver)
        [engine] = _named(driver, "EngineCore")
        _kill(driver, "RolloutWorker")
        gone(engine)
        run.wait_for_steps(4, driver)
        # Ray's own agents look for their node every few minutes only
        everyone = [p for p in driver.children(recursive=True) if not p.name().endswith("Agent")]
        driver.kill()
        for process in everyone:
            gone(process)
    run.finish()


def test_ten_kills_at_any_time_of_any_process_lose_nothing(tiny: Callable[..., Config], tmp_path: Path) -> None:
    config = tiny("killed-often", *SHORT, "learner.steps=120")  # more than ten lives of two minutes can do
    rng, run = random.Random(0), Command(config, tmp_path)
    for _ in range(10):
        with run.started(*run.resume()) as driver:
            time.sleep(rng.uniform(10, 120))
            with suppress(psutil.NoSuchProcess):
                rng.choice([driver, *driver.children(recursive=True)]).kill()
            time.sleep(rng.uniform(0, 10))
    run.finish()


def test_a_learner_rank_that_dies_ends_the_run_with_one_sentence_and_the_run_goes_on_with_one_rank(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    many, one = (tiny("rank-lost", *SHORT, "learner.steps=5", f"learner.ranks={n}") for n in (2, 1))
    run = Command(many, tmp_path)
    with run.started() as driver:
        run.wait_for_steps(3, driver)
        random.choice(_named(driver, "ray::LearnerRank")).kill()
        assert driver.wait(timeout=180) == 1
    assert run.log().count("a learn actor died; `llmi train CONFIG --resume` goes on") == 1
    Command(one, tmp_path).finish()


def _named(driver: psutil.Popen, name: str) -> list[psutil.Process]:
    return [p for p in driver.children(recursive=True) if name in " ".join(p.cmdline())]


def _kill(driver: psutil.Popen, name: str) -> None:
    [process] = _named(driver, f"ray::{name}")
    process.send_signal(signal.SIGKILL)
