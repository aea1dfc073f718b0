"""An append-only log of Arrow record batches, in numbered segments.

In a local folder the newest segment is open: `N.arrows`, the 8 magic bytes of an Arrow file and then an Arrow stream,
which grows by one batch an append. Sealing writes the footer and renames it to `N.arrow`; nothing is copied. Beside an
open segment lies `N.crc`, a line "end CRC-32" for each append. In a bucket nothing can grow: each append is a sealed
segment, and small ones are merged later.

An `append` that returned is durable. A torn tail (no append returned for it) is cut off by the next opening; damage
anywhere else is an error that names the file.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from isal.isal_zlib import crc32  # zlib.crc32, ten times as fast

from replay.manifest import LogState, Segment
from replay.pictures import filled, last_buffer
from replay.storage import LocalStorage, Storage, StoreError, sync_folder, taken_over

SEGMENT_BYTES = 64 << 20
#: Sealed segments of a bucket's log that were not merged yet, at most.
SMALL_SEGMENTS = 64
#: Bytes that a segment is given in one write.
_PIECE = 1 << 20
#: Linux has it; its flag `SYNC_FILE_RANGE_WRITE`.
_sync_file_range, _WRITE = getattr(ctypes.CDLL(None), "sync_file_range", None), 2
_MAGIC = b"ARROW1\0\0"
_NUMBERED = re.compile(r"(\d{8})\.(arrow|arrows)")
_ZSTD = pa.ipc.IpcWriteOptions(compression="zstd")


class Log:
    """One log of a store. Not thread-safe.

    Batches have ids, counted from 0 since the log was opened; they stay valid until `drop`.

    Args:
        storage: of the store.
        name: of the log, its folder.
        schema: of every batch.
        state: what the manifest knows; brought up to date here, for the store to commit.
        read_only: leave everything as it lies.
        check: compare sealed segments with their checksums.

    Raises:
        StoreError: a segment is missing, cut short or damaged.
    """

    def __init__(
        self,
        storage: Storage,
        name: str,
        schema: pa.Schema,
        state: LogState,
        read_only: bool = False,
        check: bool = True,
    ) -> None:
        self.name, self.schema, self.state, self._storage = name, schema, state, storage
        self._batches: dict[int, Callable[[], pa.RecordBatch]] = {}
        self._of: dict[str, list[int]] = {}  # segment's file -> ids of its batches
        self._next_id = 0
        self._open: _Open | None = None
        self.full = False
        sizes = {f.name: f.size for f in storage.files(name)}
        for segment in state.segments:
            if sizes.get(segment.file) != segment.bytes:
                lies = f"has {sizes[segment.file]} bytes" if segment.file in sizes else "is missing"
                raise StoreError(
                    f"segment {storage.url}/{name}/{segment.file} {lies}, the manifest says {segment.bytes} bytes; "
                    "restore it from a copy"
                )
            if check:
                self._check(segment)
            self._map(segment)
        newer = sorted(f for f in sizes if (m := _NUMBERED.fullmatch(f)) and int(m[1]) >= state.next)
        for file in newer:
            if file.endswith("s") and file[:-1] in sizes:  # died while recovering it: the sealed one is whole
                if not read_only:
                    self._remove_open(file)
            elif read_only:
                self._read_new(file)
            else:
                self._take_up(file)

    # ---- writing -----------------------------------------------------------------------------------------------

    def append(self, table: pa.Table, parts: Sequence[bytes] = ()) -> tuple[int, pa.RecordBatch]:
        """Make rows durable as one batch; returns it and its id. All of it is kept, or (after a crash) none of it.

        Args:
            table: the rows.
            parts: what the table's last buffer stands for (`replay.pictures`).

        Raises:
            StoreError: the disk or the service refused, now or before the last `mend`; nothing of it is kept.
        """
        if not table.schema.equals(self.schema):
            table = table.select(self.schema.names).cast(self.schema)
        [batch] = table.combine_chunks().to_batches()
        if isinstance(self._storage, LocalStorage):
            file, start = self._grow(self._storage.root / self.name, batch, parts)
            return self._add(functools.partial(self._of_open, file, start)), batch
        self._create(f"{self.state.next:08d}.arrow", [filled(batch, parts)])
        self.full = len(self._small()) >= SMALL_SEGMENTS
        return self._next_id - 1, batch

    def mend(self) -> None:
        """Seal a torn segment from memory. Nothing can be appended before, so that numbers stay in the order of rows.

        Raises:
            StoreError: the disk refuses still.
        """
        if self._open is None or not self._open.torn:
            return
        file = self._open.path.name
        if ids := self._of[file]:
            batches = [self[i] for i in ids]
            data = self._complete(file, batches)
            self._adopt(Segment(file[:-1], self._open.rows, len(data), crc32(data), 0), ids)
        del self._of[file]
        self._open = None
        self._remove_open(file)

    def seal(self) -> None:
        """Close the open segment, or merge small ones; the store then commits a manifest."""
        self.full = False
        if isinstance(self._storage, LocalStorage):
            with contextlib.suppress(StoreError):  # a full disk: the rows are safe where they are
                self.mend()
            if self._open is not None and not self._open.torn:
                try:
                    sealed = self._open.seal()
                except (OSError, pa.ArrowException):
                    self._open.tear()
                else:
                    self._adopt(sealed, self._of.pop(self._open.path.name))
                    self._open = None
        elif len(small := self._small()) > 1:
            self._merge(small)

    def forget_sidecars(self) -> None:
        """Remove what only open segments need, once a manifest names their sealed form."""
        for file in self._storage.files(self.name) if isinstance(self._storage, LocalStorage) else ():
            if file.name.endswith(".crc") and int(file.name[:8]) < self.state.next:
                self._storage.delete(f"{self.name}/{file.name}")

    def compress(self, segment: Segment) -> None:
        """Replace a segment by a compressed one, batch for batch; the old file is left for `sweep`."""
        ids = self._of[segment.file]
        self._replace([segment], f"z-{segment.file}", [self[i] for i in ids], ids, _ZSTD)

    def replace(self, segment: Segment, batches: Sequence[pa.RecordBatch]) -> None:
        """Put other batches in a segment's place, or none; their ids are new. The old file is left for `sweep`."""
        if not batches:
            self.drop(segment)
            return
        before = re.search(r"c(\d+)-", segment.file)
        file = f"c{int(before[1]) + 1 if before else 0}-{segment.file.rpartition('-')[2]}"
        for i in self._of[segment.file]:
            del self._batches[i]
        self._replace([segment], file, batches, ())

    def drop(self, segment: Segment) -> None:
        """Take a segment out of the log; the file is left for `sweep`."""
        self.state.segments.remove(segment)
        for i in self._of.pop(segment.file):
            del self._batches[i]

    def sweep(self) -> None:
        """Delete files that no manifest version names any more. Whoever has one mapped can still read it."""
        named = {s.file for s in self.state.segments}
        for file in self._storage.files(self.name):
            number = _NUMBERED.fullmatch(file.name)
            new = number and int(number[1]) >= self.state.next
            if file.name not in named and not new and not file.name.endswith(".crc"):
                self._storage.delete(f"{self.name}/{file.name}")

    # ---- reading -----------------------------------------------------------------------------------------------

    def __getitem__(self, batch: int) -> pa.RecordBatch:
        return self._batches[batch]()

    def __iter__(self) -> Iterator[tuple[int, pa.RecordBatch]]:
        """(id, batch), oldest first."""
        for i in list(self._batches):
            yield i, self[i]

    def __len__(self) -> int:
        return len(self._batches)

    def ids(self, segment: Segment) -> list[int]:
        """Batches of a segment."""
        return self._of[segment.file]

    @property
    def rows(self) -> int:
        """Rows ever appended."""
        return self.state.rows + (self._open.rows if self._open else 0)

    @property
    def settled(self) -> bool:
        """Whether all rows lie in segments that the manifest names."""
        return len(self._of) == len(self.state.segments)

    def spans(self) -> Iterator[tuple[int, int, list[int]]]:
        """(first row, row after the last, batches) of each segment; fewer rows are left where some were collected."""
        segments = self.state.segments
        ends = [s.first for s in segments[1:]] + [self.state.rows]
        for segment, end in zip(segments, ends, strict=False):
            yield segment.first, end, self._of[segment.file]
        for file, ids in self._of.items():
            if file.endswith("s"):
                yield self.state.rows, self.state.rows + sum(self[i].num_rows for i in ids), ids

    # ---- segments ----------------------------------------------------------------------------------------------

    def _grow(self, folder: Path, batch: pa.RecordBatch, parts: Sequence[bytes]) -> tuple[str, int]:
        """Returns the file that the batch is in, and its offset."""
        try:
            if self._open is None:
                self._open = _Open(folder / f"{self.state.next:08d}.arrows", self.schema)
                self._of[self._open.path.name] = []
            start = self._open.append(batch, parts)
        except (OSError, pa.ArrowException) as error:
            if self._open is not None:
                self._open.tear()
            hint = "; free some space, then resume" if getattr(error, "errno", 0) == 28 else ""
            raise StoreError(f"appending to {folder} failed: {error}{hint}") from error
        self._of[self._open.path.name].append(self._next_id)
        self.full = self._open.size >= SEGMENT_BYTES
        return self._open.path.name, start

    def _of_open(self, file: str, start: int) -> pa.RecordBatch:
        """A batch of the open segment, from the file: its memory belongs to whoever put it."""
        try:
            data = self._storage.map(f"{self.name}/{file}")
        except StoreError:  # it is being sealed this moment
            data = self._storage.map(f"{self.name}/{file[:-1]}")
        return pa.ipc.read_record_batch(pa.ipc.read_message(data.slice(start)), self.schema)

    def _complete(self, file: str, batches: Sequence[pa.RecordBatch]) -> pa.Buffer:
        """Make an open segment that nobody writes to a sealed one; returns its bytes. It grows where it lies, because
        a full disk has no room for a copy.
        """
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, self.schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
            end = sink.tell()
        data = sink.getvalue()
        there = self._storage.map(f"{self.name}/{file}")
        same = len(there) >= end and there.slice(0, end).equals(data.slice(0, end))
        if same and isinstance(self._storage, LocalStorage):
            self._storage.finish(f"{self.name}/{file}", end, data.slice(end), f"{self.name}/{file[:-1]}")
        else:
            self._storage.create(f"{self.name}/{file[:-1]}", data)
        return data

    def _create(self, file: str, batches: Sequence[pa.RecordBatch], ids: Sequence[int] = ()) -> None:
        data = _encoded(self.schema, batches)
        try:
            self._storage.create(f"{self.name}/{file}", data)
        except FileExistsError:
            raise taken_over(self._storage.url) from None
        ids = ids or range(self._next_id, self._next_id + len(batches))
        self._adopt(Segment(file, sum(b.num_rows for b in batches), len(data), crc32(data), 0), ids)

    def _check(self, segment: Segment) -> None:
        data, where = self._storage.map(f"{self.name}/{segment.file}"), f"{self.name}/{segment.file}"
        if self.name != "blobs":
            if crc32(data) != segment.crc32:
                raise StoreError(
                    f"segment {self._storage.url}/{where} is damaged: its checksum is wrong; restore it from a copy"
                )
            return
        try:  # too much to read all of it, and a picture's name is its checksum; but no offset may lead astray
            reader = pa.ipc.open_file(data)
            for i in range(reader.num_record_batches):
                reader.get_batch(i).cast(self.schema).validate(full=True)
        except (pa.ArrowException, OSError) as error:
            message = f"segment {self._storage.url}/{where} is damaged: {error}; restore it from a copy"
            raise StoreError(message) from error

    def _small(self) -> list[Segment]:
        """The newest segments of a bucket, which were not merged yet; neighbours, because a merge keeps the order."""
        newest = itertools.takewhile(
            lambda s: _NUMBERED.fullmatch(s.file) and s.bytes < SEGMENT_BYTES, reversed(self.state.segments)
        )
        return list(newest)[::-1]

    def _merge(self, small: list[Segment]) -> None:
        ids = [i for s in small for i in self._of[s.file]]
        self._replace(small, f"m-{small[0].file}", [self[i] for i in ids], ids)

    def _replace(
        self,
        old: list[Segment],
        file: str,
        batches: Sequence[pa.RecordBatch],
        ids: Sequence[int],
        options: pa.ipc.IpcWriteOptions | None = None,
    ) -> None:
        data = _encoded(self.schema, batches, options)
        self._storage.delete(f"{self.name}/{file}")  # of a life that died before its commit
        self._storage.create(f"{self.name}/{file}", data)
        rows = sum(b.num_rows for b in batches)
        new = Segment(file, rows, len(data), crc32(data), old[0].first)
        at = self.state.segments.index(old[0])
        self.state.segments[at : at + len(old)] = [new]
        for s in old:
            del self._of[s.file]
        self._map(new, ids)

    def _adopt(self, segment: Segment, ids: Sequence[int] = ()) -> None:
        segment = replace(segment, first=self.state.rows)
        self.state.rows += segment.rows
        self.state.next = int(segment.file[:8]) + 1
        self.state.segments.append(segment)
        self._map(segment, ids)

    def _map(self, segment: Segment, ids: Sequence[int] = ()) -> None:
        """Read a segment's batches from the mapped file, under new ids or those that they are known by.

        A file that was just written is mapped when it is first read: its rows are durable, and nothing may fail now.
        """
        where = f"{self._storage.url}/{self.name}/{segment.file}"
        reader = functools.cache(functools.partial(_reader, self._storage, f"{self.name}/{segment.file}", where))
        ids = ids or range(self._next_id, self._next_id + reader().num_record_batches)
        self._next_id = max(self._next_id, *(i + 1 for i in ids)) if ids else self._next_id
        for place, i in enumerate(ids):
            self._batches[i] = functools.partial(_read, reader, place, where, self.schema)
        self._of[segment.file] = list(ids)

    def _add(self, batch: Callable[[], pa.RecordBatch]) -> int:
        self._batches[self._next_id] = batch
        self._next_id += 1
        return self._next_id - 1

    # ---- what the last life left -------------------------------------------------------------------------------

    def _take_up(self, file: str) -> None:
        """Bring a segment that no manifest names into the log, sealed."""
        if file.endswith("s"):
            batches = list(self._whole(file))
            if batches:
                self._complete(file, batches)
            self._remove_open(file)
            if not batches:
                return
            file = file[:-1]
        data = self._storage.map(f"{self.name}/{file}")
        self._adopt(Segment(file, self._count(data, file), len(data), crc32(data), 0))

    def _read_new(self, file: str) -> None:
        """Show a reader what the writer has appended since its last manifest."""
        if file.endswith("s"):
            self._of[file] = [self._add(functools.partial(_same, b)) for b in self._whole(file)]
            return
        data = self._storage.map(f"{self.name}/{file}")
        self._adopt(Segment(file, self._count(data, file), len(data), crc32(data), 0))

    def _count(self, data: pa.Buffer, file: str) -> int:
        try:
            reader = pa.ipc.open_file(data)
            return sum(reader.get_batch(i).num_rows for i in range(reader.num_record_batches))
        except (pa.ArrowInvalid, OSError) as error:
            where = f"{self._storage.url}/{self.name}/{file}"
            raise StoreError(f"segment {where} is damaged: {error}; restore it from a copy") from error

    def _remove_open(self, file: str) -> None:
        self._storage.delete(f"{self.name}/{file}")
        self._storage.delete(f"{self.name}/{file[:-7]}.crc")

    def _whole(self, file: str) -> Iterator[pa.RecordBatch]:
        """The batches of an open segment that were made durable."""
        sums = self._sums(file)  # first: the writer may be appending, and writes a line after its batch
        data = self._storage.map(f"{self.name}/{file}")
        check_sums(data, sums, f"{self._storage.url}/{self.name}/{file}")
        yield from stream_batches(data)

    def _sums(self, file: str) -> list[tuple[int, int]]:
        try:
            text = self._storage.map(f"{self.name}/{file[:-7]}.crc").to_pybytes().decode("ascii", "replace")
        except StoreError:
            return []
        return parse_sums(text)


def parse_sums(text: str) -> list[tuple[int, int]]:
    """(end offset, CRC-32 of all bytes before it) for each whole line that a `.crc` file begins with."""
    found = re.match(r"(?:\d+ \d+\n)*", text)  # not synced, so a power loss may leave anything behind them
    lines = found[0].splitlines() if found else []
    return [(int(end), int(crc)) for end, crc in map(str.split, lines)]


def check_sums(data: pa.Buffer, sums: Sequence[tuple[int, int]], where: str) -> None:
    """Compare an open segment with its checksums. Its last append may be torn, or lack its line.

    Raises:
        StoreError: the bytes of an append are damaged, or more than the last one are missing.
    """
    crc = start = 0
    for n, (end, wanted) in enumerate(sums, 1):
        if end > len(data):
            if n < len(sums):
                raise StoreError(f"segment {where} was cut short at byte {len(data)}; restore it from a copy")
            return
        crc = crc32(data.slice(start, max(0, end - start)), crc)
        if crc != wanted:
            raise StoreError(f"segment {where} is damaged after byte {start}; restore it from a copy")
        start = end


def stream_batches(data: pa.Buffer) -> Iterator[pa.RecordBatch]:
    """Whole batches of an open segment's bytes; what follows them is a torn tail."""
    if len(data) <= len(_MAGIC):
        return
    try:
        with pa.ipc.open_stream(data.slice(len(_MAGIC))) as reader:
            yield from reader
    except (pa.ArrowInvalid, OSError):
        return


class _Open:
    """A local segment that grows."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.size, self.rows, self._crc = path, 0, 0, 0
        self._waiting = 0  # bytes that were written, and that the disk was not told of
        self._parts: dict[int, Sequence[bytes]] = {}  # by the address of the buffer that stands for them
        self.torn = False
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "wb")  # noqa: SIM115  (nothing but a failed try can lie there)
        self._sums = open(path.with_suffix(".crc"), "w")  # noqa: SIM115
        self._writer: Any = pa.ipc.new_file(pa.PythonFile(self, "w"), schema)
        self._header = len(_MAGIC) + schema.serialize().size  # written with the first batch
        self._good = 0
        sync_folder(path.parent)

    def append(self, batch: pa.RecordBatch, parts: Sequence[bytes]) -> int:
        """Returns the offset where the batch begins."""
        start = self.size or self._header
        self._parts = {last_buffer(batch).address: parts} if parts else {}
        try:
            self._writer.write_batch(batch)
        finally:
            self._parts = {}  # another buffer may have this address next
        self._file.flush()
        self._sums.write(f"{self.size} {self._crc}\n")
        self._sums.flush()  # tells a torn tail from damage; the rows do not hang on it, so it is not synced
        os.fdatasync(self._file.fileno())
        self._good, self.rows = self.size, self.rows + batch.num_rows
        return start

    def seal(self) -> Segment:
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._sums.close()
        sealed = self.path.with_suffix(".arrow")
        os.rename(self.path, sealed)
        sync_folder(sealed.parent)
        return Segment(sealed.name, self.rows, self.size, self._crc, 0)

    def tear(self) -> None:
        """A write failed: cut off what was not made durable, and write no more."""
        self.torn = True
        with contextlib.suppress(OSError, ValueError):
            self._file.close()
        with contextlib.suppress(OSError):
            os.truncate(self.path, self._good)
        with contextlib.suppress(OSError, ValueError):
            self._sums.close()

    # what pyarrow asks of a file
    closed = False

    def write(self, data: pa.Buffer | bytes) -> int:
        parts = self._parts.get(data.address, [data]) if isinstance(data, pa.Buffer) else [data]
        for part in parts:
            whole = memoryview(part)
            for start in range(0, len(whole), _PIECE):  # kernels take twice the time for one write of many megabytes
                piece = whole[start : start + _PIECE]
                self._crc = crc32(piece, self._crc)
                self._file.write(piece)
                self._begin_sync(len(piece))
        self.size += len(data)
        return len(data)

    def _begin_sync(self, written: int) -> None:
        """The disk begins while the rest of a batch is written: a hint, by which the sync at its end takes a third."""
        self._waiting += written
        if self._waiting >= _PIECE and _sync_file_range:
            start = self._file.tell() - self._waiting
            _sync_file_range(self._file.fileno(), ctypes.c_int64(start), ctypes.c_int64(self._waiting), _WRITE)
            self._waiting = 0

    def flush(self) -> None:
        self._file.flush()

    def tell(self) -> int:
        return self.size

    def close(self) -> None:
        pass  # `seal` does


def _encoded(
    schema: pa.Schema, batches: Sequence[pa.RecordBatch], options: pa.ipc.IpcWriteOptions | None = None
) -> pa.Buffer:
    """A whole Arrow file in memory."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue()


def _reader(storage: Storage, name: str, where: str) -> Any:
    try:
        return pa.ipc.open_file(storage.map(name))
    except (pa.ArrowInvalid, OSError) as error:
        raise StoreError(f"segment {where} is damaged: {error}; restore it from a copy") from error


def _read(reader: Callable[[], Any], place: int, where: str, schema: pa.Schema) -> pa.RecordBatch:
    """A batch; columns that its version did not have yet are null."""
    try:
        batch = reader().get_batch(place)
        if batch.num_columns == len(schema):
            return batch
        there = dict(zip(batch.schema.names, batch.columns, strict=True))
        missing = {f.name: pa.nulls(batch.num_rows, f.type) for f in schema if f.name not in there}
        return pa.RecordBatch.from_arrays([(there | missing)[name] for name in schema.names], schema=schema)
    except (pa.ArrowInvalid, OSError) as error:
        raise StoreError(f"segment {where} is damaged in batch {place}: {error}; restore it from a copy") from error


def _same(batch: pa.RecordBatch) -> pa.RecordBatch:
    return batch
