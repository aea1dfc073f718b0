"""The manifest: which sealed segments make up each log, and what has been collected. Each version is a file of its own.

A version is committed by making the file of the next number, which only one of two writers can do. What a log was
given since the last version is not in it: those segments carry numbers from `next` on, and whoever opens the store
takes them up.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from dataclasses import dataclass, field
from typing import Any

from replay.storage import Storage, StoreError, taken_over

FORMAT = 2
FOLDER = "manifest"
#: Versions left lying for readers that are about to read them.
_KEPT = 2


@dataclass(frozen=True)
class Segment:
    """A sealed segment.

    Attributes:
        file: its name in the log's folder.
        rows, bytes: its size.
        crc32: of the whole file.
        first: number of its first row in the log, counted from the log's beginning.
    """

    file: str
    rows: int
    bytes: int
    crc32: int
    first: int


@dataclass
class LogState:
    """What the manifest knows of a log.

    Attributes:
        next: number that the next segment gets.
        rows: number that the next row gets, that is, rows ever sealed.
        segments: in order.
    """

    next: int = 0
    rows: int = 0
    segments: list[Segment] = field(default_factory=list)


@dataclass
class Manifest:
    """One version.

    Attributes:
        version: counts commits.
        logs: by name.
        collected: purpose -> what retention removed: `accepted`, `ended`, `trained` groups, and trajectories by status.
    """

    version: int = 0
    logs: dict[str, LogState] = field(default_factory=dict)
    collected: dict[str, dict[str, int]] = field(default_factory=dict)

    def commit(self, storage: Storage) -> None:
        """Make this state the next version.

        Raises:
            StoreError: another writer has committed that version.
        """
        name = f"{FOLDER}/{self.version + 1:020d}.json"
        try:
            storage.create(name, _encode(self, self.version + 1))
        except FileExistsError:
            raise taken_over(storage.url) from None
        self.version += 1
        for old in storage.files(FOLDER)[:-_KEPT]:
            storage.delete(f"{FOLDER}/{old.name}")


def read(storage: Storage) -> Manifest | None:
    """The newest version; None if nothing was ever committed.

    Raises:
        StoreError: it is damaged, or of a newer format.
    """
    for _ in range(10):
        files = [f for f in storage.files(FOLDER) if f.name.endswith(".json")]
        if not files:
            return None
        try:
            return _decode(storage.map(f"{FOLDER}/{files[-1].name}").to_pybytes(), f"{storage.url}/{files[-1].name}")
        except (FileNotFoundError, StoreError) as error:
            if isinstance(error.__cause__ or error, FileNotFoundError):  # a newer version replaced it meanwhile
                continue
            raise
    raise StoreError(f"the manifest of the store {storage.url} changes faster than it can be read")


def _encode(manifest: Manifest, version: int) -> bytes:
    body: dict[str, Any] = dataclasses.asdict(manifest) | {"version": version}
    text = json.dumps(body, sort_keys=True)
    return json.dumps({"format": FORMAT, "crc32": zlib.crc32(text.encode()), "manifest": body}, sort_keys=True).encode()


def _decode(data: bytes, name: str) -> Manifest:
    try:
        whole = json.loads(data)
        if (found := whole["format"]) > FORMAT:
            raise StoreError(f"the store has format {found}, this llmi reads up to {FORMAT}: {name}; use a newer llmi")
        body = whole["manifest"]
        sound = zlib.crc32(json.dumps(body, sort_keys=True).encode()) == whole["crc32"]
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise StoreError(f"the manifest {name} is damaged; restore the store from a copy")
    logs = {
        name: LogState(log["next"], log["rows"], [Segment(**segment) for segment in log["segments"]])
        for name, log in body["logs"].items()
    }
    return Manifest(body["version"], logs, body["collected"])
