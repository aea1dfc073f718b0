"""Kills processes that own a store, or write to one, and checks what they leave. A plain process, without Ray:

    python -m tests.replay.killing FOLDER KILLS SEED [served]

It forks a worker a kill from itself, warmed up as it is. The worker says what it is about to do and, when the verb has
returned, that it is done. So one verb at most is in doubt: the store must be as it was before it, or as after it.
"""

from __future__ import annotations

import copy
import faulthandler
import itertools
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

import replay.log
from replay.record import ENDS, STAGES, Blob, Status
from replay.store import Retention, Store
from tests.replay.rows import claim, pending, table

replay.log.SEGMENT_BYTES = 6000  # so that seals, commits and collections come often

#: What a worker may die at: everything that makes something durable, or visible.
SYSCALLS = ("fsync", "fdatasync", "link", "rename", "unlink", "truncate", "open")


def picture(name: str) -> Blob:
    return Blob(name.encode() * 40)


@dataclass
class Row:
    status: Status = Status.PENDING
    attempt: int = 0
    step: int = -1
    text: str | None = None


@dataclass
class Model:
    """What a store holds, if all verbs went through."""

    rows: dict[str, Row] = field(default_factory=dict)
    step: int = 0
    committed: int = -1
    groups: int = 0
    cursor: int = 0

    def apply(self, verb: str, what: Any) -> None:
        if verb == "accept":
            self.groups += 1
            self.rows |= {f"{what}/{k}": Row() for k in range(3)}
        elif verb == "put":
            stage, texts = what
            for name, text in texts.items():
                self.rows[name].status = Status(stage)
                self.rows[name].text = text if stage == "generated" else self.rows[name].text
        elif verb == "ack":
            names, status = what
            self.step += 1
            for name in names:
                row = self.rows[name]
                again = status == Status.REQUEUED
                self.rows[name] = (
                    Row(attempt=row.attempt + 1) if again else Row(Status(status), row.attempt, self.step, row.text)
                )
        elif verb == "collect":
            self.committed = what
        elif verb == "advance":
            self.cursor = what

    def check(self, store: Store) -> None:
        """Raises AssertionError where the store is anything else."""
        there = store.find("train")
        assert len(there) == len(set(there))
        gone = set(self.rows) - set(there)
        assert set(there) <= set(self.rows), f"nobody put {set(there) - set(self.rows)}"
        may_go = {n for n, r in self.rows.items() if r.status in ENDS and r.step <= self.committed}
        assert gone <= may_go, f"lost: {gone - may_go}"
        for got in store.get(there, ["text", "given"]).to_pylist():
            row, group = self.rows[got["trajectory"]], got["group"]
            assert (got["attempt"], got["text"]) == (row.attempt, row.text), got
            assert store.blobs(got["given"]) == {b.sha256: b for b in [picture(group)]}
        counts = Counter(r.status.value for r in self.rows.values())
        assert store.counts() == dict(counts), (store.counts(), counts)
        assert store.lost("train") == 0
        assert store.cursor("train") == self.groups
        assert store._cursors.get(("watcher", "scored"), 0) == self.cursor


class Worker:
    """Owns the store and does one thing after the other, until it is killed."""

    def __init__(self, folder: Path, model: Model, tell: int, rng: random.Random) -> None:
        self._model, self._tell, self._rng = model, tell, rng
        self._store = Store(folder)

    def run(self) -> None:
        steps = [self._accept, self._accept, self._advance, self._collect, *[self._put] * 6, *[self._end] * 5]
        while True:
            self._rng.choice(steps)()

    def _do(self, verb: str, what: Any, call: Callable[[], Any]) -> None:
        os.write(self._tell, json.dumps([verb, what]).encode() + b"\n")
        answer = call()
        assert not isinstance(answer, list) or set(answer) == {"ok"}, (verb, what, answer)
        os.write(self._tell, b"done\n")
        self._model.apply(verb, what)

    def _accept(self) -> None:
        group = f"g{self._model.groups}"
        rows = pending(group, 3, given=[picture(group).sha256])
        self._do("accept", group, lambda: self._store.put("pending", rows, [picture(group)]))

    def _put(self) -> None:
        stage = self._rng.choice(STAGES[1:])
        before = STAGES[STAGES.index(stage) - 1]
        rows = self._model.rows
        names = [n for n in rows if rows[n].status is before][: self._rng.randint(1, 4)]
        if names:
            texts = {n: f"{n} {rows[n].attempt} {self._rng.random()}" for n in names}
            common = {n: {"group": n.split("/")[0], "attempt": rows[n].attempt} for n in names}
            own = {n: {"text": texts[n], "versions": [1]} if stage is Status.GENERATED else {} for n in names}
            batch = table(stage, [{"trajectory": n} | common[n] | own[n] for n in names])
            self._do("put", [stage, texts], lambda: self._store.put(stage, batch))

    def _end(self) -> None:
        stage = self._rng.choice([Status.SCORED, Status.SCORED, Status.SCORED, Status.GENERATED])
        got = claim(self._store, stage, limit=2, by_group=stage is Status.SCORED, lease_s=0.0)
        if got:
            ways = ["trained", "trained", "dropped_filtered"] if stage is Status.SCORED else ["dropped_data"]
            status = self._rng.choice([*ways, "requeued"])
            step = self._model.step + 1
            ends = {n: (status, "why") for n in got.trajectories}
            self._do("ack", [got.trajectories, status], lambda: self._store.ack(got.token, ends, step=step))

    def _advance(self) -> None:
        names, position = self._store.follow("watcher", "scored", 3)
        if names:
            self._do("advance", position, lambda: self._store.advance("watcher", "scored", position))

    def _collect(self) -> None:
        limit = Retention(max_bytes=self._store.bytes() * 3 // 4)
        committed = self._model.step - 1
        self._do("collect", committed, lambda: self._store.collect(limit, committed))


def die_at(n: int, after: bool) -> None:
    """Kill this process at the n-th call that makes something durable."""
    left = [n]

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def dying(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            last = left[0] <= 0
            if last and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return call(*args, **options)
            finally:
                if last:
                    os.kill(os.getpid(), signal.SIGKILL)

        return dying

    for name in SYSCALLS:
        setattr(os, name, wrap(getattr(os, name)))


def own_store(folder: Path, model: Model, tell: int, rng: random.Random, n: int, after: bool) -> None:
    faulthandler.dump_traceback_later(60, exit=True)  # it should be dead long before
    if n:
        die_at(n, after)
    Worker(folder, model, tell, rng).run()


def forked(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(1)


def read_all(fd: int) -> bytes:
    parts = []
    while part := os.read(fd, 1 << 16):
        parts.append(part)
    os.close(fd)
    return b"".join(parts)


def follow(model: Model, told: bytes) -> Model | None:
    """Bring the model up to what was acknowledged; returns what it would be with the verb in doubt, if there is one."""
    lines = told.split(b"\n")[:-1]  # a verb, then "done", and so on
    for verb, what in map(json.loads, lines[0 : len(lines) // 2 * 2 : 2]):
        model.apply(verb, what)
    if len(lines) % 2 == 0:
        return None
    maybe = copy.deepcopy(model)
    maybe.apply(*json.loads(lines[-1]))
    return maybe


def settle(folder: Path, model: Model, maybe: Model | None, read_only: bool) -> Model:
    """Which of both the store is."""
    try:
        store = Store(folder, read_only=read_only)
    except Exception as error:
        if read_only and "there is no replay store" in str(error) and not model.rows:
            return model
        raise
    try:
        model.check(store)
        return model
    except AssertionError:
        if maybe is None:
            raise
        maybe.check(store)
        return maybe
    finally:
        store.close()


def kill_owners(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    rng, model, deaths = random.Random(seed), Model(), Counter[str]()
    while sum(deaths.values()) < kills:
        read, tell = os.pipe()
        by_itself = rng.random() < 0.6
        n, after, own = int(10 ** rng.uniform(0, 2.8)), rng.random() < 0.5, random.Random(rng.random())
        pid = forked(partial(own_store, folder, model, tell, own, n if by_itself else 0, after))
        os.close(tell)
        if not by_itself:
            time.sleep(rng.random() ** 2 * 0.3)
            os.kill(pid, signal.SIGKILL)
        told = read_all(read)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, "the worker failed by itself"
        deaths["by itself" if by_itself else "by us"] += 1
        maybe = follow(model, told)
        looked = settle(folder, model, maybe, read_only=True)
        if maybe is not None and rng.random() < 0.3:
            looked = settle(folder, model, maybe, read_only=False)
        model = looked
    settle(folder, model, None, read_only=False)
    trained = sum(r.status is Status.TRAINED for r in model.rows.values())
    return {"deaths": dict(deaths), "rows": len(model.rows), "trained": trained, "collected": model.committed}


# ---- a store that others write to ----------------------------------------------------------------------------------


def serve(folder: Path, listener: Listener) -> None:
    os.setpgid(0, 0)
    store = Store(folder)
    while True:
        with suppress(EOFError, OSError), listener.accept() as connection:  # the writer may die at any time
            while True:
                stage, rows, blobs = connection.recv()
                connection.send(store.put(stage, rows, blobs))


def write(address: str, tell: int, name: str, group: int) -> None:
    with suppress(OSError):
        os.setpgid(0, group)
    with Client(address) as connection:
        for n in itertools.count():
            made = f"{name}-{n}"
            filling = Blob(made.encode() * 20_000)  # so long that the writer often dies in the middle of it
            connection.send(("pending", pending(made, 3, given=[filling.sha256]), [filling]))
            assert connection.recv() == ["ok"] * 3
            os.write(tell, f"{made}\n".encode())


def kill_writers(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    rng, acknowledged, lives = random.Random(seed), set[str](), 0
    while kills > 0:
        address = str(folder.parent / f"socket-{lives}")
        lives += 1
        listener = Listener(address)
        owner = forked(partial(serve, folder, listener))
        for _ in range(min(kills, 10)):
            kills -= 1
            read, tell = os.pipe()
            pid = forked(partial(write, address, tell, f"w{kills}", owner))
            os.close(tell)
            time.sleep(0.02 + rng.random() * 0.1)
            whole_group = rng.random() < 0.2
            with suppress(ProcessLookupError):
                (os.killpg if whole_group else os.kill)(owner if whole_group else pid, signal.SIGKILL)
            if whole_group:
                os.kill(pid, signal.SIGKILL)
            acknowledged |= set(read_all(read).decode().split())
            os.waitpid(pid, 0)
            if whole_group:
                break
            assert os.waitpid(owner, os.WNOHANG) == (0, 0), "the store died with its writer"
        with suppress(ProcessLookupError):
            os.kill(owner, signal.SIGKILL)
        os.waitpid(owner, 0)
        listener.close()
        check_writers(folder, acknowledged)
    return {"acknowledged": len(acknowledged), "lives": lives}


def check_writers(folder: Path, acknowledged: set[str]) -> None:
    store = Store(folder)
    names = store.find("train")
    samples = Counter(n.split("/")[0] for n in names)
    assert set(samples.values()) <= {3}, "half a put"
    assert acknowledged <= set(samples), acknowledged - set(samples)
    for got in store.get([f"{group}/0" for group in samples], ["given"]).to_pylist():
        assert store.blobs(got["given"])[got["given"][0]].data == got["group"].encode() * 20_000
    assert store.lost("train") == 0
    store.close()


if __name__ == "__main__":
    run = kill_writers if sys.argv[4:] == ["served"] else kill_owners
    print(json.dumps(run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
