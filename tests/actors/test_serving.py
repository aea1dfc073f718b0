"""Tool and judge servers without Serve: as many at once as their config says, on however few cores."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from actors import serving
from agent.spec import ToolSpec
from replay.record import Blob
from rewards.base import Rendered, Verdict
from tools.base import CallFailed, ToolResult

AT_ONCE = 40


class Together:
    """A tool and a judge that answer only when all are there."""

    spec = ToolSpec("together", {"k": int}, "for tests")
    name, sees_images = "together", False
    barrier = threading.Barrier(AT_ONCE)

    def run(self, params: Mapping[str, Any], images: Sequence[Blob]) -> ToolResult:
        self.barrier.wait(20)
        return ToolResult((Blob(b"picture"),))

    def judge(self, doc: Rendered) -> Verdict:
        self.barrier.wait(20)
        return Verdict({"text": float(doc.image_num)})


def inside(deployment: Any) -> Any:
    """The class of a Serve deployment."""
    return deployment.func_or_class


async def test_a_tool_takes_as_many_calls_at_once_as_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "load", lambda name: Together)
    server = inside(serving.ToolServer)("together", "together", {}, AT_ONCE, 30.0)
    made = await asyncio.gather(*(server.run({"k": k}, []) for k in range(AT_ONCE)))
    assert all(m.images for m in made)


async def test_the_documents_of_a_batch_are_judged_at_once_and_in_their_order() -> None:
    server = inside(serving.JudgeServer)(f"{__name__}:Together", {}, AT_ONCE, 30.0)
    docs = [Rendered("q", "t", [], image_num=k, tools=()) for k in range(AT_ONCE)]
    verdicts = await server.judge(docs)
    assert [v.scores["text"] for v in verdicts] == list(range(AT_ONCE))


class Batched:
    """A tool that takes several calls at once, after a first that holds its thread; it notes what it was given."""

    spec = ToolSpec("batched", {"k": int}, "for tests")
    batch = 4

    def __init__(self, broken: int = -1) -> None:
        self.seen: list[list[int]] = []
        self._broken = broken

    def run_many(self, calls: Sequence[tuple[Mapping[str, Any], Sequence[Blob]]]) -> list[ToolResult | CallFailed]:
        ks = [params["k"] for params, _ in calls]
        self.seen.append(ks)
        if 0 in ks:
            time.sleep(0.2)
        if self._broken in ks:
            raise MemoryError("too large")
        return [CallFailed("odd") if k % 2 else ToolResult((Blob(b"%d" % k),)) for k in ks]

    def cost(self, params: Mapping[str, Any]) -> float:
        return 0.25


def tool_server(**options: Any) -> Any:
    return inside(serving.ToolServer)("batched", f"{__name__}:Batched", options, 8, 30.0)


async def test_calls_that_wait_for_a_busy_tool_are_gathered_and_answered_each_with_its_own() -> None:
    server = tool_server()
    made = await asyncio.gather(*(server.run({"k": k}, []) for k in range(8)))
    assert [m.images[0].data if m.images else m.failure for m in made] == [
        b"0", "odd", b"2", "odd", b"4", "odd", b"6", "odd"
    ]  # fmt: skip
    assert server._tool.seen in ([[0, 1, 2, 3], [4, 5, 6, 7]], [[0], [1, 2, 3, 4], [5, 6, 7]])


async def test_a_call_that_breaks_its_batch_costs_that_call_alone() -> None:
    server = tool_server(broken=2)
    results = await asyncio.gather(*(server.run({"k": k}, []) for k in range(6)), return_exceptions=True)
    assert isinstance(results[2], MemoryError)
    assert [r.failure or r.images[0].data for r in results if not isinstance(r, BaseException)] == [
        b"0", "odd", "odd", b"4", "odd"
    ]  # fmt: skip
    again = await asyncio.gather(server.run({"k": 2}, []), return_exceptions=True)
    assert isinstance(again[0], MemoryError)  # a failure of ours is not kept
    assert sum(ks == [2] for ks in server._tool.seen) == 2


async def test_the_cache_keeps_results_within_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "CACHE_BYTES", 3)
    server = tool_server()
    for k in (2, 4, 6, 8, 2, 8):
        await server.run({"k": k}, [])
    assert server._tool.seen == [[2], [4], [6], [8], [2]]
    assert server._cached_bytes == 3


class Sick:
    """A tool that hangs, breaks and is closed as it is told."""

    spec = ToolSpec("sick", {"do": str}, "for tests")
    release = threading.Event()

    def __init__(self) -> None:
        self.broken, self.closed = "", 0

    def run(self, params: Mapping[str, Any], images: Sequence[Blob]) -> ToolResult:
        if params["do"] == "hang":
            self.release.wait(20)
        if params["do"] == "exit":
            raise SystemExit(3)
        return ToolResult((Blob(b"picture"),))

    def check(self) -> None:
        if self.broken:
            raise RuntimeError(self.broken)

    def close(self) -> None:
        self.closed += 1


async def test_a_server_is_unwell_when_its_tool_is_broken_or_hangs_in_all_threads() -> None:
    server = inside(serving.ToolServer)("sick", f"{__name__}:Sick", {}, 1, 0.1)
    await server.check_health()
    server._tool.broken = "the GPU fell off"
    with pytest.raises(RuntimeError, match="fell off"):
        await server.check_health()
    server._tool.broken = ""
    hanging = asyncio.create_task(server.run({"do": "hang"}, []))
    await asyncio.sleep(0.1)
    await server.check_health()
    await asyncio.sleep(0.2)
    with pytest.raises(RuntimeError, match=r"all calls of tool 'sick' have hung for 0\.2 s"):
        await server.check_health()
    Sick.release.set()
    assert (await hanging).images
    await server.check_health()


async def test_a_tool_that_ends_its_thread_fails_that_call_alone_and_a_tool_is_closed_once() -> None:
    server = inside(serving.ToolServer)("sick", f"{__name__}:Sick", {}, 1, 5.0)
    with pytest.raises(RuntimeError, match="ended its thread"):
        await server.run({"do": "exit"}, [])
    assert (await server.run({"do": "draw"}, [])).images
    tool = server._tool
    server.__del__()  # as Serve does when it stops a replica
    server.__del__()
    assert tool.closed == 1
