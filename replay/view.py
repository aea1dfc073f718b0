"""A store as its readers see it: all shards at once, nothing locked, nothing changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa

from replay.record import Blob
from replay.store import Store


class View:
    """Reads a store, also one that a run is writing to: what was durable when it was opened.

    Args:
        url: of a store: a folder, `file://...` or `s3://...`.

    Raises:
        StoreError: there is no store, or it is of a newer format.
    """

    def __init__(self, url: str | Path) -> None:
        self._shards = [Store(url, read_only=True)]

    def purposes(self) -> list[str]:
        """`train` and the names of evaluations, sorted."""
        return sorted({p for shard in self._shards for p in shard.purposes()})

    def find(self, purpose: str, statuses: Iterable[str] | None = None) -> list[str]:
        """Trajectories of a purpose (at these statuses), oldest first within a shard."""
        return [name for shard in self._shards for name in shard.find(purpose, statuses)]

    def get(self, trajectories: Sequence[str], columns: Sequence[str]) -> pa.Table:
        """`Store.get`; KeyError for a trajectory that no shard has."""
        return self._shards[0].get(trajectories, columns)

    def blobs(self, names: Iterable[str]) -> dict[str, Blob]:
        """Pictures by SHA-256; KeyError for one that no shard has."""
        return self._shards[0].blobs(names)

    def ends(self, purpose: str) -> dict[str, tuple[str, str]]:
        """Trajectory -> (status, reason) of all that are scored or have ended."""
        return {name: end for shard in self._shards for name, end in shard.ends(purpose).items()}

    def counts(self, purpose: str | None = None) -> dict[str, int]:
        """Trajectories by status."""
        return dict(sum((Counter(shard.counts(purpose)) for shard in self._shards), Counter()))

    def groups(self, purpose: str) -> dict[str, int]:
        """Groups: `accepted`, `ended`, `trained`."""
        return dict(sum((Counter(shard.groups(purpose)) for shard in self._shards), Counter()))

    def lost(self, purpose: str) -> int:
        """Accepted trajectories without exactly one end, counted in the logs."""
        return sum(shard.lost(purpose) for shard in self._shards)

    def close(self) -> None:
        for shard in self._shards:
            shard.close()
