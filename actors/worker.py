"""What all stage workers share: a loop of claim, work, put that drives itself, and a `ping` that tells how it is.

The first ping starts the loop, so a worker that Ray restarted runs again as soon as the driver's watch finds it. A
loop that ended in an error makes every later ping raise it: the driver then knows who failed and why.

Leases are short, and prolonged for as long as their worker lives: what a dead one held is free again after `LEASE_S`.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from actors import metrics
from replay.store import Claim

#: Seconds after which what a dead worker had claimed can be claimed again.
LEASE_S = 30.0


class StageWorker:
    """Base of the rollout worker, renderer and scorer: async Ray actors.

    Args:
        store: handle.

    Attributes:
        stage: its name in metrics.
        totals: counters since it started: `rows_in`, `rows_out`, `busy_s`, `tokens`, and failures by class.
    """

    stage = ""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._leases: set[int] = set()
        self.totals: dict[str, float] = defaultdict(float)
        self._started = time.monotonic()
        self._begun: asyncio.Task[asyncio.Task[None]] | None = None
        self._active = 0
        self._active_since = 0.0

    async def setup(self) -> None:
        """What must be done once before the loop."""

    async def loop(self) -> None:
        """Claim, work, put; for ever."""
        raise NotImplementedError

    async def ping(self) -> dict[str, float]:
        """Start the loop if it does not run; say how it is. Raises what ended the loop."""
        if self._begun is None:
            self._begun = asyncio.create_task(self._begin())
        main = await asyncio.shield(self._begun)  # others ping meanwhile
        if main.done():
            _raise_first(main.exception())
            raise RuntimeError(f"the loop of {self.stage} ended")
        return {**self.totals, "alive_s": time.monotonic() - self._started, "busy_s": self._busy()}

    async def apply(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a function on this worker (what `FaultTolerantActorManager` asks of an actor)."""
        result = func(self, *args, **kwargs)
        return await result if inspect.isawaitable(result) else result

    async def claim(self, stage: str, **options: Any) -> Claim | None:
        """`claim` of the store, for as long as this worker lives."""
        claim = await self._store.claim(stage, lease_s=LEASE_S, **options)
        if claim is not None:
            self._leases.add(claim.token)
        return claim

    async def _begin(self) -> asyncio.Task[None]:
        await self.setup()
        self._started = time.monotonic()
        return asyncio.create_task(self._live())

    async def _live(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_leases())
            await self.loop()

    async def _keep_leases(self) -> None:
        while True:
            await asyncio.sleep(LEASE_S / 3)
            for token in list(self._leases):
                if not await self._store.extend(token, LEASE_S):  # all of it was put, or is another's by now
                    self._leases.discard(token)

    def begin(self, rows: int) -> None:
        """Rows were claimed."""
        if not self._active:
            self._active_since = time.monotonic()
        self._active += rows
        self.totals["rows_in"] += rows
        metrics.count("rows_in", rows, stage=self.stage)

    def end(self, rows: int, seconds: float | None = None) -> None:
        """Rows were put, dropped or released."""
        self._active -= rows
        if not self._active:
            busy = time.monotonic() - self._active_since
            self.totals["busy_s"] += busy
            metrics.count("busy_seconds", busy, stage=self.stage)
        self.totals["rows_out"] += rows
        metrics.count("rows_out", rows, stage=self.stage)
        if seconds is not None:
            metrics.observe("seconds", seconds, stage=self.stage)

    def failed(self, kind: str, rows: int = 1) -> None:
        """Count failures of a class: infrastructure, data, judge or call."""
        self.totals[kind] += rows
        metrics.count("failures", rows, stage=self.stage, kind=kind)

    def _busy(self) -> float:
        return self.totals["busy_s"] + (time.monotonic() - self._active_since if self._active else 0.0)


def _raise_first(error: BaseException | None) -> None:
    """Raise what ended a loop: the first error of a task group, not the group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if error is not None:
        raise error
