"""The replay store: what stands between all stages, and loses nothing.

Invariant: the status of every trajectory is a pure function of the logs. A row in a stage's log *is* the move to that
stage, and so acknowledges the claim on the stage before it in the same commit; ends are rows of the log `ended`.
Leases live in memory only: when the store comes back, everything that was claimed can be claimed again, and of two
puts of the same row the first wins and the second is told `stale`. Nothing here knows of Ray; `actors/store.py` does.
`docs/replay.md` has the format of the files.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from replay import manifest
from replay.index import Index
from replay.join import joined
from replay.log import Log
from replay.manifest import LogState, Manifest
from replay.pictures import reserved
from replay.record import ENDS, MOVES, SCHEMAS, STAGES, TERMINAL, Blob, Status, staleness
from replay.retention import Retention, chosen, compress_cold, finished, remove
from replay.storage import LocalStorage, StoreError, lock, storage

__all__ = ["MAX_CLAIMS", "Claim", "Retention", "Store", "StoreError"]

MAX_CLAIMS = 5  # a row that was claimed so often without a result takes its workers down: it is dropped
_READ_TRIES = 3


_Moves = Set[tuple[str, Status]]
_Done = tuple[str, int, pa.RecordBatch]  # log, id of the batch in it, batch
_Rows: TypeAlias = "pa.Table | Sequence[Blob]"


@dataclass
class Claim:
    """A lease on trajectories. `rows` has one row each, in the order claimed, with the columns asked for."""

    token: int
    trajectories: list[str]
    rows: pa.Table


class Put:
    """Rows on their way to disk.

    Attributes:
        written: done when they are durable, or could not be written.
        moves: (trajectory, status) of its rows.
    """

    def __init__(
        self, store: Store, written: Future[None], done: list[_Done], answers: list[str], moves: _Moves
    ) -> None:
        self.written, self.moves, self._done, self._answers, self._store = written, moves, done, answers, store

    def answers(self) -> list[str]:
        """What `Store.put` returns, or raises; waits for it. For the store's own thread."""
        self._store._settle(self)
        self.written.result()
        return self._answers


class Store:
    """A store in a local folder or a bucket. All verbs are called by one thread; others write to the logs.

    Args:
        url: a folder (made if missing), `file://...` or `s3://...`; locked while open.
        clock: seconds, monotonic; leases run on it.
        read_only: show what is durable now, without lock or change; only `get`, `blobs` and what counts can be used.
        patient: wait for the lock of an owner that may have died.

    Raises:
        StoreError: it is open elsewhere, damaged, written by a newer format, or (read only) not there.
    """

    def __init__(
        self,
        url: str | Path,
        clock: Callable[[], float] = time.monotonic,
        *,
        read_only: bool = False,
        patient: bool = False,
    ) -> None:
        self.root, self._clock, self._read_only = url, clock, read_only
        self._storage = storage(url, read_only)
        # Pictures are written beside other rows: their sync is what takes long, and only their own rows wait for it.
        self._writer = ThreadPoolExecutor(1, "replay-writer")
        local = isinstance(self._storage, LocalStorage)  # in a bucket every append changes what a manifest says
        self._blob_writer = ThreadPoolExecutor(1, "replay-blobs") if local else self._writer
        self._sealing = threading.Lock()
        self._under_way: deque[Put] = deque()
        if patient:
            lock(self._storage)
        elif not read_only:
            self._storage.lock()
        try:
            if read_only:
                self._open_for_reading()
            else:
                self._open()
                self._commit()  # keeps an earlier owner that does not know yet from committing
        except BaseException:
            self._storage.unlock()
            raise

    def _open_for_reading(self) -> None:
        for _ in range(_READ_TRIES - 1):
            with contextlib.suppress(StoreError):  # the writer may replace a file that we are about to read
                return self._open()
        self._open()

    def _open(self, check: bool = True) -> None:
        found = manifest.read(self._storage)
        if found is None and self._read_only:
            raise StoreError(f"there is no replay store in {self._storage.url}")
        self._manifest = found or Manifest()
        states = {name: self._manifest.logs.setdefault(name, LogState()) for name in SCHEMAS}
        self._logs = {
            n: Log(self._storage, n, schema, states[n], self._read_only, check) for n, schema in SCHEMAS.items()
        }
        self._tokens = itertools.count(time.time_ns())  # never one of an earlier life's
        self._leases: dict[int, list[int]] = {}  # token -> numbers of what it still holds
        self._index = Index()
        self._blobs: dict[str, int] = {}  # SHA-256 -> batch << 32 | row
        self._cursors: dict[tuple[str, str], int] = {}
        self._replay()
        self._stored = set(self._blobs)  # as the writer's thread knows it: also what is not in the index yet

    # ---- verbs -------------------------------------------------------------------------------------------------

    def put(self, stage: str, rows: pa.Table, blobs: Iterable[Blob] = ()) -> list[str]:
        """Append a stage's rows; a row that its trajectory's status does not allow (any more) is left out.

        Args:
            stage: `pending`, `generated`, `rendered` or `scored`.
            rows: columns of `SCHEMAS[stage]`.
            blobs: pictures that the rows refer to; durable before the rows are.

        Returns:
            `ok` or `stale`, one a row.

        Raises:
            StoreError: the disk or the service refused; none of the rows is kept.
        """
        return self.put_soon(stage, rows, blobs).answers()

    def put_soon(self, stage: str, rows: pa.Table, blobs: Iterable[Blob] = ()) -> Put:
        """`put` in the background: the rows are written in the order of the calls, and count once they are durable.

        A row whose trajectory has another one of the same stage under way is `stale`.
        """
        status = Status(stage)
        names, attempts = rows.column("trajectory").to_pylist(), rows.column("attempt").to_pylist()
        first = {name: k for k, name in reversed(list(enumerate(names)))}
        under_way = {(name, of) for put in self._under_way for name, of in put.moves}
        fresh = [
            first[name] == k and (name, status) not in under_way and self._may_move(name, attempt, status)
            for k, (name, attempt) in enumerate(zip(names, attempts, strict=True))
        ]
        pictures = list(blobs)
        writes: list[tuple[str, _Rows]] = [("blobs", pictures)] if pictures else []
        if any(fresh):
            writes.append((stage, rows if all(fresh) else rows.filter(pa.array(fresh))))
        moves = {(name, status) for name, ok in zip(names, fresh, strict=True) if ok}
        return self._write(writes, ["ok" if ok else "stale" for ok in fresh], moves)

    def claim(
        self,
        stage: str,
        *,
        limit: int,
        lease_s: float,
        columns: Sequence[str],
        by_group: bool = False,
        purpose: str | None = None,
        newest_first: bool = False,
        version: int | None = None,
        max_staleness: int = 0,
    ) -> Claim | None:
        """Lease trajectories that stand at `stage`.

        Args:
            limit: most trajectories, or most groups if `by_group`.
            lease_s: seconds until the rows may be claimed again.
            columns: to be joined into `Claim.rows`, as `get` names them.
            by_group: whole groups only. From `scored`: complete groups, of which the scored samples are leased.
            purpose: only rows of this purpose.
            version: the policy's version now; groups older than `max_staleness` versions are queued anew instead.

        Returns:
            None if there is nothing to claim.
        """
        self._expire()
        status, index = Status(stage), self._index
        chosen: list[list[int]] = []
        old: list[int] = []
        seen: set[int] = set()
        of = index["purpose"]
        wanted = index.purposes.get(purpose, -1) if purpose is not None else None
        queue = index.queues[status]
        for i in reversed(queue) if newest_first else queue:
            if len(chosen) >= limit:
                break
            if i in seen or (wanted is not None and of[i] != wanted):
                continue
            unit = [i]
            if by_group:
                unit = [m for m in index.siblings(i) if index.status(m) is status]
                seen.update(unit)
                if status is Status.SCORED and not index.complete(i):
                    continue
                if version is not None and self._stale(unit, version, max_staleness):
                    old += unit
                    continue
                if any(m not in queue for m in unit):  # leased
                    continue
            chosen.append(unit)
        self._end(old, Status.REQUEUED, f"older than {max_staleness} versions")
        ids = self._count_claims([i for unit in chosen for i in unit])
        if not ids:
            return None
        token = next(self._tokens)
        self._leases[token] = ids
        index.lease(ids, token, self._clock() + lease_s)
        names = [index.names[i] for i in ids]
        return Claim(token, names, joined(self._index, self._logs, ids, columns))

    def extend(self, token: int, lease_s: float) -> bool:
        """Prolong a lease; False if nothing of it is held any more."""
        held = self._held(token)
        self._index.lease(held, token, self._clock() + lease_s)
        return bool(held)

    def ack(
        self, token: int, ends: Mapping[str, tuple[str, str]], step: int = -1, advantages: Mapping[str, float] = {}
    ) -> list[str]:
        """End (or requeue) leased trajectories.

        Args:
            token: of the claim; rows that another claim holds by now are left alone.
            ends: trajectory -> (status, reason).
            step: optimiser step, for `trained`.
            advantages: kept with the row, for reports.

        Returns:
            `ok` or `stale`, one an entry of `ends`, in its order.
        """
        self._expire()
        index = self._index
        # a lease that ran out, or died with an earlier life of the store, still counts if nobody else has the row
        mine = {t: i for t in ends if (i := index.ids.get(t)) is not None and index["token"][i] in (token, 0)}
        fresh = {t: Status(s) for t, (s, _) in ends.items() if t in mine and Status(s) in self._moves(mine[t])}
        self._append_ends([(mine[t], s, ends[t][1], step, advantages.get(t, 0.0)) for t, s in fresh.items()])
        return ["ok" if t in fresh else "stale" for t in ends]

    def release(self, token: int, trajectories: Sequence[str] | None = None) -> None:
        """Give a lease back (or part of it): the rows can be claimed at once, and the claim is not counted."""
        held = self._held(token)
        if trajectories is not None:
            held = [i for i in held if self._index.names[i] in set(trajectories)]
        self._index["claims"][held] -= 1
        self._index.unlease(held)

    def get(self, trajectories: Sequence[str], columns: Sequence[str]) -> pa.Table:
        """Join columns of all stages, one row a trajectory in the order asked for.

        Rows of a stage that a trajectory has not reached are null. `trajectory`, `group` and `attempt` come always.
        A column is that of the first stage that has one of its name; `STAGE.COLUMN` names any, of `ended` too.

        Raises:
            KeyError: there is no such trajectory.
        """
        return joined(self._index, self._logs, [self._index.ids[t] for t in trajectories], columns)

    def blobs(self, names: Iterable[str]) -> dict[str, Blob]:
        """Pictures by SHA-256. Raises KeyError for one that was never put."""
        found = {}
        for name in names:
            place = self._blobs[name]
            rows = self._logs["blobs"][place >> 32]
            row = place & 0xFFFFFFFF
            found[name] = Blob(rows.column("data")[row].as_py(), rows.column("mime")[row].as_py())
        return found

    def has_blob(self, name: str) -> bool:
        return name in self._blobs

    def clear(self) -> None:
        """Forget everything, on disk too."""
        self._settle()
        for log in self._logs.values():
            log.seal()
        if not self._settled:
            raise StoreError(f"the store {self._storage.url} cannot be cleared while its disk is full; free some space")
        empty = {name: LogState(log.state.next, log.state.rows) for name, log in self._logs.items()}
        Manifest(self._manifest.version, empty).commit(self._storage)
        self._leases = {}
        self._reopen()
        for log in self._logs.values():
            log.sweep()

    # ---- readers that do not claim -----------------------------------------------------------------------------

    def follow(self, consumer: str, stage: str, limit: int) -> tuple[list[str], int]:
        """The next trajectories that reached a stage, in the order in which they did, after the consumer's cursor.

        Returns:
            the trajectories, and the position behind them, for `advance`. The cursor does not move by itself:
            whoever dies before `advance` reads the same rows again.
        """
        self._settle()
        log, at = self._logs[stage], self._cursors.get((consumer, stage), 0)
        out: list[str] = []
        for first, end, batches in log.spans():
            if end <= at or len(out) >= limit:
                continue
            names = [name for i in batches for name in log[i].column("trajectory").to_pylist()]
            # After a collection a cursor may stand between rows that are gone. As many are left to read as there were,
            # at most: some may be read again, none is passed over.
            names = names[max(0, len(names) - (end - max(at, first))) :]
            taken = names[: limit - len(out)]
            at = end if len(taken) == len(names) else end - len(names) + len(taken)
            out += taken
        return out, at

    def advance(self, consumer: str, stage: str, position: int) -> None:
        """Move a consumer's cursor to a position that `follow` gave, durably."""
        self._settle()
        if not 0 <= position <= (end := self._logs[stage].rows):
            raise StoreError(f"consumer {consumer!r} cannot move to row {position} of {stage}, which has {end}")
        row = {"consumer": consumer, "stage": stage, "row": position}
        self._append("cursors", pa.Table.from_pylist([row], SCHEMAS["cursors"]))

    # ---- for those who watch -----------------------------------------------------------------------------------

    def rewind(self, step: int) -> int:
        """Void what was trained after optimiser step `step` (the committed one); returns how many came back."""
        trained = self._index.numbers(self._index.find(None, [Status.TRAINED]))
        void = trained[self._index["step"][trained] > step].tolist()
        self._append_ends([(i, Status.SCORED, f"not committed: trained after step {step}", step, 0.0) for i in void])
        return len(void)

    def counts(self, purpose: str | None = None) -> dict[str, int]:
        """Trajectories by status, those that retention removed included."""
        kept = Counter(self._index.counts(purpose))
        for name, gone in self._manifest.collected.items():
            if purpose in (None, name):
                kept.update({s: n for s, n in gone.items() if s in set(Status)})
        return dict(kept)

    def groups(self, purpose: str) -> dict[str, int]:
        """Groups: `accepted` ever, `ended` (all samples at an end), `trained` (at least one sample trained)."""
        out = self._index.group_counts(purpose)
        gone = self._manifest.collected.get(purpose, {})
        return {name: n + gone.get(f"groups_{name}", 0) for name, n in out.items()}

    def running(self, purpose: str) -> int:
        """Groups of which a sample is neither scored nor has ended."""
        return self._index.running(purpose)

    def purposes(self) -> list[str]:
        """`train` and the names of evaluations, sorted."""
        return sorted({*self._index.purposes, *self._manifest.collected})

    def ends(self, purpose: str) -> dict[str, tuple[str, str]]:
        """Trajectory -> (status, reason) of all that are scored or have ended."""
        reasons: dict[str, str] = {}
        for _, batch in self._logs["ended"]:
            reasons |= zip(*batch.select(["trajectory", "reason"]).to_pydict().values(), strict=True)
        index = self._index
        return {t: (index.status(index.ids[t]).value, reasons.get(t, "")) for t in index.find(purpose, TERMINAL)}

    def lost(self, purpose: str) -> int:
        """Accepted trajectories that neither live on nor ended exactly once, counted in the logs. Must be 0."""
        index = self._index
        ends = np.zeros(len(index.names), np.int64)
        for _, batch in self._logs["ended"]:
            status = batch.column("status").to_pylist()
            ids = index.numbers(batch.column("trajectory").to_pylist())
            # a rewind, a row with status "scored", voids the end before it
            change = np.array([1 if s in ENDS else -1 if s == Status.SCORED else 0 for s in status], np.int64)
            np.add.at(ends, ids[ids >= 0], change[ids >= 0])
        accepted = index.numbers(index.find(purpose))
        return int(np.sum(index.alive()[accepted] + ends[accepted] != 1))

    def cursor(self, purpose: str) -> int:
        """The `order` that the next prompt of this purpose gets: groups accepted ever."""
        return self.groups(purpose)["accepted"]

    def newest_version(self) -> int | None:
        """The newest policy version that any row holds."""
        versions = self._index["version"][: len(self._index.names)]
        return int(versions.max()) if len(versions) and versions.max() >= 0 else None

    def find(self, purpose: str, statuses: Iterable[str] | None = None) -> list[str]:
        """Trajectories of a purpose (at these statuses), oldest first."""
        return self._index.find(purpose, statuses)

    def version(self) -> dict[str, int]:
        """Rows ever appended to each log: names a state of the store."""
        self._settle()
        return {name: log.rows for name, log in self._logs.items()}

    def bytes(self) -> int:
        """Size of all sealed segments."""
        return sum(s.bytes for log in self._logs.values() for s in log.state.segments)

    def collect(self, retention: Retention, committed_step: int) -> int:
        """Remove finished groups beyond what `retention` allows, and compress what is cold; returns how many went.

        Args:
            committed_step: what was trained after it may come back, and is not touched.
        """
        self._settle()
        self._commit()  # so that nothing is swept which the newest manifest names
        for log in self._logs.values():
            log.sweep()  # what the last collection replaced
            log.seal()
        if not self._settled:
            return 0
        self._commit()
        groups = finished(self._index, self._logs["ended"], committed_step)
        accepted = self._index.group_counts("train")["accepted"]
        gone = chosen(groups, accepted, self.bytes(), retention, time.time())
        draft = copy.deepcopy(self._manifest)  # if anything fails, the store goes on with what it has
        logs = {
            name: Log(self._storage, name, schema, draft.logs[name], check=False) for name, schema in SCHEMAS.items()
        }
        if gone:
            self._note_collected(draft, gone)
            remove(logs, {self._index.names[i] for members in gone for i in members})
        compress_cold(logs, self._index)
        if draft != self._manifest:
            draft.commit(self._storage)
            self._reopen()
        return len(gone)

    def close(self) -> None:
        if not self._read_only:
            self._settle()
            self._writer.shutdown()
            self._blob_writer.shutdown()
            for log in self._logs.values():
                log.seal()
            self._commit()
            self._storage.unlock()

    # ---- the logs ----------------------------------------------------------------------------------------------

    def _write(self, writes: Sequence[tuple[str, _Rows]], answers: list[str], moves: _Moves) -> Put:
        """Append to one log after the other, each durable before the next begins."""
        done: list[_Done] = []
        written: Future[None] = Future()
        written.set_result(None)
        for name, rows in writes:
            writer = self._blob_writer if name == "blobs" else self._writer
            written = writer.submit(self._write_now, name, rows, written, done)
        put = Put(self, written, done, answers, moves)
        self._under_way.append(put)
        return put

    def _write_now(self, name: str, rows: _Rows, before: Future[None], done: list[_Done]) -> None:
        """In a writer's thread."""
        before.result()
        parts: list[bytes] = []
        if not isinstance(rows, pa.Table):
            new = {b.sha256: b for b in rows if b.sha256 not in self._stored}
            rows, parts = reserved(list(new.values()))
        if not rows.num_rows:
            return
        log = self._logs[name]
        with self._sealing:  # now and not after the append: if this fails, nothing was kept
            log.mend()
            if log.full:
                log.seal()
                self._commit()
        done.append((name, *log.append(rows, parts)))
        if name == "blobs":
            self._stored.update(rows.column("sha256").to_pylist())

    def _settle(self, last: Put | None = None) -> None:
        """Bring what was written into the index, in its order: up to one put, or all of it."""
        while self._under_way and (last is None or last in self._under_way):
            put = self._under_way[0]
            wait([put.written])
            self._under_way.popleft()
            for name, i, batch in put._done:
                self._take(name, i, batch)

    def _append(self, name: str, rows: pa.Table) -> None:
        self._write([(name, rows)], [], set()).answers()

    def _commit(self) -> None:
        self._manifest.commit(self._storage)
        for log in self._logs.values():
            log.forget_sidecars()

    @property
    def _settled(self) -> bool:
        return all(log.settled for log in self._logs.values())

    def _reopen(self) -> None:
        """Read everything anew; leases and their tokens live on."""
        held = {t: [self._index.names[i] for i in ids] for t in list(self._leases) if (ids := self._held(t))}
        until = {t: float(self._index["until"][ids[0]]) for t, ids in self._leases.items()}
        claims = {n: int(self._index["claims"][i]) for n, i in self._index.ids.items() if self._index["claims"][i]}
        tokens = self._tokens
        self._open(check=False)
        self._tokens = tokens
        for name, n in claims.items():
            if name in self._index.ids:
                self._index["claims"][self._index.ids[name]] = n
        for token, names in held.items():
            self._leases[token] = ids = [self._index.ids[n] for n in names]
            self._index.lease(ids, token, until[token])

    def _note_collected(self, draft: Manifest, gone: Sequence[Sequence[int]]) -> None:
        noted = Counter(draft.collected.get("train", {}))
        for members in gone:
            statuses = [self._index.status(i) for i in members]
            noted.update(s.value for s in statuses)
            noted.update(groups_accepted=1, groups_ended=1, groups_trained=Status.TRAINED in statuses)
        draft.collected["train"] = dict(noted)

    def _replay(self) -> None:
        """Build the index from the logs. First the requeues: they tell which attempt of a trajectory counts."""
        self._index.bulk(True)
        self._index_all(Status.PENDING)
        for _, batch in self._logs["ended"]:
            self._index.attempts(batch.filter(pc.equal(batch.column("status"), Status.REQUEUED.value)))
        for name in (*STAGES[1:], "ended", "blobs", "cursors"):
            self._index_all(name)
        self._index.bulk(False)

    def _index_all(self, name: str) -> None:
        for i, batch in self._logs[name]:
            self._take(name, i, batch)

    def _take(self, name: str, i: int, batch: pa.RecordBatch) -> None:
        """Bring the index up to date with a batch of a log."""
        places = (i << 32) + np.arange(batch.num_rows)
        if name == Status.PENDING:
            self._index.accept(batch, places)
        elif name == "ended":
            self._index.end(batch, places)
        elif name == "blobs":
            self._blobs.update(zip(batch.column("sha256").to_pylist(), places.tolist(), strict=True))
        elif name == "cursors":
            keys = zip(batch.column("consumer").to_pylist(), batch.column("stage").to_pylist(), strict=True)
            self._cursors.update(zip(keys, batch.column("row").to_pylist(), strict=True))
        else:
            self._index.reach(Status(name), batch, places)

    def _append_ends(self, ends: Sequence[tuple[int, Status, str, int, float]]) -> None:
        if not ends:
            return
        index = self._index
        rows = [
            {
                "trajectory": index.names[i],
                "group": index.group_name(i),
                "attempt": int(index["attempt"][i]),
                "turn": 0,
                "status": status.value,
                "reason": reason,
                "step": step,
                "advantage": advantage,
                "time": time.time(),
            }
            for i, status, reason, step, advantage in ends
        ]
        self._append("ended", pa.Table.from_pylist(rows, SCHEMAS["ended"]))

    def _end(self, ids: Sequence[int], status: Status, reason: str) -> None:
        self._append_ends([(i, status, reason, -1, 0.0) for i in ids])

    # ---- leases and moves --------------------------------------------------------------------------------------

    def _moves(self, i: int) -> frozenset[Status]:
        return MOVES[self._index.status(i)]

    def _may_move(self, name: str, attempt: int, status: Status) -> bool:
        i = self._index.ids.get(name)
        if status is Status.PENDING:
            return i is None
        return i is not None and self._index["attempt"][i] == attempt and status in self._moves(i)

    def _stale(self, members: Sequence[int], version: int, bound: int) -> bool:
        oldest = [int(self._index["version"][m]) for m in members]
        return any(then >= 0 and staleness(version, then) > bound for then in oldest)  # no token is never too old

    def _held(self, token: int) -> list[int]:
        """What a lease still holds: not what has moved on, or was claimed by another after it ran out."""
        held = [i for i in self._leases.get(token, ()) if self._index["token"][i] == token]
        if held:
            self._leases[token] = held
        else:
            self._leases.pop(token, None)
        return held

    def _expire(self) -> None:
        now = self._clock()
        for token in list(self._leases):
            held = self._held(token)
            if held and self._index["until"][held[0]] <= now:
                self._index.unlease(held)
                del self._leases[token]

    def _count_claims(self, ids: list[int]) -> list[int]:
        """Those that may be claimed once more; the others have had their chances."""
        claims = self._index["claims"]
        spent = {i for i in ids if claims[i] >= MAX_CLAIMS}
        self._end(sorted(spent), Status.DROPPED_DATA, f"claimed {MAX_CLAIMS} times without a result")
        kept = [i for i in ids if i not in spent]
        self._index["claims"][kept] += 1
        return kept
