"""An append-only log of Arrow record batches: one folder, numbered segments.

The open segment is an Arrow *stream* (`N.arrows`), because a torn tail there costs only the batch that was being
written; a full one is sealed into an Arrow *file* (`N.arrow`), which readers memory-map. An `append` that returned is
on disk (fsync). A process that dies leaves an open segment behind; the next `Log` on that folder reads what is whole
in it and seals that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

SEGMENT_BYTES = 64 << 20


class Log:
    """One stage's log. Not thread-safe: one writer, in one process (`replay.store` holds the lock).

    Args:
        folder: made if missing.
        schema: of every batch.
        segment_bytes: an open segment is sealed when it is larger.
    """

    def __init__(self, folder: Path, schema: pa.Schema, segment_bytes: int = SEGMENT_BYTES) -> None:
        self.folder, self.schema, self.segment_bytes = folder, schema, segment_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self._batches: list[pa.RecordBatch] = []
        self._sealed = 0  # batches of `_batches` that come from sealed segments
        for torn in sorted(folder.glob("*.tmp")):
            torn.unlink()
        for path in sorted(folder.glob("*.arrow")):
            self._map(path)
        for path in sorted(folder.glob("*.arrows")):  # at most one, and the newest
            self._recover(path)
        self._number = 1 + max((int(p.stem) for p in folder.glob("*.arrow")), default=-1)
        self._file: Any = None
        self._writer: Any = None

    def append(self, table: pa.Table) -> int:
        """Make rows durable as one batch; returns its index. All of it is kept, or (after a crash) none of it."""
        [batch] = table.select(self.schema.names).cast(self.schema).combine_chunks().to_batches()
        if self._writer is None:
            self._file = open(self.folder / f"{self._number:08d}.arrows", "wb")  # noqa: SIM115
            self._writer = pa.ipc.new_stream(self._file, self.schema)
        self._writer.write_batch(batch)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._batches.append(batch)
        index = len(self._batches) - 1
        if self._file.tell() >= self.segment_bytes:
            self.seal()
        return index

    def __getitem__(self, index: int) -> pa.RecordBatch:
        return self._batches[index]

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)

    def seal(self) -> None:
        """Turn the open segment into a memory-mapped file; its rows leave this process's memory."""
        if self._writer is None:
            return
        self._writer.close()
        self._file.close()
        stream = Path(self._file.name)
        self._file = self._writer = None
        open_batches, self._batches = self._batches[self._sealed :], self._batches[: self._sealed]
        self._seal(stream, open_batches)
        self._number += 1

    close = seal

    def _seal(self, stream: Path, batches: list[pa.RecordBatch]) -> None:
        path, tmp = stream.with_suffix(".arrow"), stream.with_suffix(".tmp")
        with open(tmp, "wb") as f, pa.ipc.new_file(f, self.schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
            writer.close()
            f.flush()
            os.fsync(f.fileno())
        os.rename(tmp, path)
        _fsync_folder(self.folder)
        stream.unlink()
        self._map(path)

    def _map(self, path: Path) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batches += [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._sealed = len(self._batches)

    def _recover(self, stream: Path) -> None:
        if not stream.with_suffix(".arrow").exists():
            self._seal(stream, list(_whole_batches(stream)))
        else:  # died between the rename and the unlink
            stream.unlink()


def _whole_batches(stream: Path) -> Iterator[pa.RecordBatch]:
    try:
        with pa.OSFile(str(stream)) as f, pa.ipc.open_stream(f) as reader:
            yield from reader
    except (pa.ArrowInvalid, OSError):  # the torn tail of a writer that died; `append` never returned for it
        return


def _fsync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
