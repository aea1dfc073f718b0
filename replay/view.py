"""A store as its readers see it: all shards at once, nothing locked, nothing changed; and where the shards lie."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from replay import manifest
from replay.record import SCHEMAS, Blob
from replay.storage import StoreError, lock, storage
from replay.store import Store

_SHARDS = "shards.json"


def shard_of(trajectory: str, shards: int) -> int:
    """Which shard a trajectory lies in: a matter of its group's name alone."""
    return zlib.crc32(trajectory.rpartition("/")[0].encode()) % shards if shards > 1 else 0


def make_shards(url: str, shards: int) -> list[str]:
    """Where the shards of a run's store lie; their number is fixed when the store is made.

    Raises:
        StoreError: the store was made with another number.
    """
    place = storage(url)
    if not place.files(""):
        place.create(_SHARDS, _shards(shards))
    found = shard_urls(url)
    if len(found) != shards:
        raise StoreError(f"the store {url} has {len(found)} shards, store.shards says {shards}; set it back to resume")
    return found


def _shards(n: int) -> bytes:
    return json.dumps({"shards": n}).encode()


def shard_urls(url: str | Path) -> list[str]:
    """Where the shards of a store lie; a store without shards is its own."""
    text = str(url).rstrip("/")
    place = storage(text, read_only=True)
    if _SHARDS not in {f.name for f in place.files("")}:
        return [text]
    shards = json.loads(place.map(_SHARDS).to_pybytes())["shards"]
    return [f"{text}/shard-{k}" for k in range(shards)]


def is_store(url: str | Path) -> bool:
    """Whether a store was made at `url`; half a copy is none."""
    place = storage(url, read_only=True)
    return _SHARDS in {f.name for f in place.files("")} or bool(place.files(manifest.FOLDER))


def wait_until_free(url: str, tell: Callable[[str], None]) -> None:
    """Return when nobody writes to the store at `url`, if there is one.

    Args:
        tell: hears what is waited for.

    Raises:
        Locked: its owner lives.
    """
    for shard in shard_urls(url) if is_store(url) else []:
        place = storage(shard)
        lock(place, tell)
        place.unlock()


def copy(url: str, to: str) -> None:
    """Copy a store that nobody writes to, file by file, between any two places. It can be made again if it broke off.

    Raises:
        StoreError: there is no store.
    """
    if not is_store(url):
        raise StoreError(f"there is no replay store in {url}")
    shards = shard_urls(url)
    for k, shard in enumerate(shards):
        source, target = storage(shard, read_only=True), storage(f"{to}/shard-{k}")
        for name in (f"{folder}/{f.name}" for folder in (manifest.FOLDER, *SCHEMAS) for f in source.files(folder)):
            target.create(name, source.map(name))
    storage(to).create(_SHARDS, _shards(len(shards)))  # last: with it, it is a store


class View:
    """Reads a store, also one that a run is writing to: what was durable when it was opened.

    Args:
        url: of a store: a folder, `file://...` or `s3://...`.

    Raises:
        StoreError: there is no store, it is damaged, or of a newer format.
    """

    def __init__(self, url: str | Path) -> None:
        self._shards = [Store(shard, read_only=True) for shard in shard_urls(url)]

    def purposes(self) -> list[str]:
        """`train` and the names of evaluations, sorted."""
        return sorted({p for shard in self._shards for p in shard.purposes()})

    def find(self, purpose: str, statuses: Iterable[str] | None = None) -> list[str]:
        """Trajectories of a purpose (at these statuses), oldest first within a shard."""
        wanted = None if statuses is None else list(statuses)
        return [name for shard in self._shards for name in shard.find(purpose, wanted)]

    def get(self, trajectories: Sequence[str], columns: Sequence[str]) -> pa.Table:
        """`Store.get`; KeyError for a trajectory that no shard has."""
        n = len(self._shards)
        if n == 1:
            return self._shards[0].get(trajectories, columns)
        of = np.array([shard_of(name, n) for name in trajectories], int)
        order = np.argsort(of, kind="stable")
        parts = [s.get([trajectories[i] for i in order if of[i] == k], columns) for k, s in enumerate(self._shards)]
        return pa.concat_tables(parts).combine_chunks().take(pa.array(np.argsort(order)))

    def blobs(self, names: Iterable[str]) -> dict[str, Blob]:
        """Pictures by SHA-256; KeyError for one that no shard has."""
        wanted = list(names)
        found = {n: b for s in self._shards for n, b in s.blobs(x for x in wanted if s.has_blob(x)).items()}
        return {name: found[name] for name in wanted}

    def ends(self, purpose: str) -> dict[str, tuple[str, str]]:
        """Trajectory -> (status, reason) of all that are scored or have ended."""
        return {name: end for shard in self._shards for name, end in shard.ends(purpose).items()}

    def counts(self, purpose: str | None = None) -> dict[str, int]:
        """Trajectories by status."""
        return dict(sum((Counter(shard.counts(purpose)) for shard in self._shards), Counter()))

    def groups(self, purpose: str) -> dict[str, int]:
        """Groups: `accepted`, `ended`, `trained`."""
        each = [shard.groups(purpose) for shard in self._shards]
        return {name: sum(groups[name] for groups in each) for name in ("accepted", "ended", "trained")}

    def lost(self, purpose: str) -> int:
        """Accepted trajectories without exactly one end, counted in the logs."""
        return sum(shard.lost(purpose) for shard in self._shards)

    def close(self) -> None:
        """Let go of the files."""
        self._shards = []
