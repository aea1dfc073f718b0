"""Whole runs without engines: the real store, and around it any speeds, failures, filters and crashes.

No token may be trained that is older than the bound, and every run must come to its end.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from replay.record import staleness, version
from replay.staleness import Capacity
from replay.store import Claim, Store
from tests.replay.rows import Clock, claim, killed, pending, row

LEASE_S = 40.0  # a tick is a second
MOST_TICKS = 5000


@dataclass(frozen=True)
class World:
    """How a run goes: chances of one event a tick, or of one document or group.

    Attributes:
        rollout, update, render, score, learn: chance that a worker looks for work, or for newer weights.
        keep_up: an engine begins nothing that would be too old from the start.
        slow: share of groups whose tool takes ten times as long, whenever it is asked.
        lost: the worker dies with what it claimed.
        bad: no judge can read the document.
        empty: share of documents for which the engine gives no token, whenever it is asked.
        equal: the learner filters the group.
        crashes: ticks at which everything dies at once.
    """

    capacity: Capacity
    samples: int = 2
    engines: int = 2
    rollout: float = 0.5
    update: float = 0.5
    render: float = 0.5
    score: float = 0.5
    learn: float = 0.5
    keep_up: bool = True
    slow: float = 0.0
    lost: float = 0.0
    bad: float = 0.0
    empty: float = 0.0
    equal: float = 0.0
    crashes: Sequence[int] = ()


@dataclass
class Work:
    """A row in a worker's hands."""

    name: str
    attempt: int
    due: float
    engine: int = 0
    began: int = 0


@dataclass
class Run:
    """A run in a world.

    Attributes:
        step, committed: optimiser steps done, and those that a crash leaves.
        worst: the oldest token trained, in steps.
        evicted: samples that were too old when they were claimed.
    """

    world: World
    folder: Path
    rng: random.Random
    step: int = 0
    committed: int = 0
    life: int = 0
    worst: int = 0
    evicted: int = 0
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.store = Store(self.folder / "0", self.clock)
        self.begin()

    def begin(self) -> None:
        self.store.rewind(self.committed)
        self.step = self.committed
        self.engines = [self.now] * self.world.engines
        self.hands: dict[str, list[Work]] = {"pending": [], "generated": [], "rendered": []}
        self.held: dict[int, list[str]] = {}

    def crash(self) -> None:
        self.life += 1
        left = killed(self.store, self.folder / str(self.life))
        self.store.close()
        self.store = Store(left, self.clock)
        self.begin()

    @property
    def now(self) -> int:
        return version(self.life, self.step)

    def until(self, step: int) -> None:
        """Let it go on to an optimiser step."""
        parts = (self.feed, self.write, self.draw, self.judge, self.learn, self.follow)
        for tick in range(1, MOST_TICKS):
            if self.step >= step:
                return
            self.clock.now += 1.0
            if tick in self.world.crashes:
                self.crash()
            for part in self.rng.sample(parts, len(parts)):
                part()
        raise AssertionError(f"starved after step {self.step}: {self.groups()}, {self.store.counts()}")

    def groups(self) -> dict[str, int]:
        return self.store.groups("train") | {"running": self.store.running("train")}

    # ---- what the actors do

    def feed(self) -> None:
        groups, capacity = self.groups(), self.world.capacity
        waiting = groups["accepted"] - groups["ended"] - groups["running"]
        left = capacity.left(self.step, waiting, groups["running"])
        for order in range(groups["accepted"], groups["accepted"] + left):
            self.store.put("pending", pending(f"train-{order:06d}", self.world.samples))

    def write(self) -> None:
        for k, begun in enumerate(self.engines):
            behind = staleness(self.now, begun) > self.world.capacity.max_staleness
            if self.chance(self.world.rollout) and not (self.world.keep_up and behind):
                self.take("pending", by_group=True, engine=k, began=begun)
        for work in self.done("pending"):  # weights came under it while it was written
            versions = [work.began, self.engines[work.engine]]
            self.put("generated", work, versions=[] if always(work.name, self.world.empty) else versions)

    def draw(self) -> None:
        if self.chance(self.world.render):
            self.take("generated")
        for work in self.done("generated"):
            self.put("rendered", work)

    def judge(self) -> None:
        if self.chance(self.world.score) and (got := self.take("rendered")):
            bad = {n: ("set_aside_judge", "") for n in got.trajectories if self.chance(self.world.bad)}
            self.store.ack(got.token, bad)
        for work in self.done("rendered"):
            self.put("scored", work, reward=1.0)

    def follow(self) -> None:
        self.engines = [self.now if self.chance(self.world.update) else v for v in self.engines]

    def learn(self) -> None:
        """Claim until a step is full, and hold what there is meanwhile, as rank 0 does."""
        capacity = self.world.capacity
        if not self.chance(self.world.learn):
            return
        missing = capacity.batch - len({group for names in self.held.values() for group in map(group_of, names)})
        waiting = self.store.counts().get("scored", 0)
        got = claim(
            self.store,
            "scored",
            limit=missing,
            by_group=True,
            lease_s=1e9,
            version=self.now,
            max_staleness=capacity.max_staleness,
        )
        self.evicted += waiting - self.store.counts().get("scored", 0)
        if got is None:
            return
        equal = {g for g in map(group_of, got.trajectories) if self.chance(self.world.equal)}
        ends = {n: ("dropped_filtered", "") for n in got.trajectories if group_of(n) in equal}
        self.store.ack(got.token, ends)
        self.held[got.token] = [n for n in got.trajectories if n not in ends]
        if len({group_of(n) for n in got.trajectories} - equal) == missing:
            self.train()

    def train(self) -> None:
        for token, names in self.held.items():
            for versions in self.store.get(names, ["versions"]).column("versions").to_pylist():
                self.worst = max([self.worst, *(staleness(self.now, then) for then in versions)])
            assert set(self.store.ack(token, {n: ("trained", "") for n in names}, step=self.step + 1)) <= {"ok"}
        self.held = {}
        self.step += 1
        self.committed = self.step - self.step % 2

    # ---- hands

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def take(self, stage: str, by_group: bool = False, engine: int = 0, began: int = 0) -> Claim | None:
        got = claim(self.store, stage, limit=1 if by_group else 4, by_group=by_group, lease_s=LEASE_S)
        if got and not self.chance(self.world.lost):
            for r in got.rows.to_pylist():
                slow = stage == "generated" and always(r["group"], self.world.slow)
                due = self.clock.now + self.rng.uniform(0, 3) * (10 if slow else 1)
                self.hands[stage].append(Work(r["trajectory"], r["attempt"], due, engine, began))
        return got

    def done(self, stage: str) -> list[Work]:
        ready = [w for w in self.hands[stage] if w.due <= self.clock.now]
        self.hands[stage] = [w for w in self.hands[stage] if w.due > self.clock.now]
        return ready

    def put(self, stage: str, work: Work, **values: Any) -> None:
        self.store.put(stage, row(stage, work.name, attempt=work.attempt, **values))


def always(name: str, share: float) -> bool:
    """True for this share of names, each time it is asked."""
    return random.Random(name).random() < share


def group_of(trajectory: str) -> str:
    return trajectory.rpartition("/")[0]


@contextmanager
def started(world: World, seed: int = 0, **where: Any) -> Iterator[Run]:
    folder, patch = Path(tempfile.mkdtemp(prefix="staleness-")), pytest.MonkeyPatch()
    for name in ("os.fsync", "os.fdatasync"):
        patch.setattr(name, lambda fd: None)
    try:
        run = Run(world, folder, random.Random(seed), **where)
        yield run
        run.store.close()
    finally:
        patch.undo()
        shutil.rmtree(folder)


speeds = st.floats(0.1, 1.0)
chances = st.one_of(st.just(0.0), st.floats(0.0, 0.3))
capacities = st.builds(
    Capacity,
    max_staleness=st.integers(0, 3),
    batch=st.integers(1, 4),
    concurrency=st.integers(1, 12),
    steps=st.integers(1, 6),
)
worlds = st.builds(
    World,
    capacity=capacities,
    samples=st.integers(1, 3),
    engines=st.integers(1, 3),
    keep_up=st.booleans(),
    crashes=st.lists(st.integers(1, 200), max_size=3),
    **dict.fromkeys(("rollout", "update", "render", "score", "learn"), speeds),
    **dict.fromkeys(("slow", "lost", "bad", "empty", "equal"), chances),
)


def check_any_run(world: World, seed: int) -> None:
    capacity = world.capacity
    with started(world, seed) as run:
        run.until(capacity.steps)
        groups = run.store.groups("train")
        assert run.worst <= capacity.max_staleness
        assert groups["trained"] == capacity.steps * capacity.batch
        assert groups["ended"] == groups["accepted"], "nothing was submitted that no step could use"
        assert run.store.lost("train") == 0


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(worlds, st.integers(0, 2**16))
def test_no_trained_token_is_older_than_the_bound_and_no_run_starves(world: World, seed: int) -> None:
    check_any_run(world, seed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(worlds, st.integers(0, 2**16))
def test_that_holds_in_a_thousand_worlds(world: World, seed: int) -> None:
    check_any_run(world, seed)


@given(capacities, st.integers(0, 6), st.integers(0, 30), st.integers(0, 30))
def test_what_is_left_is_the_published_formula(capacity: Capacity, version: int, waiting: int, running: int) -> None:
    accepted = version * capacity.batch + waiting
    bound = (capacity.max_staleness + version + 1) * capacity.batch - (accepted + running)
    rest = capacity.steps * capacity.batch - (accepted + running)
    assert capacity.left(version, waiting, running) == max(0, min(capacity.concurrency - running, bound, rest))


@given(capacities, st.integers(0, 30))
def test_a_step_that_lacks_groups_gets_some_when_none_runs(capacity: Capacity, waiting: int) -> None:
    for step in range(capacity.steps):
        if waiting < capacity.batch:
            assert capacity.left(step, waiting, running=0) > 0


def test_nothing_is_written_twice_where_generation_and_learning_take_turns() -> None:
    with started(World(Capacity(0, 4, 8, 10))) as run:
        run.until(10)
        assert run.evicted == 0 and run.worst == 0
    with started(World(Capacity(0, 4, 8, 10), keep_up=False, update=0.1)) as run:
        run.until(10)
        assert run.evicted > 0 and run.worst == 0, "engines that lag write in vain, and nothing of it is trained"


def test_documents_that_are_always_slow_are_trained_too() -> None:
    with started(World(Capacity(1, 4, 16, 20), rollout=1, render=1, score=1, slow=0.3, learn=1)) as run:
        run.until(20)
        assert run.evicted > 0, "the slow ones were overtaken"
        assert run.store.groups("train") == {"accepted": 80, "ended": 80, "trained": 80}
        assert run.worst == 1


@pytest.mark.parametrize(("before", "after"), [(4, 1), (1, 4)])
def test_a_resumed_run_may_have_another_batch(before: int, after: int) -> None:
    with started(World(Capacity(1, before, 8, 8))) as run:
        run.until(4)
        run.world = replace(run.world, capacity=Capacity(1, after, 8, 8))
        run.crash()
        run.until(8)
        assert run.worst <= 1
        assert run.store.groups("train")["trained"] == 4 * before + 4 * after


def test_a_clone_goes_on_with_a_new_store() -> None:
    with started(World(Capacity(2, 3, 9, 12)), committed=8) as run:
        run.until(12)
        assert run.store.groups("train") == {"accepted": 12, "ended": 12, "trained": 12}


@pytest.mark.parametrize("wrong", [(-1, 1, 1), (0, 0, 1), (0, 1, 0)])
def test_a_capacity_that_lets_nothing_in_is_refused(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        Capacity(*wrong, steps=1)
