"""The store as actors: `StoreActor`, the verbs of `replay.store.Store` with claims that wait for work, one a shard; and
`StoreClient`, the shards as one store.

A group, and so everything that is claimed together, lies in one shard. The client only asks and routes: rows go from
worker to shard as Arrow tables through the object store. A shard that dies is restarted by Ray and reads its logs; the
calls in flight are made again, which is safe, because of two equal puts or acks the second is `stale`.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from pickle import PickleBuffer
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import ray

from actors import metrics
from replay.record import Blob
from replay.store import Claim, Retention, Store
from replay.view import shard_of

T = TypeVar("T")
#: How long a client of several shards waits at one of them before it asks the others again, in seconds.
_TURN_S = 0.25
#: How long the event loop may keep the interpreter from the threads that write, which leave it at each megabyte.
_SWITCH_S = 0.0005
_QUEUES = {"rollout": "pending", "render": "generated", "score": "rendered", "learn": "scored"}


#: Rows of a put on their way to a shard, and its pictures: hashes, MIME types, bytes.
Load = tuple[pa.Buffer, list[str], list[str], list[PickleBuffer]]


def packed(rows: pa.Table, pictures: Sequence[Blob]) -> Load:
    """What Ray copies once, and fast. Rows go as an Arrow stream, because Ray takes tables apart column by column;
    each picture goes as a buffer of its own, because Ray starts threads for buffers beyond a megabyte. Its name is made
    here and not in the shard, whose process is everyone's.
    """
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as stream:
        stream.write_table(rows)
    names, mimes = [b.sha256 for b in pictures], [b.mime for b in pictures]
    return sink.getvalue(), names, mimes, [PickleBuffer(b.data) for b in pictures]


def unpacked(load: Load) -> tuple[pa.Table, list[Blob]]:
    """Nothing is copied: the pictures stay in Ray's memory until they are written."""
    rows, names, mimes, datas = load
    pictures = [Blob.named(n, memoryview(d), m) for n, d, m in zip(names, datas, mimes, strict=True)]
    return pa.ipc.open_stream(rows).read_all(), pictures


@ray.remote(max_restarts=-1, max_task_retries=-1)
class StoreActor:
    """One shard in one process. Every verb runs on the event loop, so verbs never interleave; only `put` writes in the
    background, and others are answered meanwhile.

    Args:
        url: of the shard.
    """

    def __init__(self, url: str) -> None:
        sys.setswitchinterval(_SWITCH_S)
        self._store = Store(url, patient=True)  # it may follow one that died on another node
        self._changed = asyncio.Condition()

    async def put(self, stage: str, load: Load) -> list[str]:
        put = self._store.put_soon(stage, *unpacked(load))
        await asyncio.wait([asyncio.wrap_future(put.written)])
        return await self._then_tell(put.answers())

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
        """Those of the pictures that this shard has."""
        return self._store.blobs(n for n in names if self._store.has_blob(n))

    async def ends(self, purpose: str) -> dict[str, tuple[str, str]]:
        return self._store.ends(purpose)

    async def newest_version(self) -> int | None:
        return self._store.newest_version()

    async def rewind(self, step: int) -> int:
        return self._store.rewind(step)

    async def collect(self, retention: Retention, committed_step: int) -> int:
        return self._store.collect(retention, committed_step)

    async def version(self) -> dict[str, int]:
        return self._store.version()

    async def state(self, purpose: str = "train") -> dict[str, dict[str, int]]:
        """Trajectories by status, and groups (those of `Store.groups`, and `running`), of one purpose."""
        groups = self._store.groups(purpose) | {"running": self._store.running(purpose)}
        return {"counts": self._store.counts(purpose), "groups": groups}

    async def close(self) -> None:
        self._store.close()

    async def _then_tell(self, result: T) -> T:
        async with self._changed:
            self._changed.notify_all()
        return result


class StoreClient:
    """All shards of a store as one. The verbs are those of `Store`, as coroutines.

    Args:
        shards: the `StoreActor`s, in the order that the groups were spread over.
    """

    def __init__(self, shards: Sequence[Any]) -> None:
        self._shards = list(shards)
        self._turn = 0

    async def put(self, stage: str, rows: pa.Table, blobs: Iterable[Blob] = ()) -> list[str]:
        pictures = list(blobs)
        where = self._where(rows.column("trajectory").to_pylist())
        answers = np.empty(len(rows), object)
        for shard, at in where.items():
            part = rows if len(where) == 1 else rows.take(pa.array(at))
            answers[at] = await self._shards[shard].put.remote(stage, packed(part, pictures))
        return list(answers)

    async def claim(self, stage: str, *, wait_s: float = 0.0, **options: Any) -> Claim | None:
        """From the first shard that has something; which one is asked first goes round."""
        n, deadline = len(self._shards), time.monotonic() + wait_s
        while True:
            for _ in range(n):
                shard = self._turn = (self._turn + 1) % n
                wait = wait_s if n == 1 else 0.0
                claim = await self._shards[shard].claim.remote(stage, wait_s=wait, **options)
                if claim is not None:
                    return replace(claim, token=claim.token * n + shard)
            if n == 1 or time.monotonic() >= deadline:
                return None
            await asyncio.sleep(_TURN_S)

    async def ack(
        self,
        token: int,
        ends: Mapping[str, tuple[str, str]],
        step: int = -1,
        advantages: Mapping[str, float] = {},
    ) -> list[str]:
        own, shard = self._of(token)
        return await shard.ack.remote(own, dict(ends), step=step, advantages=dict(advantages))

    async def extend(self, token: int, lease_s: float) -> bool:
        own, shard = self._of(token)
        return await shard.extend.remote(own, lease_s)

    async def release(self, token: int, trajectories: list[str] | None = None) -> None:
        own, shard = self._of(token)
        await shard.release.remote(own, trajectories)

    async def get(self, trajectories: Sequence[str], columns: Sequence[str]) -> pa.Table:
        where = self._where(trajectories)
        names = [[trajectories[k] for k in at] for at in where.values()]
        refs = [self._shards[s].get.remote(n, list(columns)) for s, n in zip(where, names, strict=True)]
        tables = [await ref for ref in refs]
        if len(tables) == 1:
            return tables[0]
        back = np.argsort(np.concatenate(list(where.values())))
        return pa.concat_tables(tables).combine_chunks().take(pa.array(back))

    async def blobs(self, names: Iterable[str]) -> dict[str, Blob]:
        """Pictures by SHA-256. Raises KeyError for one that no shard has."""
        wanted = list(names)
        found = {name: blob for part in await self._all("blobs", wanted) for name, blob in part.items()}
        return {name: found[name] for name in wanted}

    async def ends(self, purpose: str) -> dict[str, tuple[str, str]]:
        return {name: end for part in await self._all("ends", purpose) for name, end in part.items()}

    async def newest_version(self) -> int | None:
        return max((v for v in await self._all("newest_version") if v is not None), default=None)

    async def rewind(self, step: int) -> int:
        return sum(await self._all("rewind", step))

    async def collect(self, retention: Retention, committed_step: int) -> int:
        n = len(self._shards)
        share = replace(retention, max_bytes=retention.max_bytes // n if retention.max_bytes is not None else None)
        return sum(await self._all("collect", share, committed_step))

    async def version(self) -> list[dict[str, int]]:
        """Rows ever appended to each log, by shard: names a state of the store."""
        return await self._all("version")

    async def state(self, purpose: str = "train") -> dict[str, dict[str, int]]:
        """Trajectories by status, and groups (those of `Store.groups`, and `running`), of one purpose; sets the queue
        metrics."""
        states = await self._all("state", purpose)
        counts, groups = (Counter[str]() for _ in range(2))
        for state in states:
            counts.update(state["counts"])
            groups.update(state["groups"])
        for stage, status in _QUEUES.items():
            metrics.gauge("queue_length", counts[status], stage=stage)
        names = ("accepted", "ended", "trained", "running")
        return {"counts": dict(counts), "groups": {name: groups[name] for name in names}}

    async def close(self) -> None:
        await self._all("close")

    def now(self, verb: Coroutine[Any, Any, T], timeout_s: float = 120.0) -> T:
        """Run a verb to its end where no event loop runs. Raises TimeoutError after `timeout_s` seconds."""
        try:
            return asyncio.run(asyncio.wait_for(verb, timeout_s))
        except TimeoutError:
            name = getattr(verb, "__name__", "a call")
            raise TimeoutError(
                f"the replay store did not answer `{name}` in {timeout_s:g} s: see whether its node is overloaded or "
                "its disk hangs, then go on with --resume"
            ) from None

    async def _all(self, verb: str, *args: Any) -> list[Any]:
        return list(await asyncio.gather(*(getattr(shard, verb).remote(*args) for shard in self._shards)))

    def _where(self, trajectories: Sequence[str]) -> dict[int, list[int]]:
        """Shard -> places of its trajectories in the list."""
        where: dict[int, list[int]] = {}
        for k, name in enumerate(trajectories):
            where.setdefault(shard_of(name, len(self._shards)), []).append(k)
        return where

    def _of(self, token: int) -> tuple[int, Any]:
        own, shard = divmod(token, len(self._shards))
        return own, self._shards[shard]
