"""One table out of the rows that trajectories have in the logs of all stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from replay.index import Index
from replay.log import Log
from replay.record import SCHEMAS, STAGES
from replay.storage import StoreError

_KEYS = ("trajectory", "group", "attempt")
_LOGS = (*STAGES, "ended")
_LOG_OF = {name: log for log in reversed(_LOGS) for name in SCHEMAS[log].names}


def joined(index: Index, logs: Mapping[str, Log], ids: Sequence[int], columns: Sequence[str]) -> pa.Table:
    """Columns of all stages, one row a trajectory in the order of `ids`; null where it has not reached a stage.

    Args:
        ids: numbers of trajectories in the index.
        columns: `COLUMN`, of the first stage that has it, or `LOG.COLUMN`.

    Raises:
        StoreError: there is no such column.
    """
    parts: dict[str, Any] = {
        "trajectory": pa.array([index.names[i] for i in ids], pa.string()),
        "group": pa.array([index.group_name(i) for i in ids], pa.string()),
        "attempt": pa.array(index["attempt"][list(ids)], pa.int16()),
    }
    order = [*_KEYS, *(c for c in columns if c not in _KEYS)]
    wanted: dict[str, dict[str, str]] = {}
    for asked in order[len(_KEYS) :]:
        log, column = _place_of(asked)
        wanted.setdefault(log, {})[asked] = column
    for log, of_log in wanted.items():
        found = _gather(logs[log], of_log.values(), index[log][list(ids)])
        parts |= {asked: found[column] for asked, column in of_log.items()}
    return pa.table({name: parts[name] for name in order})


def field(asked: str) -> pa.Field:
    """What `joined` gives for a column."""
    log, column = _place_of(asked)
    return SCHEMAS[log].field(column)


def _place_of(asked: str) -> tuple[str, str]:
    """The log and the column of it that are meant."""
    log, dot, column = asked.rpartition(".")
    log = log if dot else _LOG_OF.get(asked, "")
    if log not in _LOGS or column not in SCHEMAS[log].names:
        raise StoreError(f"no stage has a column {asked!r}; there are {', '.join(sorted(_LOG_OF))}")
    return log, column


def _gather(log: Log, columns: Iterable[str], places: np.ndarray) -> pa.Table:
    """Columns at `places` of a log (batch << 32 | row), in their order; null where a place is -1."""
    names = list(dict.fromkeys(columns))
    schema = pa.schema([log.schema.field(c) for c in names])
    batches, order = [], []
    for batch in np.unique(places >> 32):
        at = np.nonzero(places >> 32 == batch)[0]
        if batch < 0:
            batches.append(pa.RecordBatch.from_pylist([dict.fromkeys(names)] * len(at), schema))
        else:
            batches.append(_rows(log[int(batch)].select(names), places[at] & 0xFFFFFFFF))
        order.append(at)
    table = pa.Table.from_batches(batches, schema)
    if len(batches) > 1:
        back = np.argsort(np.concatenate(order), kind="stable")
        table = table.combine_chunks()
        if not np.array_equal(back, np.arange(len(back))):
            table = table.take(pa.array(back))
    return table


def _rows(batch: pa.RecordBatch, rows: np.ndarray) -> pa.RecordBatch:
    """Rows of a batch; neighbours are a slice, without a copy."""
    if len(rows) and np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
        return batch.slice(int(rows[0]), len(rows))
    return batch.take(pa.array(rows, pa.int64()))
