"""A service whose agent writes what it is told to, in front of the real API."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from agent.answer import News, Sampled, Stage, Usage, write
from agent.protocol import format_call
from agent.render import Event, Made
from agent.service.core import Options, Service
from agent.service.files import Files
from agent.service.jobs import AgentLost, Question, Refused
from agent.service.keys import Keys, Limits, parse_keys
from replay.record import Blob


def png(colour: str = "red") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(out, "PNG")
    return out.getvalue()


TAG = format_call("search", "A fish", {"query": "fish"})
TEXT = f"They swim.\n\n{TAG}\n\nAnd sleep."


class Scripted:
    """Agents that write one text, in pieces of five characters.

    Args:
        lost_after: characters after which the first so many tries lose their agent.
    """

    def __init__(self, text: str = TEXT, pause_s: float = 0.0, lost_after: Sequence[int] = ()) -> None:
        self.text, self.pause_s, self.lost_after = text, pause_s, list(lost_after)
        self.asked: list[Question] = []
        self.stopped = 0
        self.weight = {"tiny": 1.0, "other": 0.0}
        self.is_ready = True

    def weights(self) -> Mapping[str, float]:
        return self.weight

    async def ready(self) -> bool:
        return self.is_ready

    async def write(self, policy: str, question: Question) -> AsyncGenerator[Sequence[News], None]:
        self.asked.append(question)
        if "refuse" in question.text:
            raise Refused("the question is too long for the model")
        if question.scale > 1:
            yield [Stage("candidates", 20, 2, 2, 0.5, 0.0, (f"{question.scale} answers",))]
        lost_at = self.lost_after.pop(0) if self.lost_after else None
        events: asyncio.Queue[Event | None] = asyncio.Queue()

        async def pieces() -> AsyncIterator[str]:
            yield question.written
            for at in range(len(question.written), len(self.text), 5):
                if lost_at is not None and at >= lost_at:
                    raise AgentLost("its process died")
                await asyncio.sleep(self.pause_s)
                yield self.text[at : at + 5]

        async def run(tool: str, params: Mapping[str, Any], images: Sequence[Blob]) -> Made:
            return Made((Blob(png()),), {"maker": "pond", "licence": "CC0"})

        task = asyncio.create_task(write(question.text, pieces(), question.given, run, tell=events.put_nowait))
        task.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                yield [event]
            task.result()
            yield [Usage(7, 11, "stop", Sampled([1, 2], [3] * 11, [-0.5] * 11) if question.learn else None)]
        except asyncio.CancelledError:
            self.stopped += 1
            raise
        finally:
            task.cancel()


def read(data: bytes) -> Blob:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return Blob(data, Image.MIME[str(image.format)])
    except Exception as error:
        raise ValueError("no picture") from error


def fetch(url: str) -> Blob:
    raise ValueError(f"{url} is at a private address")


def service(tmp_path: Path, agents: Scripted, keys: str = "", learn: bool = False, **limits: int) -> Service:
    of_key = Limits(**{"requests_per_minute": 1000, "documents_at_once": 8} | limits)
    files = Files(str(tmp_path), 3600)
    return Service(agents, Keys(parse_keys(keys), of_key), files, Options(5.0, 1 << 20, read, fetch, learn))
