"""The store against a dictionary: whatever is done in whatever order, both say the same."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from replay.record import ENDS, MOVES, STAGES, TERMINAL, Blob, Status, staleness
from replay.store import MAX_CLAIMS, Claim, Retention, Store
from tests.replay.rows import Clock, row, table

PURPOSES = ("train", "before")
LEASE_S = 10.0
COLUMNS = ["question", "text", "versions", "seconds", "reward"]
pick = st.integers(0, 2**30)


@dataclass
class Row:
    purpose: str
    status: Status = Status.PENDING
    attempt: int = 0
    step: int = -1
    claims: int = 0
    token: int = 0
    values: dict[str, Any] = field(default_factory=dict)

    def move(self, status: Status) -> None:
        self.status, self.claims, self.token = status, 0, 0


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("replay.log.SEGMENT_BYTES", 4000)
        for name in ("os.fsync", "os.fdatasync"):
            self.patch.setattr(name, lambda fd: None)  # a copy of the folder sees what was not synced, too
        self.folder = Path(tempfile.mkdtemp(prefix="replay-machine-"))
        self.lives = self.steps = self.groups_made = 0
        self.rows: dict[str, Row] = {}
        self.blobs: dict[str, Blob] = {}
        self.until: dict[int, float] = {}  # of leases
        self.gone: dict[str, Counter[str]] = {p: Counter() for p in PURPOSES}
        self.followed: Counter[str] = Counter()
        self.cursor = 0
        self.reached: list[str] = []
        self.clock = Clock()

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
        self.patch.undo()
        shutil.rmtree(self.folder)

    @initialize()
    def open(self) -> None:
        self.store = Store(self.folder / "0", self.clock)

    # ---- what the model knows

    def members(self, group: str) -> list[str]:
        return [name for name in self.rows if name.rpartition("/")[0] == group]

    def groups(self) -> list[str]:
        return list(dict.fromkeys(name.rpartition("/")[0] for name in self.rows))

    def expire(self) -> None:
        late = {token for token, until in self.until.items() if until <= self.clock.now}
        for r in self.rows.values():
            if r.token in late:
                r.token = 0
        for token in late:
            del self.until[token]

    def held(self, token: int) -> list[str]:
        return [name for name, r in self.rows.items() if r.token == token]

    def some(self, number: int, of: list[Any]) -> Any:
        return of[number % len(of)]

    # ---- verbs

    @rule(purpose=st.sampled_from(PURPOSES), samples=st.integers(1, 3), again=st.booleans())
    def accept(self, purpose: str, samples: int, again: bool) -> None:
        if again and self.rows:
            group = self.some(samples, self.groups())
            samples = max(samples, 1)
        else:
            group, self.groups_made = f"g{self.groups_made}", self.groups_made + 1
        purpose = next((self.rows[n].purpose for n in self.members(group)), purpose)
        names = [f"{group}/{k}" for k in range(samples)]
        given = Blob(group.encode() * 50)
        common = {"group": group, "purpose": purpose, "question": f"question {group}", "given": [given.sha256]}
        answers = self.store.put("pending", table("pending", [{"trajectory": n} | common for n in names]), [given])
        assert answers == ["stale" if n in self.rows else "ok" for n in names]
        self.blobs[given.sha256] = given
        for n in names:
            self.rows.setdefault(n, Row(purpose, values={"question": f"question {group}"}))

    @precondition(lambda self: self.rows)
    @rule(
        number=pick, stage=st.sampled_from(STAGES[1:]), attempt=st.sampled_from([0, 0, 0, -1, 1]), twice=st.booleans()
    )
    def put_any(self, number: int, stage: Status, attempt: int, twice: bool) -> None:
        self.put(self.some(number, list(self.rows)), stage, attempt, twice)

    @precondition(lambda self: self.rows)
    @rule(number=pick)
    def put_next(self, number: int) -> None:
        ready = [n for n, r in self.rows.items() if r.status in STAGES[:-1]]
        for name in ready[number % 3 :: 2]:
            self.put(name, STAGES[STAGES.index(self.rows[name].status) + 1])

    def put(self, name: str, stage: Status, attempt: int = 0, twice: bool = False) -> None:
        r = self.rows[name]
        attempt += r.attempt
        self.steps += 1
        values: dict[str, Any] = {"generated": {"text": f"text {self.steps}", "versions": [self.steps, self.steps + 1]}}
        values |= {"rendered": {"finished": True}, "scored": {"reward": float(self.steps)}}
        rows = [{"trajectory": name, "group": name.rpartition("/")[0], "attempt": attempt} | values[stage]] * (
            1 + twice
        )
        ok = attempt == r.attempt and stage in MOVES[r.status]
        assert self.store.put(stage, table(stage, rows)) == ["ok" if ok else "stale"] + ["stale"] * twice
        if ok:
            r.move(stage)
            r.values |= values[stage]
            if stage is Status.SCORED:
                self.reached.append(name)

    @rule(stage=st.sampled_from(STAGES))
    def put_unknown(self, stage: Status) -> None:
        if stage is not Status.PENDING:
            assert self.store.put(stage, row(stage, "nobody/0")) == ["stale"]

    @rule(
        stage=st.sampled_from([*STAGES, Status.SCORED]),
        limit=st.integers(1, 4),
        by_group=st.booleans(),
        purpose=st.sampled_from([None, *PURPOSES]),
        newest_first=st.booleans(),
        behind=st.sampled_from([None, 0, 30]),
    )
    def claim(
        self, stage: Status, limit: int, by_group: bool, purpose: str | None, newest_first: bool, behind: int | None
    ) -> None:
        self.expire()
        by_group = by_group or stage is Status.SCORED
        bound = behind if by_group and stage is Status.SCORED else None
        now = self.steps + 1
        units = [u for u in self.units(stage, by_group) if purpose in (None, self.rows[u[0]].purpose)]
        stale = [u for u in units if bound is not None and any(self.stale(n, now, bound) for n in u)]
        units = [u for u in units if u not in stale and not any(self.rows[n].token for n in u)]
        got = self.store.claim(
            stage,
            limit=limit,
            lease_s=LEASE_S,
            columns=COLUMNS,
            by_group=by_group,
            purpose=purpose,
            newest_first=newest_first,
            version=now if bound is not None else None,
            max_staleness=bound or 0,
        )
        requeued = [u for u in stale if self.status_in_store(u[0]) is Status.PENDING]
        for name in [n for u in requeued for n in u]:
            self.rows[name].move(Status.PENDING)
            self.rows[name].attempt += 1
            self.rows[name].values = {"question": self.rows[name].values["question"]}
        spent = [n for u in units for n in u if self.status_in_store(n) is Status.DROPPED_DATA]
        assert all(self.rows[n].claims >= MAX_CLAIMS for n in spent)
        names = list(got.trajectories) if got else []
        chosen = [u for u in units if set(u) & {*names, *spent}]
        assert all({*u} <= {*names, *spent} for u in chosen), "a group is claimed whole"
        assert len(names) == len(set(names)) == sum(map(len, chosen)) - len(spent)
        free_stale = [u for u in stale if u not in requeued and not any(self.rows[n].token for n in u)]
        assert len(chosen) <= limit
        if len(chosen) < limit:
            assert chosen == units and not free_stale, "there was more to claim"
        for n in spent:
            self.rows[n].move(Status.DROPPED_DATA)
        if got:
            self.take(got)

    def take(self, got: Claim) -> None:
        assert got.token not in self.until
        self.until[got.token] = self.clock.now + LEASE_S
        for n, values in zip(got.trajectories, got.rows.to_pylist(), strict=True):
            assert self.rows[n].token == 0, "leased twice"
            self.rows[n].claims += 1
            self.rows[n].token = got.token
            self.check(n, values)

    def units(self, stage: Status, by_group: bool) -> list[list[str]]:
        here = [n for n, r in self.rows.items() if r.status is stage]
        if not by_group:
            return [[n] for n in here]
        found = []
        for group in dict.fromkeys(n.rpartition("/")[0] for n in here):
            if stage is not Status.SCORED or all(self.rows[n].status in TERMINAL for n in self.members(group)):
                found.append([n for n in here if n.rpartition("/")[0] == group])
        return found

    def stale(self, name: str, now: int, bound: int) -> bool:
        return staleness(now, min(self.rows[name].values["versions"])) > bound

    def status_in_store(self, name: str) -> Status:
        return self.store._index.status(self.store._index.ids[name])

    @precondition(lambda self: self.until)
    @rule(number=pick)
    def extend(self, number: int) -> None:
        token = self.some(number, list(self.until))
        held = self.held(token)
        assert self.store.extend(token, LEASE_S) == bool(held)
        if held:
            self.until[token] = self.clock.now + LEASE_S

    @precondition(lambda self: self.until)
    @rule(number=pick, part=st.booleans())
    def release(self, number: int, part: bool) -> None:
        token = self.some(number, list(self.until))
        held = self.held(token)
        held = held[:1] if part else held
        self.store.release(token, held if part else None)
        for n in held:
            self.rows[n].token = 0
            self.rows[n].claims -= 1

    @precondition(lambda self: self.until)
    @rule(number=pick, status=st.sampled_from([*ENDS, Status.REQUEUED, Status.PENDING]), part=st.booleans())
    def ack(self, number: int, status: Status, part: bool) -> None:
        token = self.some(number, list(self.until))
        self.finish(token, (self.held(token) or list(self.rows))[: 1 if part else 9], status)

    @rule(number=pick)
    def train(self, number: int) -> None:
        got = self.store.claim("scored", limit=2, lease_s=LEASE_S, columns=COLUMNS, by_group=True)
        self.expire()
        for n, r in self.rows.items():
            if self.status_in_store(n) is Status.DROPPED_DATA and r.status is Status.SCORED:
                assert r.claims >= MAX_CLAIMS
                r.move(Status.DROPPED_DATA)
        if got:
            self.take(got)
            self.finish(got.token, got.trajectories, Status.TRAINED)

    def finish(self, token: int, names: list[str], status: Status) -> None:
        self.expire()
        self.steps += 1
        answers = self.store.ack(token, {n: (status, "why") for n in names}, step=self.steps, advantages={})
        for n, answer in zip(names, answers, strict=True):
            r = self.rows[n]
            ok = r.token in (token, 0) and status in MOVES[r.status] and status not in STAGES
            assert answer == ("ok" if ok else "stale")
            if ok and status is Status.REQUEUED:
                r.move(Status.PENDING)
                r.attempt += 1
                r.values = {"question": r.values["question"]}
            elif ok:
                r.move(status)
                r.step = self.steps

    @rule(seconds=st.sampled_from([1.0, 6.0, 11.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(back=st.integers(0, 4))
    def rewind(self, back: int) -> None:
        step = self.steps - back
        void = [r for r in self.rows.values() if r.status is Status.TRAINED and r.step > step]
        assert self.store.rewind(step) == len(void)
        for r in void:
            r.move(Status.SCORED)

    @rule(share=st.sampled_from([0.0, 0.5, 1.0]), back=st.integers(0, 4))
    def collect(self, share: float, back: int) -> None:
        limit = Retention(max_bytes=int(share * self.store.bytes()))
        before, committed = set(self.rows), self.steps - back
        n = self.store.collect(limit, committed)
        left = set(self.store.find("train")) | set(self.store.find("before"))
        gone = before - left
        assert left <= before and len({name.rpartition("/")[0] for name in gone}) == n
        for group in {name.rpartition("/")[0] for name in gone}:
            members = [self.rows.pop(name) for name in self.members(group)]
            assert all(r.purpose == "train" and r.status in ENDS and r.step <= committed for r in members)
            noted = self.gone["train"]
            noted.update(r.status.value for r in members)
            trained = any(r.status is Status.TRAINED for r in members)
            noted.update(groups_accepted=1, groups_ended=1, groups_trained=trained)
        assert not gone & {name for name in before if name in left}
        if n:
            named = {h for r in self.store.get(sorted(left), ["given"]).to_pylist() for h in r["given"]}
            self.blobs = {h: b for h, b in self.blobs.items() if h in named}

    @rule(limit=st.integers(1, 5))
    def follow(self, limit: int) -> None:
        names, position = self.store.follow("watcher", "scored", limit)
        assert len(names) <= limit and position >= self.cursor
        if names:
            assert position > self.cursor
            self.store.advance("watcher", "scored", position)
            self.cursor = position
            self.followed.update(names)
        else:
            unseen = Counter(n for n in self.reached if n in self.rows) - self.followed
            assert not unseen, "rows were passed over"

    # ---- lives

    @rule()
    def come_back(self) -> None:
        self.store.close()
        self.next_life(self.store.root)

    @rule()
    def die(self) -> None:
        self.lives += 1
        left = shutil.copytree(self.store.root, self.folder / str(self.lives))
        self.store.close()
        self.next_life(left)

    def next_life(self, folder: Any) -> None:
        self.store = Store(folder, self.clock)
        self.until = {}
        for r in self.rows.values():
            r.token = r.claims = 0

    # ---- what always holds

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "store"):
            return
        for purpose in PURPOSES:
            mine = [n for n, r in self.rows.items() if r.purpose == purpose]
            statuses = Counter(self.rows[n].status.value for n in mine)
            gone = self.gone[purpose]
            wanted = statuses + Counter({s: n for s, n in gone.items() if s in set(Status)})
            assert self.store.counts(purpose) == dict(wanted)
            groups = {n.rpartition("/")[0] for n in mine}
            of = {g: [self.rows[n].status for n in self.members(g)] for g in groups}
            assert self.store.groups(purpose) == {
                "accepted": len(of) + gone["groups_accepted"],
                "ended": sum(set(s) <= ENDS for s in of.values()) + gone["groups_ended"],
                "trained": sum(Status.TRAINED in s for s in of.values()) + gone["groups_trained"],
            }
            assert self.store.lost(purpose) == 0
            assert set(self.store.find(purpose)) == set(mine)

    @invariant()
    def rows_are_what_was_put(self) -> None:
        if not self.rows:
            return
        names = random.Random(self.steps).sample(sorted(self.rows), min(5, len(self.rows)))
        for name, values in zip(names, self.store.get(names, COLUMNS).to_pylist(), strict=True):
            self.check(name, values)
        if self.blobs:
            one = self.some(self.steps, sorted(self.blobs))
            assert self.store.blobs([one]) == {one: self.blobs[one]}

    def check(self, name: str, values: dict[str, Any]) -> None:
        r = self.rows[name]
        assert values["attempt"] == r.attempt
        assert {c: values[c] for c in ("question", "text", "versions", "reward")} == {
            c: r.values.get(c) for c in ("question", "text", "versions", "reward")
        }


def run(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_the_store_does_what_a_dictionary_would() -> None:
    run(30, 30)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_store_does_what_a_dictionary_would_for_long() -> None:
    run(600, 120)
