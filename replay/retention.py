"""Retention: which finished groups go, and how their rows leave the logs.

Only groups of training that have ended, by a step that is committed, ever go; evaluations stay, because reports are
made of them. Whole groups go from all logs at once, oldest first; pictures go with the last row that names them. Files
are deleted only one collection later, so that a reader that has just read the manifest finds what it names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from replay.index import Index
from replay.log import Log
from replay.record import STAGES

#: A segment of pictures is written anew when at most this share of its bytes is still needed.
_WORTH_KEEPING = 0.5


@dataclass(frozen=True)
class Retention:
    """What a store may keep of finished groups.

    Attributes:
        max_bytes: of all segments together; None for no limit.
        max_age_s: seconds since a group ended; None for no limit.
    """

    max_bytes: int | None = None
    max_age_s: float | None = None


def finished(index: Index, ended: Log, committed_step: int) -> list[tuple[float, list[int]]]:
    """(when it ended in unix seconds, members) of each group of training that has ended for good, oldest first."""
    times = np.zeros(len(index.names))
    for _, batch in ended:
        ids = index.numbers(batch.column("trajectory").to_pylist())
        np.maximum.at(times, ids[ids >= 0], batch.column("time").to_numpy(zero_copy_only=False)[ids >= 0])
    alive, steps = index.alive(), index["step"]
    train = index.purposes.get("train", -1)
    return [
        (float(times[members].max()), members)
        for members in index.members
        if members
        and index["purpose"][members[0]] == train
        and not alive[members].any()
        and (steps[members] <= committed_step).all()
    ]


def chosen(
    groups: list[tuple[float, list[int]]], accepted: int, stored: int, limit: Retention, now: float
) -> list[list[int]]:
    """Members of the groups that go.

    Args:
        groups: of `finished`.
        accepted: groups in the store.
        stored: bytes of all segments.
        now: unix seconds.
    """
    excess = max(0, stored - limit.max_bytes) if limit.max_bytes is not None else 0
    by_size = -(-excess * accepted // max(stored, 1))
    too_old = [limit.max_age_s is not None and now - ended > limit.max_age_s for ended, _ in groups]
    return [members for k, (_, members) in enumerate(groups) if k < by_size or too_old[k]]


def remove(logs: dict[str, Log], gone: set[str]) -> None:
    """Take all rows of these trajectories out of the sealed segments, and pictures that no row names any more."""
    names = pa.array(sorted(gone), pa.string())
    for name in (*STAGES, "ended"):
        _rewrite(logs[name], lambda b: pc.invert(pc.is_in(b.column("trajectory"), value_set=names)), 1.0)
    needed = pa.array(sorted(pictures((b for _, b in logs["pending"]), (b for _, b in logs["rendered"]))), pa.string())
    _rewrite(logs["blobs"], lambda b: pc.is_in(b.column("sha256"), value_set=needed), _WORTH_KEEPING)


def compress_cold(logs: dict[str, Log], index: Index) -> None:
    """Compress the segments in which no row can be claimed any more. Pictures are compressed by themselves."""
    alive = index.alive()
    for name in (*STAGES, "ended"):
        for segment in [s for s in logs[name].state.segments if not s.file.startswith("z-")]:
            batches = (logs[name][i] for i in logs[name].ids(segment))
            numbers = [index.numbers(b.column("trajectory").to_pylist()) for b in batches]
            if not any(alive[n[n >= 0]].any() for n in numbers):
                logs[name].compress(segment)


def _rewrite(log: Log, keep: Callable[[pa.RecordBatch], pa.Array], below: float) -> None:
    """Filter a log's segments; one of which more than the share `below` stays is left as it is."""
    for segment in list(log.state.segments):
        batches = [log[i] for i in log.ids(segment)]
        kept = [batch.filter(keep(batch)) for batch in batches]
        left, size = sum(b.nbytes for b in kept), sum(b.nbytes for b in batches)
        if sum(b.num_rows for b in kept) == segment.rows or left > below * size:
            continue
        log.replace(segment, [b for b in kept if b.num_rows])


def pictures(pending: Iterable[pa.RecordBatch], rendered: Iterable[pa.RecordBatch]) -> set[str]:
    """SHA-256 of every picture that rows of these logs name."""
    given = (b.column("given").flatten() for b in pending)
    made = (pc.struct_field(b.column("calls").flatten(), "images").flatten() for b in rendered)
    return {name for names in (*given, *made) for name in names.to_pylist()}
