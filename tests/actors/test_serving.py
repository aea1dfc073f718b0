"""Tool and judge servers without Serve: as many at once as their config says, on however few cores."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from actors import serving
from agent.spec import ToolSpec
from replay.record import Blob
from rewards.base import Rendered, Verdict
from tools.base import ToolResult

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
    server = inside(serving.ToolServer)("together", {}, AT_ONCE)
    made = await asyncio.gather(*(server.run({"k": k}, []) for k in range(AT_ONCE)))
    assert all(m.images for m in made)


async def test_the_documents_of_a_batch_are_judged_at_once_and_in_their_order() -> None:
    server = inside(serving.JudgeServer)(f"{__name__}:Together", {}, AT_ONCE)
    docs = [Rendered("q", "t", [], image_num=k, tools=()) for k in range(AT_ONCE)]
    verdicts = await server.judge(docs)
    assert [v.scores["text"] for v in verdicts] == list(range(AT_ONCE))
