"""Writers that make the same rows and pictures durable, a batch at a time: what `llmi bench replay` compares.

One goes through the store's actor, in another process; the others are what one could use instead. What they are given
is in memory, and each returns when all of it is on disk. All hash the pictures. The rivals have it easier: SQLite and
Redis keep token ids and log-probs only.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sqlite3
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import ray

from actors.store import StoreActor, StoreClient
from cluster.pools import PING_S, SERVICE, init_ray
from cluster.servers import RunFailed, actor_options
from replay.record import Blob

IN_FLIGHT = 4  # batches on their way to the store at once, as a worker has them


@dataclass(frozen=True)
class Batch:
    """Rows of `SCHEMAS["generated"]`, and as many pictures for each, in the rows' order."""

    rows: pa.Table
    images: list[bytes]


class Writer(Protocol):
    def __init__(self, folder: Path) -> None:
        """`folder` is made."""

    def append(self, batches: Sequence[Batch]) -> None:
        """Write each batch as one; returns when all are durable."""

    def close(self) -> None: ...


class ThroughStore:
    """The store's client and, in another process, its actor. A row must have been accepted before it is appended."""

    def __init__(self, folder: Path) -> None:
        init_ray()
        self._actor = StoreActor.options(**actor_options(SERVICE)).remote(str(folder))  # type: ignore[attr-defined]
        self._store = StoreClient([self._actor])

    def accept(self, pending: pa.Table) -> None:
        self._store.now(self._put("pending", pending, ()))

    def append(self, batches: Sequence[Batch]) -> None:
        self._store.now(self._append(batches), PING_S)

    def close(self) -> None:
        ray.kill(self._actor)  # what it wrote is of no use

    async def _append(self, batches: Sequence[Batch]) -> None:
        waiting = iter(batches)

        async def write() -> None:
            for batch in waiting:
                await self._put("generated", batch.rows, map(Blob, batch.images))

        await asyncio.gather(*(write() for _ in range(IN_FLIGHT)))

    async def _put(self, stage: str, rows: pa.Table, blobs: Iterable[Blob]) -> None:
        stale = (await self._store.put(stage, rows, blobs)).count("stale")
        if stale:
            raise RunFailed(f"the store refused {stale} rows of a put; the benchmark must accept its rows first")


class BareFile:
    """One file, and one process that hashes and writes: the most that the disk gives."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._file = open(folder / "rows", "wb")  # noqa: SIM115

    def append(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            for image in batch.images:
                self._file.write(hashlib.sha256(image).digest())
                self._file.write(image)
            buffers = (b for column in batch.rows.columns for chunk in column.chunks for b in chunk.buffers())
            self._file.writelines(b for b in buffers if b is not None)
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class Sqlite:
    """One transaction a batch, durable when it is committed; pictures by their SHA-256."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._db = sqlite3.connect(folder / "rows.db")
        self._db.executescript(
            "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;"
            "CREATE TABLE rows (trajectory TEXT PRIMARY KEY, token_ids BLOB, logprobs BLOB);"
            "CREATE TABLE images (sha256 BLOB PRIMARY KEY, data BLOB);"
        )

    def append(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            with self._db:
                images = ((hashlib.sha256(image).digest(), image) for image in batch.images)
                self._db.executemany("INSERT OR IGNORE INTO images VALUES (?, ?)", images)
                self._db.executemany("INSERT INTO rows VALUES (?, ?, ?)", _cells(batch.rows))

    def close(self) -> None:
        self._db.close()


class Redis:
    """A stream of a server of its own on a Unix socket, written by its own client: a pipeline a batch, whose answers
    come when all of it is on disk; pictures by their SHA-256.
    """

    def __init__(self, folder: Path) -> None:
        import redis  # a package of the tests

        folder.mkdir(parents=True)
        options = "--port 0 --unixsocket s --appendonly yes --appendfsync always --auto-aof-rewrite-percentage 0"
        command = ["redis-server", *options.split(), "--save", ""]
        with open(folder / "log", "wb") as log:
            self._server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        self._client = redis.Redis(unix_socket_path=str(folder / "s"), socket_timeout=PING_S)
        deadline = time.monotonic() + PING_S
        while not (folder / "s").exists():
            if self._server.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise RunFailed(f"redis-server did not start: {(folder / 'log').read_text()[-500:]}")
            time.sleep(0.05)

    def append(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            pipeline = self._client.pipeline(transaction=False)
            each = len(batch.images) // batch.rows.num_rows
            for i, (name, ids, logprobs) in enumerate(_cells(batch.rows)):
                images = batch.images[i * each : (i + 1) * each]
                row: dict[Any, Any] = {"trajectory": name, "token_ids": ids, "logprobs": logprobs}
                pipeline.xadd("rows", row | {hashlib.sha256(image).digest(): image for image in images})
            pipeline.execute()

    def close(self) -> None:
        self._client.close()
        self._server.kill()
        self._server.wait(PING_S)


def _cells(rows: pa.Table) -> Iterator[tuple[str, bytes, bytes]]:
    """Trajectory, token ids and log-probs of each row."""
    ids, logprobs = rows.column("token_ids"), rows.column("logprobs")
    for i, name in enumerate(rows.column("trajectory").to_pylist()):
        yield name, ids[i].values.to_numpy().tobytes(), logprobs[i].values.to_numpy().tobytes()
