"""Checks a store byte by byte and row by row: `llmi replay verify`.

It trusts nothing that opening a store trusts: every byte of every segment is read and compared with its checksum, every
picture with its name, and the promises of the logs are counted anew.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
from isal.isal_zlib import crc32

from replay import manifest
from replay.log import check_sums, parse_sums, stream_batches
from replay.manifest import LogState
from replay.record import ENDS, SCHEMAS, STAGES, Status
from replay.retention import pictures
from replay.storage import Storage, StoreError, storage
from replay.view import shard_of, shard_urls

#: Lines "end CRC-32"; the last may be torn.
_SUMS = re.compile(r"(\d+ \d+\n)*(\d+( \d*)?)?")


@dataclass
class Findings:
    """What `verify` found.

    Attributes:
        problems: one sentence each; none if the store is sound.
        notes: what is no damage, such as the torn tail of a writer that died.
        rows, pictures, segments, bytes: what was checked.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rows: int = 0
    pictures: int = 0
    segments: int = 0
    bytes: int = 0


def verify(url: str | Path) -> Findings:
    """Check a store and all its shards. It may be open; what its writer appends meanwhile is not looked at."""
    found = Findings()
    urls = shard_urls(url)
    for k, shard in enumerate(urls):
        try:
            _Shard(storage(shard, read_only=True), k, len(urls), found).check()
        except StoreError as error:
            found.problems.append(str(error))
    return found


class _Shard:
    def __init__(self, place: Storage, number: int, shards: int, found: Findings) -> None:
        self._place, self._number, self._shards, self._found = place, number, shards, found

    def check(self) -> None:
        state = manifest.read(self._place)
        if state is None:
            raise StoreError(f"there is no replay store in {self._place.url}")
        logs = {name: list(self._batches(name, state.logs.get(name, LogState()))) for name in SCHEMAS}
        self._found.rows += sum(b.num_rows for name, log in logs.items() for b in log if name != "blobs")
        self._check_pictures(logs)
        self._check_rows(logs)

    def _batches(self, name: str, state: LogState) -> Iterator[pa.RecordBatch]:
        """The sound batches of a log, in order; what is not sound is a problem."""
        files = {f.name for f in self._place.files(name)}
        for segment in state.segments:
            if segment.file in files:
                yield from self._sealed(name, segment.file, segment.crc32, segment.rows)
            else:
                self._wrong(f"{name}/{segment.file} is missing")
        for file in sorted(f for f in files if f[:8].isdigit() and int(f[:8]) >= state.next):
            if file.endswith(".arrow"):
                yield from self._sealed(name, file, None, None)
            elif file.endswith(".arrows") and file[:-1] not in files:
                yield from self._open(name, file, f"{file[:8]}.crc" in files)

    def _sealed(self, name: str, file: str, checksum: int | None, rows: int | None) -> Iterator[pa.RecordBatch]:
        data = self._read(name, file)
        if checksum is not None and crc32(data) != checksum:
            self._wrong(f"{name}/{file} is damaged: its bytes do not have the checksum of the manifest")
            return
        try:
            reader = pa.ipc.open_file(data)
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except (pa.ArrowInvalid, OSError) as error:
            self._wrong(f"{name}/{file} is damaged: {error}")
            return
        if rows is not None and (n := sum(b.num_rows for b in batches)) != rows:
            self._wrong(f"{name}/{file} has {n} rows, the manifest says {rows}")
        yield from batches

    def _open(self, name: str, file: str, summed: bool) -> Iterator[pa.RecordBatch]:
        data = self._read(name, file)
        text = self._read(name, f"{file[:8]}.crc").to_pybytes().decode("ascii", "replace") if summed else ""
        if not _SUMS.fullmatch(text):
            self._wrong(f"{name}/{file[:8]}.crc is damaged")
        sums = parse_sums(text)
        try:
            check_sums(data, sums, f"{name}/{file}")
        except StoreError as error:
            self._wrong(str(error))
            return
        if sums and sums[-1][0] != len(data):
            self._found.notes.append(f"{name}/{file} is open, or ends in an append that never returned")
        yield from stream_batches(data)

    def _read(self, name: str, file: str) -> pa.Buffer:
        data = self._place.map(f"{name}/{file}")
        self._found.segments += not file.endswith(".crc")
        self._found.bytes += len(data)
        return data

    def _check_pictures(self, logs: Mapping[str, list[pa.RecordBatch]]) -> None:
        seen: Counter[str] = Counter()
        for batch in logs["blobs"]:
            for name, data in zip(batch.column("sha256").to_pylist(), batch.column("data"), strict=True):
                seen[name] += 1
                if hashlib.sha256(data.as_buffer()).hexdigest() != name:
                    self._wrong(f"picture {name} has other bytes than its name says")
        self._found.pictures += len(seen)
        for name, n in seen.items():
            if n > 1:
                self._wrong(f"picture {name} is stored {n} times")
        for name in sorted(pictures(logs["pending"], logs["rendered"]) - seen.keys()):
            self._wrong(f"picture {name} is named by a row, but is not there")

    def _check_rows(self, logs: Mapping[str, list[pa.RecordBatch]]) -> None:
        accepted: Counter[str] = Counter(_names(logs["pending"]))
        for name in accepted:
            if shard_of(name, self._shards) != self._number:
                self._wrong(f"{name} lies in shard {self._number}, and belongs to {shard_of(name, self._shards)}")
        self._once("pending", accepted)
        for stage in STAGES[1:]:
            keys = Counter(pair for b in logs[stage] for pair in _pairs(b, "trajectory", "attempt"))
            self._once(stage, {f"{name} (attempt {attempt})": n for (name, attempt), n in keys.items()})
            for name in sorted({name for name, _ in keys} - accepted.keys()):
                self._wrong(f"{name} is in {stage}, but was never accepted")
        ends: Counter[str] = Counter()
        for batch in logs["ended"]:
            for name, status in _pairs(batch, "trajectory", "status"):
                ends[name] += 1 if status in ENDS else -1 if status == Status.SCORED else 0
        for name, n in ends.items():
            if n > 1:
                self._wrong(f"{name} ended {n} times")
            if name not in accepted:
                self._wrong(f"{name} ended, but was never accepted")

    def _once(self, stage: str, rows: Mapping[str, int]) -> None:
        for name, n in rows.items():
            if n > 1:
                self._wrong(f"{name} is {n} times in {stage}")

    def _wrong(self, what: str) -> None:
        self._found.problems.append(f"{self._place.url}: {what}")


def _pairs(batch: pa.RecordBatch, *columns: str) -> Iterator[tuple[str, int | str]]:
    return zip(*(batch.column(c).to_pylist() for c in columns), strict=True)


def _names(batches: list[pa.RecordBatch]) -> Iterator[str]:
    for batch in batches:
        yield from batch.column("trajectory").to_pylist()
