"""Rollout workers: claim prompts, let vLLM write, put what it wrote; and follow the policy's versions meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Mapping
from typing import Any, NoReturn
from uuid import uuid4

import pyarrow as pa
import ray

from actors import metrics
from actors.buckets import BucketGone
from actors.engine import Engine, EngineDied, PromptRefused
from actors.weights import Puller, Weights
from actors.worker import StageWorker
from replay.record import SCHEMAS, staleness, updates
from replay.store import Claim

COLUMNS = ["question", "given", "seed"]
FIRST_S = 60.0  # some version is there by then
GONE_S = 60.0  # weights that cannot be pulled are there again by then, or newer ones are


@ray.remote
class RolloutWorker(StageWorker):
    """One vLLM engine that samples groups.

    Args:
        store, hub: handles.
        model: folder, `s3://...` or hub name.
        concurrency: most samples under way.
        sampling: vLLM's SamplingParams; `seed` comes from each row.
        system: system prompt, or "" for none.
        engine: vLLM's engine arguments.
        weights: backend that new weights come by, a key of `actors.engine.TRANSFERS`.
        name: in rows and metrics.
        max_staleness: how many versions behind the newest an answer may begin.
    """

    stage = "rollout"

    def __init__(
        self,
        store: Any,
        hub: Any,
        *,
        model: str,
        concurrency: int,
        sampling: Mapping[str, Any],
        system: str,
        engine: Mapping[str, Any],
        name: str,
        weights: str = "host",
        max_staleness: int = 0,
    ) -> None:
        super().__init__(store)
        self._hub, self._name = hub, name
        self._model, self._sampling, self._system, self._options = model, dict(sampling), system, dict(engine)
        self._weights, self._puller, self._current = weights, Puller(hub), (-1, 0)
        self._free = concurrency
        self._done: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._purpose: str | None = None
        self._newest, self._max_staleness = 0, max_staleness
        self._life = uuid4().hex
        self._slept: float | None = None  # since when

    async def setup(self) -> None:
        if self._options.get("enable_sleep_mode"):
            await self._join(0)  # within the step of a learner: the driver's `stall_s` bounds it
        newest = await self._hub.newer.remote(None, FIRST_S)
        if newest is None:
            raise RuntimeError(f"{self._name} waited {FIRST_S:g} s for the first policy version")
        self._newest, weights = newest
        start = weights.version if not weights.buckets else -1  # older than all that are pulled
        self._engine = Engine(self._model, start, self._options, self._weights)
        await self._engine.start()
        if not weights.buckets:
            self._hold(start, 0)
        await self._take(weights)
        if self._weights != "host":
            await self._join(self._engine.ranks)

    async def loop(self) -> None:
        """Ends the process if the engine died: Ray starts it anew, with an engine that pulls the newest weights."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                group.create_task(self._claim())
                group.create_task(self._put())
                group.create_task(self._follow())
                group.create_task(self._engine.watch())
        except* EngineDied as died:
            self._end(died.exceptions[0])

    async def focus(self, purpose: str | None) -> None:
        """Claim only prompts of this purpose (an evaluation), or any."""
        self._purpose = purpose

    async def weights(self) -> tuple[int, int]:
        """The engine's policy version, and the checksum of the weights that it pulled (0 for others)."""
        return self._current

    async def life(self) -> str:
        """Which life of the worker this is: each process has another."""
        return self._life

    async def sleep(self, life: str, version: int) -> None:
        """Let the engine sleep until it gets newer weights than this version, which it waits for if they are pulled.

        Of another life nothing is left that could sleep: an engine starts once the learner's turn is over.
        """
        if life != self._life:
            return
        while self._current[0] < (version if self._weights == "host" else 0):
            await asyncio.sleep(0.02)
        try:
            await self._engine.sleep()
        except EngineDied as died:
            self._end(died)
        self._slept = time.monotonic()

    async def transfer(self, step: str, info: Mapping[str, Any] | None = None, version: int | None = None) -> None:
        """One step of vLLM's own weight transfer, driven by the learner (`actors/weight_senders.py`)."""
        await self._engine.transfer(step, info, version)
        if version is not None:
            self._hold(version, 0)

    async def _claim(self) -> None:
        while True:
            if self._free <= 0 or self._too_old():
                await asyncio.sleep(0.02)
                continue
            claim = await self.claim(
                "pending", limit=1, by_group=True, columns=COLUMNS, purpose=self._purpose, wait_s=5.0
            )
            if claim is not None and self._too_old():  # newer weights came with it
                await self._store.release(claim.token)
            elif claim is not None:
                self._start(claim)

    def _too_old(self) -> bool:
        """Whether what is begun with the present weights would be too old from the start."""
        return staleness(self._newest, self._engine.version) > self._max_staleness

    def _start(self, claim: Claim) -> None:
        rows = claim.rows.to_pylist()
        self._free -= len(rows)
        self.begin(len(rows))
        for row in rows:
            self._group.create_task(self._sample(claim.token, row))

    async def _sample(self, token: int, row: dict[str, Any]) -> None:
        started = time.monotonic()
        ids = self._engine.prompt_ids(row["question"], self._system)
        try:
            out = await self._engine.complete(
                f"{row['trajectory']}@{row['attempt']}", ids, self._sampling | {"seed": row["seed"]}
            )
        except PromptRefused as refused:
            await self._store.ack(token, {row["trajectory"]: ("dropped_data", f"prompt: {refused}")})
            self.failed("data")
            self._free += 1
            self.end(1)
            return
        self._done.put_nowait(
            {
                **{k: row[k] for k in ("trajectory", "group", "attempt")},
                "turn": 0,
                "prompt_ids": ids,
                "token_ids": out.token_ids,
                "logprobs": out.logprobs,
                "mask": [1] * len(out.token_ids),
                "versions": out.versions,
                "text": out.text,
                "finish": out.finish,
                "worker": self._name,
                "seconds": time.monotonic() - started,
            }
        )

    async def _put(self) -> None:
        while True:
            rows = [await self._done.get()]
            with contextlib.suppress(asyncio.QueueEmpty):
                while True:
                    rows.append(self._done.get_nowait())
            await self._store.put("generated", pa.Table.from_pylist(rows, SCHEMAS["generated"]))
            self._free += len(rows)
            tokens = sum(len(r["token_ids"]) for r in rows)
            self.totals["tokens"] += tokens
            metrics.count("tokens", tokens, stage=self.stage)
            self.end(len(rows), sum(r["seconds"] for r in rows) / len(rows))

    async def _follow(self) -> None:
        seen: int | None = self._engine.version
        while True:
            newer = await self._hub.newer.remote(seen, 30.0)
            if newer is not None:
                seen, weights = newer
                self._newest = seen
                await self._take(weights)

    async def _take(self, weights: Weights) -> None:
        """Bring the engine to these weights, or to newer ones if they are gone by now."""
        deadline = time.monotonic() + GONE_S
        while weights.version > self._engine.version:
            try:
                async with self._puller.pull(weights) as buckets:
                    self.totals["pause_s"] += await self._engine.update(buckets, weights.version, weights.adapter)
            except BucketGone as gone:
                newer = await self._hub.newer.remote(weights.version, 1.0)
                if newer and newer[1].version != weights.version:  # pulling takes as long as a step: no fault
                    weights, deadline = newer[1], time.monotonic() + GONE_S
                elif time.monotonic() > deadline:
                    raise RuntimeError(f"{self._name} cannot pull version {weights.version}: {gone}") from gone
            else:
                self._hold(weights.version, weights.checksum)

    async def _join(self, ranks: int) -> None:
        await self._hub.join.remote(self._name, ray.get_runtime_context().current_actor, self._life, ranks)

    def _end(self, died: BaseException) -> NoReturn:
        print(f"{self._name} starts anew: {died}", file=sys.stderr, flush=True)
        os._exit(1)

    def _hold(self, version: int, checksum: int) -> None:
        """The engine has these weights now."""
        self._current = version, checksum
        if self._slept is not None:
            self.totals["asleep_s"] += time.monotonic() - self._slept
            self._slept = None
        self.totals["weights_checksum"] = checksum
        metrics.gauge("policy_version", updates(version), stage=self.stage)
