"""An answer whose calls run while it is being written."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from PIL import Image

from agent.answer import Document, write
from agent.export import to_page
from agent.protocol import format_call
from agent.render import Made, Run
from replay.record import Blob


def picture(kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(out, kind)
    return out.getvalue()


async def illustrate(
    question: str, told: AsyncIterator[str], given: Sequence[Blob], run: Run, document_s: float
) -> Document:
    return await write(question, told, given, run, document_s=document_s)


async def run(tool: str, params: Mapping[str, Any], images: Sequence[Blob]) -> Made:
    if tool == "search":
        return Made(failure="tool 'search' is gone")
    if tool == "diffusion":
        return Made(failure="no such scene")
    return Made((images[0] if images else Blob(picture()),), {"figures": 1, "odd": {1}})


async def pieces(text: str, size: int = 5, pause_s: float = 0.0) -> AsyncIterator[str]:
    for at in range(0, len(text), size):
        await asyncio.sleep(pause_s)
        yield text[at : at + size]


async def test_every_call_is_told_of_and_an_outage_costs_its_own_picture_alone() -> None:
    text = "\n".join(
        [
            format_call("code", "bars", {"code": "plt.bar([1], [2])"}),
            format_call("search", "a tower", {"query": "tower"}),
            format_call("diffusion", "a cat", {"prompt": "cat"}),
            format_call("edit", "the given one", {"img_index": 0, "prompt": "make it grey"}),
            "<imgen>{'source': 'code'}</imgen>",
            "Words <b>stay</b> words.",
        ]
    )
    given = Blob(picture("JPEG"), "image/jpeg")
    document = await illustrate("What? " * 100, pieces(text), [given], run, 60)
    assert document.text == text
    assert [c.status for c in document.calls] == ["ok", "failed", "failed", "ok", "invalid"]
    assert [c.reason for c in document.calls[1:3]] == ["tool 'search' is gone", "no such scene"]
    assert document.calls[3].images == (given.sha256,)
    assert set(document.blobs) == {Blob(picture()).sha256, given.sha256}
    html = to_page(document)
    assert "search - tool &#x27;search&#x27; is gone" in html and "<b>" not in html
    assert "picture 1 given with the question" in html
    assert document.calls[3].provenance["origins"] == [{"given": 0}]


async def test_an_empty_answer_is_a_document_without_calls() -> None:
    document = await illustrate("Nothing?", pieces(""), [], run, 60)
    assert (document.text, document.calls, document.blobs) == ("", (), {})
    assert "<h1>Nothing?</h1>" in to_page(document)


async def test_a_slow_call_begins_and_ends_while_the_text_is_still_being_written() -> None:
    spans: dict[str, list[float]] = {}

    async def slow(tool: str, params: Mapping[str, Any], images: Sequence[Blob]) -> Made:
        spans[params["code"]] = [time.monotonic()]
        await asyncio.sleep(0.3)
        spans[params["code"]].append(time.monotonic())
        return Made((Blob(picture()),))

    async def writing() -> AsyncIterator[str]:
        async for piece in pieces(text, 20, 0.02):
            yield piece
        spans["text"] = [started, time.monotonic()]

    words = "Many words follow. " * 40
    text = format_call("code", "d", {"code": "early"}) + words + format_call("code", "d", {"code": "late"})
    started = time.monotonic()
    document = await illustrate("Draw.", writing(), [], slow, 60)
    assert [c.status for c in document.calls] == ["ok", "ok"] and document.text == text
    assert spans["early"][1] < spans["text"][1] <= spans["late"][1]


async def test_calls_that_do_not_end_in_time_cost_their_pictures_alone() -> None:
    async def stuck(tool: str, params: Mapping[str, Any], images: Sequence[Blob]) -> Made:
        if tool == "code":
            await asyncio.sleep(60)
        return Made((Blob(picture()),))

    text = format_call("code", "d", {"code": "x"}) + format_call("search", "d", {"query": "x"})
    document = await illustrate("Draw.", pieces(text), [], stuck, 0.2)
    assert [c.status for c in document.calls] == ["failed", "ok"]
    assert "0.2 s were over" in to_page(document)
