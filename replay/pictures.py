"""Pictures as a batch of the log `blobs`, whose bytes stay where they lie until they are written: pictures of a put are
megabytes, and to copy them into one buffer first takes more than half of the time of writing them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from replay.record import SCHEMAS, Blob


def reserved(blobs: Sequence[Blob]) -> tuple[pa.Table, list[bytes]]:
    """Rows of `SCHEMAS["blobs"]`, with a last buffer that is as long as all pictures and holds nothing yet; and the
    pictures that belong there.
    """
    parts = [b.data for b in blobs]
    ends = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(np.empty(ends[-1], np.uint8))]
    column = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(parts), buffers)
    names, mimes = (pa.array(values, pa.string()) for values in ([b.sha256 for b in blobs], [b.mime for b in blobs]))
    return pa.table([names, mimes, column], schema=SCHEMAS["blobs"]), parts


def filled(batch: pa.RecordBatch, parts: Sequence[bytes]) -> pa.RecordBatch:
    """The batch, with the parts where their place was reserved."""
    if parts:
        whole, at = np.frombuffer(last_buffer(batch), np.uint8), 0
        for part in parts:
            whole[at : at + len(part)] = np.frombuffer(part, np.uint8)
            at += len(part)
    return batch


def last_buffer(batch: pa.RecordBatch) -> pa.Buffer:
    return batch.columns[-1].buffers()[-1]
