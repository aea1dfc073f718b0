"""The replay store: what stands between all stages, and loses nothing.

Invariant: the status of every trajectory is a pure function of the logs. A row in a stage's log *is* the move to that
stage, and so acknowledges the claim on the stage before it in the same commit; ends are rows of the log `ended`.
Leases live in memory only: when the store comes back, everything that was claimed can be claimed again, and of two
puts of the same row the first wins and the second is told `stale`. Nothing here knows of Ray; `actors/store.py` does.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from replay.log import Log
from replay.record import ENDS, MOVES, SCHEMAS, STAGES, TERMINAL, Blob, Status, staleness

FORMAT = 1
MAX_CLAIMS = 5  # a row that was claimed so often without a result takes its workers down: it is dropped
_COLUMN_STAGE = {name: stage for stage in reversed(STAGES) for name in SCHEMAS[stage].names}


class StoreError(RuntimeError):
    """The store cannot be opened or used as asked."""


@dataclass
class Claim:
    """A lease on trajectories. `rows` has one row each, in the order claimed, with the columns asked for."""

    token: int
    trajectories: list[str]
    rows: pa.Table


@dataclass
class _Entry:
    """The index's record of one trajectory."""

    group: str
    purpose: str
    attempt: int
    status: Status
    at: dict[str, tuple[int, int]] = field(default_factory=dict)  # stage -> (batch, row) in its log
    version: int | None = None  # oldest policy version among its tokens
    token: int = 0  # of the lease, 0 without one
    until: float = 0.0
    claims: int = 0
    step: int = -1  # optimiser step that trained it


class Store:
    """A store in a local folder.

    Args:
        root: made if missing; locked while open.
        clock: seconds, monotonic; leases run on it.

    Raises:
        StoreError: it is open elsewhere, or written by a newer format.
    """

    def __init__(self, root: str | Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.root, self._clock = Path(root), clock
        self.root.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.root)
        _check_format(self.root)
        self._logs = {name: Log(self.root / name, schema) for name, schema in SCHEMAS.items()}
        self._tokens = itertools.count(1)
        self._leases: dict[int, dict[str, None]] = {}  # token -> what it still holds
        self._entries: dict[str, _Entry] = {}
        self._groups: dict[str, list[str]] = {}
        self._by_status: dict[Status, dict[str, None]] = {s: {} for s in Status}  # insertion order = oldest first
        self._blobs: dict[str, tuple[int, int]] = {}
        self._replay()

    # ---- verbs -------------------------------------------------------------------------------------------------

    def put(self, stage: str, rows: pa.Table, blobs: Iterable[Blob] = ()) -> list[str]:
        """Append a stage's rows; a row that its trajectory's status does not allow (any more) is left out.

        Args:
            stage: `pending`, `generated`, `rendered` or `scored`.
            rows: columns of `SCHEMAS[stage]`.
            blobs: pictures that the rows refer to; durable before the rows are.

        Returns:
            `ok` or `stale`, one a row.
        """
        status, keys = Status(stage), rows.select(["trajectory", "attempt"]).to_pylist()
        fresh = [self._may_move(key["trajectory"], key["attempt"], status) for key in keys]
        first = {key["trajectory"]: i for i, key in reversed(list(enumerate(keys)))}
        fresh = [ok and first[key["trajectory"]] == i for i, (ok, key) in enumerate(zip(fresh, keys, strict=True))]
        self._put_blobs(blobs)
        if any(fresh):
            kept = rows.filter(pa.array(fresh))
            self._index(stage, self._logs[stage].append(kept))
        return ["ok" if ok else "stale" for ok in fresh]

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
            columns: to be joined into `Claim.rows`.
            by_group: whole groups only. From `scored`: complete groups, of which the scored samples are leased.
            purpose: only rows of this purpose.
            version: the policy's version now; groups older than `max_staleness` versions are queued anew instead.

        Returns:
            None if there is nothing to claim.
        """
        status = Status(stage)
        names: list[str] = []
        taken = 0
        seen: set[str] = set()
        queue = list(self._by_status[status])
        for name in reversed(queue) if newest_first else queue:
            entry = self._entries[name]
            if taken >= limit:
                break
            if entry.group in seen or entry.status is not status or (purpose is not None and entry.purpose != purpose):
                continue
            members = self._members(entry.group, status) if by_group else [name]
            if by_group:
                seen.add(entry.group)
                if not self._complete(entry.group, status):
                    continue
                if version is not None and self._stale(members, version, max_staleness):
                    self._end(members, Status.REQUEUED, f"older than {max_staleness} versions")
                    continue
            if all(self._free(m) for m in members):
                names += self._count_claims(members)
                taken += 1
        if not names:
            return None
        token = next(self._tokens)
        self._lease(names, token, lease_s)
        return Claim(token, names, self.get(names, columns))

    def extend(self, token: int, lease_s: float) -> bool:
        """Prolong a lease; False if nothing of it is held any more."""
        held = self._held(token)
        self._lease(held, token, lease_s)
        return bool(held)

    def ack(
        self, token: int, ends: Mapping[str, tuple[str, str]], step: int = -1, advantages: Mapping[str, float] = {}
    ) -> list[str]:
        """End (or requeue) leased trajectories.

        Args:
            token: of the claim; rows that it no longer holds are left alone.
            ends: trajectory -> (status, reason).
            step: optimiser step, for `trained`.
            advantages: kept with the row, for reports.

        Returns:
            `ok` or `stale`, one an entry of `ends`, in its order.
        """
        held = set(self._held(token))
        fresh = {t: (Status(s), r) for t, (s, r) in ends.items() if t in held and Status(s) in self._moves(t)}
        self._append_ends([(t, s, r, step, advantages.get(t, 0.0)) for t, (s, r) in fresh.items()])
        return ["ok" if t in fresh else "stale" for t in ends]

    def release(self, token: int, trajectories: Sequence[str] | None = None) -> None:
        """Give a lease back (or part of it): the rows can be claimed at once, and the claim is not counted."""
        for name in self._held(token) if trajectories is None else set(trajectories) & set(self._held(token)):
            self._entries[name].claims -= 1
            self._unlease(name)

    def get(self, trajectories: Sequence[str], columns: Sequence[str]) -> pa.Table:
        """Join columns of all stages, one row a trajectory in the order asked for.

        Rows of a stage that a trajectory has not reached are null. `trajectory`, `group` and `attempt` come always.
        """
        names = ["trajectory", "group", "attempt", *(c for c in columns if c not in ("trajectory", "group", "attempt"))]
        parts = {
            "trajectory": pa.array(trajectories, pa.string()),
            "group": pa.array([self._entries[t].group for t in trajectories], pa.string()),
            "attempt": pa.array([self._entries[t].attempt for t in trajectories], pa.int16()),
        }
        wanted: dict[str, list[str]] = {}
        for column in names[3:]:
            wanted.setdefault(_stage_of(column), []).append(column)
        for stage, of_stage in wanted.items():
            parts |= self._gather(stage, of_stage, trajectories)
        return pa.table({name: parts[name] for name in names})

    def blobs(self, names: Iterable[str]) -> dict[str, Blob]:
        """Pictures by SHA-256. Raises KeyError for one that was never put."""
        found = {}
        for name in names:
            batch, row = self._blobs[name]
            rows = self._logs["blobs"][batch]
            found[name] = Blob(rows.column("data")[row].as_py(), rows.column("mime")[row].as_py())
        return found

    def clear(self) -> None:
        """Forget everything, on disk too."""
        for name, log in self._logs.items():
            log.close()
            for path in log.folder.iterdir():
                path.unlink()
            self._logs[name] = Log(log.folder, log.schema)
        self._entries, self._groups, self._blobs = {}, {}, {}
        self._by_status = {s: {} for s in Status}

    # ---- for those who watch -----------------------------------------------------------------------------------

    def rewind(self, step: int) -> int:
        """Void what was trained after optimiser step `step` (the committed one); returns how many came back."""
        void = [t for t in self._by_status[Status.TRAINED] if self._entries[t].step > step]
        self._append_ends([(t, Status.SCORED, f"not committed: trained after step {step}", step, 0.0) for t in void])
        return len(void)

    def counts(self, purpose: str | None = None) -> dict[str, int]:
        """Trajectories by status."""
        entries = (e for e in self._entries.values() if purpose in (None, e.purpose))
        return dict(Counter(e.status.value for e in entries))

    def groups(self, purpose: str) -> dict[str, int]:
        """Groups: `accepted` ever, `ended` (all samples at an end), `trained` (at least one sample trained)."""
        out = Counter(accepted=0, ended=0, trained=0)
        for members in self._groups.values():
            statuses = {self._entries[m].status for m in members}
            if self._entries[members[0]].purpose == purpose:
                out.update(accepted=1, ended=statuses <= ENDS, trained=Status.TRAINED in statuses)
        return dict(out)

    def ends(self, purpose: str) -> dict[str, tuple[str, str]]:
        """Trajectory -> (status, reason) of all that are scored or have ended."""
        reasons: dict[str, str] = {}
        for batch in self._logs["ended"]:
            reasons |= zip(*batch.select(["trajectory", "reason"]).to_pydict().values(), strict=True)
        return {
            t: (e.status.value, reasons.get(t, ""))
            for t, e in self._entries.items()
            if e.purpose == purpose and e.status in TERMINAL
        }

    def lost(self, purpose: str) -> int:
        """Accepted trajectories that neither live on nor ended exactly once, counted in the logs. Must be 0."""
        accepted = {t for t, e in self._entries.items() if e.purpose == purpose}
        ends: Counter[str] = Counter()
        for batch in self._logs["ended"]:
            for row in batch.select(["trajectory", "status"]).to_pylist():
                status = Status(row["status"])
                ends[row["trajectory"]] += status in ENDS
                if status is Status.SCORED:  # a rewind voids the end before it
                    ends[row["trajectory"]] -= 1
        alive = {t for s in STAGES for t in self._by_status[s]}
        return sum((t in alive) + ends[t] != 1 for t in accepted)

    def cursor(self, purpose: str) -> int:
        """The `order` that the next prompt of this purpose gets."""
        return sum(self._entries[m[0]].purpose == purpose for m in self._groups.values())

    def newest_version(self) -> int | None:
        """The newest policy version that any row holds."""
        return max((e.version for e in self._entries.values() if e.version is not None), default=None)

    def find(self, purpose: str, statuses: Iterable[str] | None = None) -> list[str]:
        """Trajectories of a purpose (at these statuses), oldest first."""
        wanted = set(statuses) if statuses is not None else {s.value for s in Status}
        return [t for t, e in self._entries.items() if e.purpose == purpose and e.status.value in wanted]

    def close(self) -> None:
        for log in self._logs.values():
            log.close()
        os.close(self._lock)

    # ---- the index ---------------------------------------------------------------------------------------------

    def _replay(self) -> None:
        for i, batch in enumerate(self._logs["blobs"]):
            self._index_blobs(i, batch.column("sha256").to_pylist())
        for i in range(len(self._logs[Status.PENDING])):
            self._index(Status.PENDING, i)
        for batch in self._logs["ended"]:  # first the requeues: they tell which attempt of a trajectory counts
            self._index_ends(batch.filter(pc.equal(batch.column("status"), Status.REQUEUED)))
        for stage in STAGES[1:]:
            for i in range(len(self._logs[stage])):
                self._index(stage, i)
        for batch in self._logs["ended"]:
            self._index_ends(batch.filter(pc.not_equal(batch.column("status"), Status.REQUEUED)))

    def _index(self, stage: str, i: int) -> None:
        batch, status = self._logs[stage][i], Status(stage)
        columns = ["trajectory", "group", "attempt"] + (["purpose"] if stage == Status.PENDING else [])
        for row, key in enumerate(batch.select(columns).to_pylist()):
            name = key["trajectory"]
            if status is Status.PENDING:
                if name not in self._entries:
                    self._groups.setdefault(key["group"], []).append(name)
                self._entries[name] = _Entry(key["group"], key["purpose"], key["attempt"], status)
                self._by_status[status][name] = None
            entry = self._entries[name]
            if key["attempt"] != entry.attempt and status is not Status.PENDING:
                continue
            entry.at[stage] = (i, row)
            if stage == Status.GENERATED:
                entry.version = min(batch.column("versions")[row].values.to_pylist(), default=0)
            self._move(name, status)

    def _index_ends(self, batch: pa.RecordBatch) -> None:
        for row in batch.select(["trajectory", "attempt", "status", "step"]).to_pylist():
            name, status = row["trajectory"], Status(row["status"])
            entry = self._entries[name]
            if row["attempt"] != entry.attempt:
                continue
            entry.step = row["step"]
            if status is Status.REQUEUED:
                entry.attempt += 1
                entry.at, entry.version = {"pending": entry.at["pending"]}, None
                status = Status.PENDING
            self._move(name, status)

    def _move(self, name: str, status: Status) -> None:
        entry = self._entries[name]
        self._by_status[entry.status].pop(name, None)
        self._by_status[status][name] = None
        entry.status, entry.claims = status, 0
        self._unlease(name)

    # ---- helpers -----------------------------------------------------------------------------------------------

    def _moves(self, name: str) -> frozenset[Status]:
        return MOVES[self._entries[name].status]

    def _may_move(self, name: str, attempt: int, status: Status) -> bool:
        if status is Status.PENDING:
            return name not in self._entries
        entry = self._entries.get(name)
        return entry is not None and entry.attempt == attempt and status in MOVES[entry.status]

    def _members(self, group: str, status: Status) -> list[str]:
        return [m for m in self._groups[group] if self._entries[m].status is status]

    def _complete(self, group: str, status: Status) -> bool:
        return status is not Status.SCORED or all(self._entries[m].status in TERMINAL for m in self._groups[group])

    def _stale(self, members: Sequence[str], version: int, bound: int) -> bool:
        return any(staleness(version, self._entries[m].version or 0) > bound for m in members)

    def _free(self, name: str) -> bool:
        entry = self._entries[name]
        return not entry.token or entry.until <= self._clock()

    def _held(self, token: int) -> list[str]:
        return list(self._leases.get(token, ()))

    def _lease(self, names: Sequence[str], token: int, lease_s: float) -> None:
        for name in names:
            self._unlease(name)
            self._leases.setdefault(token, {})[name] = None
            self._entries[name].token, self._entries[name].until = token, self._clock() + lease_s

    def _unlease(self, name: str) -> None:
        entry = self._entries[name]
        held = self._leases.get(entry.token, {})
        held.pop(name, None)
        if not held:
            self._leases.pop(entry.token, None)
        entry.token = 0

    def _count_claims(self, members: Sequence[str]) -> list[str]:
        """Those of `members` that may be claimed once more; the others have had their chances."""
        spent = [m for m in members if self._entries[m].claims >= MAX_CLAIMS]
        self._end(spent, Status.DROPPED_DATA, f"claimed {MAX_CLAIMS} times without a result")
        for m in members:
            self._entries[m].claims += 1
        return [m for m in members if m not in spent]

    def _end(self, names: Sequence[str], status: Status, reason: str) -> None:
        self._append_ends([(n, status, reason, -1, 0.0) for n in names])

    def _append_ends(self, ends: Sequence[tuple[str, Status, str, int, float]]) -> None:
        if not ends:
            return
        rows = [
            {
                "trajectory": name,
                "group": self._entries[name].group,
                "attempt": self._entries[name].attempt,
                "turn": 0,
                "status": status.value,
                "reason": reason,
                "step": step,
                "advantage": advantage,
            }
            for name, status, reason, step, advantage in ends
        ]
        log = self._logs["ended"]
        self._index_ends(log[log.append(pa.Table.from_pylist(rows, SCHEMAS["ended"]))])

    def _put_blobs(self, blobs: Iterable[Blob]) -> None:
        new = {b.sha256: b for b in blobs if b.sha256 not in self._blobs}
        if new:
            rows = [{"sha256": sha, "mime": b.mime, "data": b.data} for sha, b in new.items()]
            self._index_blobs(self._logs["blobs"].append(pa.Table.from_pylist(rows, SCHEMAS["blobs"])), new)

    def _index_blobs(self, batch: int, names: Iterable[str]) -> None:
        self._blobs |= {sha: (batch, row) for row, sha in enumerate(names)}

    def _gather(self, stage: str, columns: Sequence[str], trajectories: Sequence[str]) -> dict[str, Any]:
        log, schema = self._logs[stage], pa.schema([SCHEMAS[stage].field(c) for c in columns])
        empty = pa.RecordBatch.from_pylist([dict.fromkeys(columns)], schema)
        places = [self._entries[t].at.get(stage) for t in trajectories]
        rows = [log[at[0]].select(columns).slice(at[1], 1) if at else empty for at in places]
        table = pa.Table.from_batches(rows, schema).combine_chunks()
        return {c: table.column(c) for c in columns}


def _stage_of(column: str) -> str:
    if column not in _COLUMN_STAGE:
        raise StoreError(f"no stage has a column {column!r}; there are {', '.join(sorted(_COLUMN_STAGE))}")
    return _COLUMN_STAGE[column]


def _lock(root: Path) -> int:
    fd = os.open(root / "LOCK", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(fd, 200).decode() or "another process"
        os.close(fd)
        raise StoreError(f"the store {root} is open in {owner}; stop it first, or use another folder") from None
    os.ftruncate(fd, 0)
    os.write(fd, f"process {os.getpid()}".encode())
    return fd


def _check_format(root: Path) -> None:
    path = root / "FORMAT"
    if not path.exists():
        path.write_text(json.dumps({"format": FORMAT}))
    if (found := json.loads(path.read_text())["format"]) > FORMAT:
        raise StoreError(f"the store {root} has format {found}, this llmi reads up to {FORMAT}; use a newer llmi")
