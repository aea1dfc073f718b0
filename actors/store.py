"""The store as an actor: the verbs of `replay.store.Store`, with claims that wait for work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import ray

from actors import metrics
from replay.record import Blob
from replay.store import Claim, Store


@ray.remote
class StoreActor:
    """One store in one process. Every verb runs on the event loop, so verbs never interleave.

    Args:
        root: folder of the store.
        committed_step: optimiser step of the last checkpoint; what was trained after it comes back. None: trust all.
    """

    def __init__(self, root: str, committed_step: int | None = None) -> None:
        self._store = Store(root)
        self._changed = asyncio.Condition()
        if committed_step is not None:
            self._store.rewind(committed_step)

    async def put(self, stage: str, rows: pa.Table, blobs: Iterable[Blob] = ()) -> list[str]:
        return await self._then_tell(self._store.put(stage, rows, blobs))

    async def claim(self, stage: str, *, wait_s: float = 0.0, **options: Any) -> Claim | None:
        """`Store.claim`; if there is nothing, wait up to `wait_s` seconds for it."""
        deadline = time.monotonic() + wait_s
        while (claim := self._store.claim(stage, **options)) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            async with self._changed:
                try:
                    await asyncio.wait_for(self._changed.wait(), min(left, 1.0))
                except TimeoutError:
                    continue  # look again all the same: a lease may have run out
        return claim

    async def ack(self, token: int, ends: dict[str, tuple[str, str]], **options: Any) -> list[str]:
        return await self._then_tell(self._store.ack(token, ends, **options))

    async def extend(self, token: int, lease_s: float) -> bool:
        return self._store.extend(token, lease_s)

    async def release(self, token: int, trajectories: list[str] | None = None) -> None:
        self._store.release(token, trajectories)
        await self._then_tell(None)

    async def get(self, trajectories: list[str], columns: list[str]) -> pa.Table:
        return self._store.get(trajectories, columns)

    async def blobs(self, names: list[str]) -> dict[str, Blob]:
        return self._store.blobs(names)

    async def find(self, purpose: str, statuses: list[str] | None = None) -> list[str]:
        return self._store.find(purpose, statuses)

    async def ends(self, purpose: str) -> dict[str, tuple[str, str]]:
        return self._store.ends(purpose)

    async def newest_version(self) -> int | None:
        return self._store.newest_version()

    async def state(self, purpose: str = "train") -> dict[str, dict[str, int]]:
        """Trajectories by status, and groups, of one purpose; sets the queue metrics."""
        counts = self._store.counts(purpose)
        for stage, status in {
            "rollout": "pending",
            "render": "generated",
            "score": "rendered",
            "learn": "scored",
        }.items():
            metrics.gauge("queue_length", counts.get(status, 0), stage=stage)
        return {"counts": counts, "groups": self._store.groups(purpose)}

    async def close(self) -> None:
        self._store.close()

    async def _then_tell(self, result: Any) -> Any:
        async with self._changed:
            self._changed.notify_all()
        return result
