"""Rollout workers: claim prompts, let vLLM write, put what it wrote; and follow the policy's versions meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from actors import metrics
from actors.engine import Engine
from actors.weights import pull
from actors.worker import StageWorker
from replay.record import SCHEMAS, updates
from replay.store import Claim

COLUMNS = ["question", "given", "seed"]


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
        scratch: folder in shared memory for incoming weights.
        name: in rows and metrics.
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
        scratch: str,
        name: str,
    ) -> None:
        super().__init__(store)
        self._hub, self._name = hub, name
        self._model, self._sampling, self._system, self._options = model, dict(sampling), system, dict(engine)
        self._weights = Path(scratch) / f"{name}.safetensors"
        self._free, self._concurrency = concurrency, concurrency
        self._done: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._purpose: str | None = None

    async def setup(self) -> None:
        version, weights = await self._hub.newer.remote(None, 60.0)
        self._engine = Engine(self._model, version, self._options)
        await self._engine.start()
        if weights is not None:
            await self._update(version, weights)

    async def loop(self) -> None:
        async with asyncio.TaskGroup() as group:
            self._group = group
            group.create_task(self._claim())
            group.create_task(self._put())
            group.create_task(self._follow())

    async def focus(self, purpose: str | None) -> None:
        """Claim only prompts of this purpose (an evaluation), or any."""
        self._purpose = purpose

    async def version(self) -> int:
        return self._engine.version

    async def _claim(self) -> None:
        while True:
            if self._free <= 0:
                await asyncio.sleep(0.02)
                continue
            claim = await self.claim(
                "pending", limit=1, by_group=True, columns=COLUMNS, purpose=self._purpose, wait_s=5.0
            )
            if claim is not None:
                self._start(claim)

    def _start(self, claim: Claim) -> None:
        rows = claim.rows.to_pylist()
        self._free -= len(rows)
        self.begin(len(rows))
        for row in rows:
            self._group.create_task(self._sample(row))

    async def _sample(self, row: dict[str, Any]) -> None:
        started = time.monotonic()
        ids = self._engine.prompt_ids(row["question"], self._system)
        out = await self._engine.complete(
            f"{row['trajectory']}@{row['attempt']}", ids, self._sampling | {"seed": row["seed"]}
        )
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
        while True:
            newer = await self._hub.newer.remote(self._engine.version, 30.0)
            if newer is not None and newer[1] is not None:
                await self._update(*newer)

    async def _update(self, version: int, weights: list[Any]) -> None:
        await pull(weights, self._weights)
        self.totals["pause_s"] += await self._engine.update(self._weights, version)
        self._weights.unlink()
        metrics.gauge("policy_version", updates(version), stage=self.stage)
