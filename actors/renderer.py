"""Renderers: claim documents, run their calls on the tool servers, put the outcomes with all pictures."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import ray

from actors.serving import Outage, ToolClient
from actors.worker import StageWorker
from agent.render import Made, render
from agent.spec import ToolSpec
from replay.record import SCHEMAS, Blob

COLUMNS = ["text", "given"]
OUTAGE_PAUSE_S = 0.5  # doubles from round to round
MAX_OUTAGES = 5  # of one document; then it is dropped with the reason, unscored


@ray.remote
class Renderer(StageWorker):
    """Renders documents, `concurrency` at a time.

    Args:
        store: handle.
        pool: name prefix of the Serve applications.
        tools: tool name -> seconds a call may take.
        specs: the protocol's tools.
        document_s: seconds that all calls of a document may take.
    """

    stage = "render"

    def __init__(
        self,
        store: Any,
        pool: str,
        tools: Mapping[str, float],
        specs: Mapping[str, ToolSpec],
        document_s: float,
        concurrency: int = 16,
    ) -> None:
        super().__init__(store)
        self._specs, self._document_s = specs, document_s
        self._tools = {name: ToolClient(pool, name, timeout_s) for name, timeout_s in tools.items()}
        self._slots = asyncio.Semaphore(concurrency)
        self._batch = concurrency
        self._outages: dict[str, int] = {}

    async def loop(self) -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                await self._slots.acquire()
                self._slots.release()
                claim = await self.claim("generated", limit=self._batch, columns=COLUMNS, wait_s=5.0)
                if claim is None:
                    continue
                rows = claim.rows.to_pylist()
                self.begin(len(rows))
                for row in rows:
                    await self._slots.acquire()
                    group.create_task(self._render(claim.token, row))

    async def _render(self, token: int, row: dict[str, Any]) -> None:
        started, name = time.monotonic(), row["trajectory"]
        try:
            given = await self._store.blobs(row["given"]) if row["given"] else {}
            async with asyncio.timeout(self._document_s):
                calls, made = await render(row["text"], [given[s] for s in row["given"]], self._run, self._specs)
        except Outage as outage:
            await self._outage(token, name, str(outage))
        except TimeoutError:  # what its calls made by then waits in the servers' caches
            await self._outage(token, name, f"the calls of the document did not end in {self._document_s:g} s")
        except Exception as error:  # a fault of ours; it must not take the other documents with it
            await self._outage(token, name, f"rendering broke: {type(error).__name__}: {error}")
        else:
            self.failed("call", sum(c.status != "ok" for c in calls))
            key = {k: row[k] for k in ("trajectory", "group", "attempt")} | {"turn": 0}
            seconds = time.monotonic() - started
            table = pa.Table.from_pylist(
                [key | {"calls": [c.row() for c in calls], "finished": True, "seconds": seconds}],
                SCHEMAS["rendered"],
            )
            await self._store.put("rendered", table, made)
            self._outages.pop(name, None)
            self.end(1, seconds)
        finally:
            self._slots.release()

    async def _run(self, tool: str, params: Mapping[str, Any], images: Sequence[Blob]) -> Made:
        return await self._tools[tool].run(params, images)

    async def _outage(self, token: int, name: str, outage: str) -> None:
        """Infrastructure failed, not the document: try again later, at last drop it with the reason."""
        self.failed("infrastructure")
        self._outages[name] = self._outages.get(name, 0) + 1
        if self._outages[name] < MAX_OUTAGES:
            await asyncio.sleep(OUTAGE_PAUSE_S * 2 ** self._outages[name])
            await self._store.release(token, [name])
        else:
            del self._outages[name]
            await self._store.ack(token, {name: ("dropped_data", f"{outage} ({MAX_OUTAGES} times)")})
            self.failed("data")
        self.end(1)
