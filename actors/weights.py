"""The weight seam through host memory: `Publisher.publish(version, named weights)` and `Puller.pull(weights)`.

The learner writes its weights into buckets of shared memory (`actors/buckets.py`) and tells the hub, which only knows
where they are. Engines on the learner's node map them; those on other nodes get them through Ray's object store, bucket
by bucket. A version is the newest once all of it lies there: a publisher that fails before has published nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import numpy as np
import ray
from isal.isal_zlib import crc32
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from actors.buckets import Bucket, BucketGone, Pool, Reader, fill, held, locked

COMMIT_S = 120.0  # the hub answers within it
SHIP_S = 600.0  # a bucket is on another node within it
ANSWER_S = 10.0  # an engine that is ready to be sent weights answers within it
SLEEP_S = 900.0  # an engine sleeps within it, even one that was starting
_SHIPPED = 2  # buckets that stay in the object store, for engines that ask for the same one

#: Makes a fresh pass over the named weights, in checkpoint form; under ZeRO-3 all ranks make it together.
Stream: TypeAlias = Callable[[], Iterable[tuple[str, Tensor]]]


@dataclass(frozen=True)
class Weights:
    """A policy version, and where its weights lie; without buckets, those of the model that everyone starts from.

    With `adapter`, PEFT's adapter_config.json, they are those of a LoRA adapter on that model.
    """

    version: int
    node: str = ""
    buckets: tuple[Bucket, ...] = ()
    adapter: str = ""

    @cached_property
    def nbytes(self) -> int:
        return sum(b.nbytes for b in self.buckets)

    @cached_property
    def checksum(self) -> int:
        """Of names, types, shapes and numbers, 32 bits; 0 where there are none."""
        return crc32(repr([(b.pieces, b.checksum) for b in self.buckets]).encode()) if self.buckets else 0


@dataclass(frozen=True)
class Member:
    """An engine, in one `life` of its worker; vLLM's own transfers can send to its `ranks` processes."""

    worker: Any
    life: str
    ranks: int


@ray.remote
class WeightHub:
    """Knows the newest policy version, where the newest weights lie, and the engines for those that send to them."""

    def __init__(self) -> None:
        self._newest: int | None = None
        self._weights: Weights | None = None
        self._published: list[Weights] = []  # the last two, where their publisher has them
        self._hold = ExitStack()
        self._shipped: dict[tuple[int, int], Any] = {}
        self._members: dict[str, Member] = {}
        self._resting = False  # the engines sleep
        self._changed = asyncio.Condition()

    async def publish(self, weights: Weights) -> None:
        """Make these the newest. On the publisher's node the hub has a hold of them: they outlive the learner."""
        hold, own = ExitStack(), weights
        if weights.node == ray.get_runtime_context().get_node_id():
            own = replace(weights, buckets=tuple(hold.enter_context(locked(weights.buckets))))
        self._hold.close()
        self._hold, self._weights = hold, own
        self._published = [*self._published[-1:], weights]
        self._shipped.clear()
        await self.announce(weights.version)

    async def announce(self, version: int) -> None:
        """Make a version the newest that the engines were sent, and that cannot be pulled."""
        self._newest, self._resting = version, False
        async with self._changed:
            self._changed.notify_all()

    async def newer(self, than: int | None, wait_s: float) -> tuple[int, Weights] | None:
        """The newest version if it is not `than`, and the newest weights that can be pulled; waits up to `wait_s`
        seconds for it, then None."""
        async with self._changed:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait_for(lambda: self._newest != than), wait_s)
        return None if self._newest in (None, than) or self._weights is None else (self._newest, self._weights)

    async def current(self) -> tuple[int | None, int]:
        """The newest version, and the checksum of its weights (0 if they cannot be pulled)."""
        weights = self._weights
        return self._newest, weights.checksum if weights and weights.version == self._newest else 0

    async def ship(self, version: int, index: int) -> list[Any]:
        """[ObjectRef of a bucket's bytes], or [] if two newer versions were published.

        The version before the newest is there until the publisher begins with the next: a pull may take longer than a
        step. The ref sits in a list, so that Ray hands on the ref and not the bytes.
        """
        weights = next((w for w in (self._weights, *self._published) if w is not None and w.version == version), None)
        if weights is None:
            return []
        key = version, index
        if key not in self._shipped:
            bucket = weights.buckets[index]
            there = NodeAffinitySchedulingStrategy(weights.node, soft=False)
            self._shipped[key] = _content.options(scheduling_strategy=there).remote(bucket.path, bucket.nbytes)
            while len(self._shipped) > _SHIPPED:
                del self._shipped[next(iter(self._shipped))]
        return [self._shipped[key]]

    async def join(self, name: str, worker: Any, life: str, ranks: int) -> None:
        """An engine that shares its accelerator with a learner is about to start (`ranks` 0), and may once none works
        there; or one is ready to be sent weights."""
        async with self._changed:
            if name not in self._members or self._members[name].life != life:
                await self._changed.wait_for(lambda: not self._resting)
            self._members[name] = Member(worker, life, ranks)

    async def rest(self) -> None:
        """All engines that joined sleep until the next version, and none starts: it is the learner's turn.

        Raises:
            RuntimeError: one does not fall asleep in `SLEEP_S`.
        """
        self._resting = True
        await asyncio.gather(*(_sleep(name, m, self._newest or 0) for name, m in self._members.items()))

    async def members(self) -> list[Member]:
        """Those that can be sent to, but for the ones that died since, have not joined anew yet, or do not answer."""
        members = [self._members[name] for name in sorted(self._members) if self._members[name].ranks]
        lives = await asyncio.gather(*(_life(m) for m in members))
        return [m for m, life in zip(members, lives, strict=True) if m.life == life]


async def _life(member: Member) -> str:
    """The life that its worker says it has; none for one that does not answer."""
    try:
        return await asyncio.wait_for(member.worker.life.remote(), ANSWER_S)
    except (ray.exceptions.RayError, TimeoutError):
        return ""


async def _sleep(name: str, member: Member, version: int) -> None:
    try:
        async with asyncio.timeout(SLEEP_S):
            while not await _asleep(member, version):
                await asyncio.sleep(0.5)
    except TimeoutError:
        raise RuntimeError(f"the learner waited {SLEEP_S:g} s for the engine of {name} to fall asleep") from None


async def _asleep(member: Member, version: int) -> bool:
    """Whether it sleeps or is dead, with its engine; one that Ray cannot reach may be on its way to another life."""
    try:
        await member.worker.sleep.remote(member.life, version)
    except ray.exceptions.ActorUnavailableError:
        return False
    except ray.exceptions.ActorDiedError:
        pass
    return True


@ray.remote(num_cpus=0, max_retries=1)
def _content(path: str, nbytes: int) -> np.ndarray:
    """A bucket's bytes; runs on the node that has it. Ray copies them into its object store."""
    [content] = Reader().map([path])
    return content[:nbytes].numpy()


class Sender(Protocol):
    """What a learner rank publishes with. All ranks call it together."""

    def publish(self, version: int, weights: Stream) -> None:
        """Make these weights the newest policy version; returns when they are.

        Raises:
            ValueError, RuntimeError: they cannot be published; the previous version stays the newest.
        """


class Publisher:
    """Publishes through host memory.

    Args:
        hub: handle.
        rank: of the learner; rank 0 publishes, the others take part in the passes over the weights.
        adapter: PEFT's adapter_config.json, if it is an adapter that is published.
    """

    def __init__(self, hub: Any, rank: int = 0, adapter: str = "") -> None:
        self._hub, self._rank, self._adapter, self._pool = hub, rank, adapter, Pool()

    def publish(self, version: int, weights: Stream) -> None:
        if self._rank:
            for _ in weights():
                pass
            return
        with self._pool.turn() as take:
            buckets = fill(take, weights())
            node = ray.get_runtime_context().get_node_id()
            ray.get(self._hub.publish.remote(Weights(version, node, tuple(buckets), self._adapter)), timeout=COMMIT_S)


class Puller:
    """The engine's side.

    Args:
        hub: handle.
        node: id of this node; another one than the publisher's gets everything through the object store.
    """

    def __init__(self, hub: Any, node: str | None = None) -> None:
        self._hub, self._node = hub, node or ray.get_runtime_context().get_node_id()
        self._pool, self._reader = Pool(), Reader()

    @asynccontextmanager
    async def pull(self, weights: Weights) -> AsyncIterator[list[Bucket]]:
        """Buckets with these weights, which this node's processes can map while the context lasts.

        Raises:
            BucketGone: they are not there any more; ask the hub for newer ones.
        """
        with ExitStack() as stack:
            buckets = list(weights.buckets)
            if weights.node != self._node:
                take = stack.enter_context(self._pool.turn())
                buckets = [await self._fetch(weights, i, take) for i in range(len(buckets))]
            yield await asyncio.to_thread(stack.enter_context, held(self._reader, buckets))

    async def _fetch(self, weights: Weights, index: int, take: Callable[[int], Any]) -> Bucket:
        """A bucket of another node, in memory of this process."""
        bucket = weights.buckets[index]
        try:
            refs = await asyncio.wait_for(self._hub.ship.remote(weights.version, index), SHIP_S)
            if not refs:
                raise BucketGone("newer weights were published")
            content = await asyncio.wait_for(refs[0], SHIP_S)
        except (ray.exceptions.RayError, TimeoutError) as error:
            raise BucketGone(f"node {weights.node[:8]} does not send bucket {index}: {error!r}") from error
        memory = take(bucket.nbytes)
        await asyncio.to_thread(np.copyto, memory.bytes[: bucket.nbytes].numpy(), content)
        memory.unlock()
        return replace(bucket, path=memory.path)
