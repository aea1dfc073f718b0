"""What the store keeps in memory of every trajectory: columns, not objects, so that a million open in seconds.

Everything here is a pure function of the logs: the same `apply` serves an append of one row and the opening of a store
with millions. Leases alone are of this process.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from replay.record import ENDS, STAGES, TERMINAL, Status

STATUSES = list(Status)
_CODE = {status: code for code, status in enumerate(STATUSES)}
#: by status code
_IS_END = np.array([s in ENDS for s in STATUSES])
_IS_TERMINAL = np.array([s in TERMINAL for s in STATUSES])
_TRAINED = _CODE[Status.TRAINED]

_FIELDS: dict[str, type] = {
    "group": np.int32,
    "purpose": np.int16,
    "status": np.uint8,
    "attempt": np.int16,
    "version": np.int64,  # oldest policy version among its tokens, -1 if there are none (yet)
    "step": np.int64,  # optimiser step that trained it, -1 if none
    "claims": np.uint8,
    "token": np.int64,  # of the lease, 0 without one
    "until": np.float64,
    **dict.fromkeys((*STAGES, "ended"), np.int64),  # place in the log: batch << 32 | row, -1 before it is there
}
_EMPTY = {"version": -1, "step": -1, "ended": -1} | dict.fromkeys(STAGES, -1)


class _Columns:
    """Arrays of equal length that grow together."""

    def __init__(self, fields: dict[str, type], empty: dict[str, int]) -> None:
        self.length, self._empty = 0, empty
        self.of: dict[str, np.ndarray] = {name: np.empty(0, dtype) for name, dtype in fields.items()}

    def grow(self, n: int) -> np.ndarray:
        """Append `n` empty entries; returns their numbers."""
        old, self.length = self.length, self.length + n
        for name, column in self.of.items():
            if self.length > len(column):
                self.of[name] = np.resize(column, max(self.length, 2 * len(column), 1024))
            self.of[name][old : self.length] = self._empty.get(name, 0)
        return np.arange(old, self.length)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.of[name]


class Index:
    """Numbers trajectories, groups and purposes as they come, and knows where each trajectory stands.

    Attributes:
        ids: trajectory -> its number.
        names: number -> trajectory.
        queues: status -> trajectories that stand there and are free, oldest first (only statuses that can be claimed).
    """

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}
        self.names: list[str] = []
        self.groups: dict[str, int] = {}
        self.members: list[list[int]] = []
        self.purposes: dict[str, int] = {}
        self.queues: dict[Status, OrderedDict[int, None]] = {s: OrderedDict() for s in STAGES}
        self._rows = _Columns(_FIELDS, _EMPTY)
        self._of_group = _Columns(dict.fromkeys(("purpose", "open", "unfinished", "trained"), np.int32), {})
        self._counts = np.zeros((0, len(STATUSES)), np.int64)
        self._bulk = False

    def __getitem__(self, column: str) -> np.ndarray:
        """A column of `_FIELDS`, indexed by trajectory number."""
        return self._rows[column]

    def status(self, i: int) -> Status:
        return STATUSES[self._rows["status"][i]]

    def group_name(self, i: int) -> str:
        return self.names[i].rpartition("/")[0]

    def siblings(self, i: int) -> list[int]:
        """The members of a trajectory's group, itself included."""
        return self.members[self._rows["group"][i]]

    def complete(self, i: int) -> bool:
        """Whether all samples of the group are scored or have ended."""
        return not self._of_group["unfinished"][self._rows["group"][i]]

    # ---- following the logs ------------------------------------------------------------------------------------

    def bulk(self, on: bool) -> None:
        """While on, counts and queues are not kept; they are made once at the end."""
        self._bulk = on
        if not on:
            self._recount()

    def accept(self, rows: pa.RecordBatch | pa.Table, places: np.ndarray) -> None:
        """Rows of the log `pending`; a trajectory that is there already stays as it is."""
        names = rows.column("trajectory").to_pylist()
        new = [k for k, name in enumerate(names) if name not in self.ids]
        if len(new) < len(names) or len(set(names)) < len(names):
            firsts = {names[k]: k for k in reversed(new)}
            new = sorted(firsts.values())
            rows, places, names = rows.take(pa.array(new, pa.int64())), places[new], [names[k] for k in new]
        ids = self._rows.grow(len(names))
        self.names += names
        self.ids.update(zip(names, ids.tolist(), strict=True))
        purpose = self._coded(rows.column("purpose"), self.purposes)
        self._rows["purpose"][ids], self._rows["attempt"][ids] = purpose, rows.column("attempt").to_numpy(False)
        self._rows[Status.PENDING][ids] = places
        group = self._coded(rows.column("group"), self.groups)
        self._rows["group"][ids] = group
        self._of_group.grow(len(self.groups) - self._of_group.length)
        self._of_group["purpose"][group] = purpose
        self.members += [[] for _ in range(len(self.groups) - len(self.members))]
        for i, g in zip(ids.tolist(), group.tolist(), strict=True):
            self.members[g].append(i)
        missing = len(self.purposes) - len(self._counts)
        self._counts = np.pad(self._counts, ((0, missing), (0, 0)))
        if not self._bulk:
            np.add.at(self._counts[:, _CODE[Status.PENDING]], purpose, 1)
            np.add.at(self._of_group["open"], group, 1)
            np.add.at(self._of_group["unfinished"], group, 1)
            self.queues[Status.PENDING].update(dict.fromkeys(ids.tolist()))

    def reach(self, stage: Status, rows: pa.RecordBatch | pa.Table, places: np.ndarray) -> None:
        """Rows of a later stage's log. Those of an attempt that was given up count for nothing."""
        ids = self.numbers(rows.column("trajectory").to_pylist())
        counts = (ids >= 0) & (rows.column("attempt").to_numpy(False) == self._rows["attempt"][ids])
        ids, places = ids[counts], places[counts]
        self._rows[stage][ids] = places
        if stage is Status.GENERATED:
            self._rows["version"][ids] = _oldest(rows.column("versions"))[counts]
        self._move(ids, np.full(len(ids), _CODE[stage], np.uint8))

    def end(self, rows: pa.RecordBatch | pa.Table, places: np.ndarray) -> None:
        """Rows of the log `ended`, requeues among them; the last row of a trajectory's attempt counts."""
        ids = self.numbers(rows.column("trajectory").to_pylist())
        status = np.array([_CODE[Status(s)] for s in rows.column("status").to_pylist()], np.uint8)
        attempt, step = rows.column("attempt").to_numpy(False), rows.column("step").to_numpy(False)
        requeued = status == _CODE[Status.REQUEUED]
        known = ids >= 0
        again = ids[requeued & known & (attempt == self._rows["attempt"][ids])]
        current = known & ~requeued & (attempt == self._rows["attempt"][ids])
        self._rows["step"][ids[current]], self._rows["ended"][ids[current]] = step[current], places[current]
        self._move(ids[current], status[current])
        if len(again):
            self._rows["attempt"][again] += 1
            self._rows["version"][again] = -1
            for log in (*STAGES[1:], "ended"):
                self._rows[log][again] = -1
            self._move(again, np.full(len(again), _CODE[Status.PENDING], np.uint8))

    def attempts(self, rows: pa.RecordBatch | pa.Table) -> None:
        """Bulk only, before any other stage: which attempt of each trajectory the log `ended` leaves as the current."""
        ids = self.numbers(rows.column("trajectory").to_pylist())
        again = (ids >= 0) & np.array([s == Status.REQUEUED for s in rows.column("status").to_pylist()], bool)
        np.maximum.at(self._rows["attempt"], ids[again], rows.column("attempt").to_numpy(False)[again] + 1)

    def numbers(self, names: Sequence[str]) -> np.ndarray:
        """Trajectories -> their numbers, -1 for those unknown."""
        find = self.ids.get
        return np.fromiter((find(name, -1) for name in names), np.int64, len(names))

    # ---- leases ------------------------------------------------------------------------------------------------

    def lease(self, ids: Sequence[int], token: int, until: float) -> None:
        self._rows["token"][ids], self._rows["until"][ids] = token, until
        for i in ids:
            self.queues[self.status(i)].pop(i, None)

    def unlease(self, ids: Sequence[int]) -> None:
        """Back to the front of the queue, in the old order."""
        self._rows["token"][ids] = 0
        for i in sorted(ids, reverse=True):
            if (queue := self.queues.get(self.status(i))) is not None:
                queue[i] = None
                queue.move_to_end(i, last=False)

    # ---- counts ------------------------------------------------------------------------------------------------

    def counts(self, purpose: str | None) -> dict[str, int]:
        """Trajectories by status."""
        if purpose is not None and not self._has(purpose):
            return {}
        totals = self._counts.sum(axis=0) if purpose is None else self._counts[self.purposes[purpose]]
        return {STATUSES[code].value: int(n) for code, n in enumerate(totals) if n}

    def group_counts(self, purpose: str) -> Counter[str]:
        """Groups: `accepted`, `ended` (all samples at an end), `trained` (at least one sample trained)."""
        if not self._has(purpose):
            return Counter(accepted=0, ended=0, trained=0)
        n = self._of_group.length
        mine = self._of_group["purpose"][:n] == self.purposes[purpose]
        ended = mine & (self._of_group["open"][:n] == 0)
        trained = mine & (self._of_group["trained"][:n] > 0)
        return Counter(accepted=int(mine.sum()), ended=int(ended.sum()), trained=int(trained.sum()))

    def find(self, purpose: str | None, statuses: Iterable[str] | None = None) -> list[str]:
        """Trajectories of a purpose (None: of all), oldest first."""
        if purpose is not None and not self._has(purpose):
            return []
        n = self._rows.length
        mine = np.ones(n, bool) if purpose is None else self._rows["purpose"][:n] == self.purposes[purpose]
        if statuses is not None:
            mine &= np.isin(self._rows["status"][:n], [_CODE[Status(s)] for s in statuses])
        return [name for i in np.nonzero(mine)[0].tolist() if (name := self.names[i])]

    def alive(self) -> np.ndarray:
        """By number: whether the trajectory still stands at a stage (and was not forgotten)."""
        return ~_IS_END[self._rows["status"][: self._rows.length]]

    def running(self, purpose: str) -> int:
        """Groups of which a sample is neither scored nor has ended."""
        n = self._of_group.length
        mine = self._of_group["purpose"][:n] == self.purposes.get(purpose, -1)
        return int(np.sum(mine & (self._of_group["unfinished"][:n] > 0)))

    def _has(self, purpose: str) -> bool:
        return purpose in self.purposes

    def _move(self, ids: np.ndarray, codes: np.ndarray) -> None:
        if self._bulk:
            self._rows["status"][ids] = codes
            return
        if len(ids) > 1 and len(np.unique(ids)) < len(ids):  # the last row of each counts
            last = {i: k for k, i in enumerate(ids.tolist())}
            ids, codes = ids[list(last.values())], codes[list(last.values())]
        old, purpose, group = self._rows["status"][ids], self._rows["purpose"][ids], self._rows["group"][ids]
        for i, was in zip(ids.tolist(), old.tolist(), strict=True):
            if (queue := self.queues.get(STATUSES[was])) is not None:
                queue.pop(i, None)
        for change, of in ((-1, old), (1, codes)):
            np.add.at(self._counts, (purpose, of), change)
            for name, flags in (("open", ~_IS_END), ("unfinished", ~_IS_TERMINAL)):
                np.add.at(self._of_group[name], group, change * flags[of])
            np.add.at(self._of_group["trained"], group, change * (of == _TRAINED))
        self._rows["status"][ids], self._rows["claims"][ids], self._rows["token"][ids] = codes, 0, 0
        for i, now in zip(ids.tolist(), codes.tolist(), strict=True):
            if (queue := self.queues.get(STATUSES[now])) is not None:
                queue[i] = None

    def _recount(self) -> None:
        n, groups = self._rows.length, self._of_group.length
        status, group, purpose = (self._rows[name][:n] for name in ("status", "group", "purpose"))
        self._counts[:] = 0
        np.add.at(self._counts, (purpose, status), 1)
        for name, flags in (("open", ~_IS_END), ("unfinished", ~_IS_TERMINAL), ("trained", _codes_flag(_TRAINED))):
            self._of_group[name][:groups] = np.bincount(group, flags[status], groups)
        for stage, queue in self.queues.items():
            here = np.nonzero(status == _CODE[stage])[0]
            queue.clear()
            queue.update(dict.fromkeys(here[np.argsort(self._rows[stage][here], kind="stable")].tolist()))

    def _coded(self, column: pa.Array | pa.ChunkedArray, codes: dict[str, int]) -> np.ndarray:
        """Strings -> numbers, new ones added to `codes`."""
        whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        encoded = whole.dictionary_encode()
        of = [codes.setdefault(value, len(codes)) for value in encoded.dictionary.to_pylist()]
        return np.array(of, np.int64)[encoded.indices.to_numpy(zero_copy_only=False)]


def _codes_flag(code: int) -> np.ndarray:
    flags = np.zeros(len(STATUSES), bool)
    flags[code] = True
    return flags


def _oldest(versions: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """The smallest number in each list; -1 for an empty or missing one."""
    chunks = versions.chunks if isinstance(versions, pa.ChunkedArray) else [versions]
    out = []
    for chunk in chunks:
        lengths = chunk.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        least = np.full(len(chunk), -1, np.int64)
        if lengths.any():
            values = chunk.flatten().to_numpy(zero_copy_only=False)
            filled = lengths > 0
            starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])[filled]
            least[filled] = np.minimum.reduceat(values, starts)
        out.append(least)
    return np.concatenate(out) if out else np.zeros(0, np.int64)
