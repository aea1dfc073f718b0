"""A run whose stages take turns, as in the published system: the other side of `llmi bench overlap`.

The actors are those of any run. Only their claims differ: a stage finds nothing as long as a training document stands
at a stage before it. With `learner.max_staleness: 0` no document is accepted before the step is done, so that a step is
to write all, then to draw all, then to judge all, then to learn.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from actors.store import StoreClient
from cluster.pools import Pools
from cluster.train import Trainer
from replay.record import STAGES, Status
from replay.store import Claim

POLL_S = 0.05


class InTurns(StoreClient):
    """The store as seen by stages that take turns."""

    async def claim(self, stage: str, *, wait_s: float = 0.0, **options: Any) -> Claim | None:
        deadline = time.monotonic() + wait_s
        while await self._behind(stage):
            if time.monotonic() >= deadline:
                return None
            await asyncio.sleep(POLL_S)
        return await super().claim(stage, wait_s=max(0.0, deadline - time.monotonic()), **options)

    async def _behind(self, stage: str) -> int:
        """Training documents that stand at an earlier stage."""
        before = STAGES[: STAGES.index(Status(stage))]
        counts = (await self.state("train"))["counts"] if before else {}
        return sum(counts.get(s, 0) for s in before)


class SynchronousPools(Pools):
    client_class = InTurns


class SynchronousTrainer(Trainer):
    pools_class = SynchronousPools
