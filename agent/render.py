"""Running the calls of one document: each as soon as the pictures that it points at exist, a failure only its own.

How a call is run is handed in, so that a Serve handle, a thread or a test can do it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agent.protocol import Call, Invalid, check_references, parse
from agent.spec import PUBLISHED, ToolSpec
from replay.record import Blob


@dataclass(frozen=True)
class CallOutcome:
    """One `<imgen>` tag of a document and what became of it (`replay.record.CALL`).

    Attributes:
        start, end: character offsets of the tag in the text.
        status: `ok`, `failed` (it ran, and could not do what was asked) or `invalid` (it could not be run).
        reason: why it is not `ok`.
        images: SHA-256 of the pictures it made, in order.
    """

    source: str
    description: str
    params: Mapping[str, Any]
    start: int
    end: int
    status: str
    reason: str = ""
    images: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def row(self) -> dict[str, Any]:
        """As the store keeps it: mappings are JSON there."""
        plain = vars(self) | {"images": list(self.images)}
        texts = {key: json.dumps(dict(plain[key]), ensure_ascii=False, default=str) for key in _MAPPINGS}
        return plain | texts

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> CallOutcome:
        """The inverse of `row`."""
        return cls(**dict(row) | {key: json.loads(row[key]) for key in _MAPPINGS} | {"images": tuple(row["images"])})


_MAPPINGS = ("params", "provenance")


@dataclass(frozen=True)
class Made:
    """What a call came back with: pictures, or the reason why there are none."""

    images: tuple[Blob, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    failure: str = ""


#: (tool name, params, pictures pointed at) -> what it made. Whatever this raises is infrastructure: it ends `render`.
Run = Callable[[str, Mapping[str, Any], Sequence[Blob]], Awaitable[Made]]


async def render(
    text: str, given: Sequence[Blob], run: Run, specs: Mapping[str, ToolSpec] = PUBLISHED
) -> tuple[list[CallOutcome], list[Blob]]:
    """Run every call of a document.

    Returns:
        The outcome of every tag in order, malformed ones included, and all pictures made.
    """
    tags = [s for s in check_references(parse(text, specs), len(given), specs) if isinstance(s, Call | Invalid)]
    slots: list[asyncio.Future[Made]] = [_done(Made((blob,))) for blob in given]

    async def outcome(call: Call, before: Sequence[asyncio.Future[Made]]) -> tuple[CallOutcome, tuple[Blob, ...]]:
        started = time.monotonic()
        indices = [int(call.params[p]) for p in specs[call.source].image_params]
        sources = [await before[i] for i in indices]
        broken = [i for i, made in zip(indices, sources, strict=True) if not made.images]
        if broken:
            made = Made(failure=f"picture {broken[0]} does not exist: the call that should have made it failed")
        else:
            made = await run(call.source, call.params, [s.images[0] for s in sources])
        status = "failed" if made.failure else "ok"
        place = (call.source, call.description, call.params, call.start, call.end)
        shas = tuple(b.sha256 for b in made.images)
        return CallOutcome(*place, status, made.failure, shas, made.provenance, time.monotonic() - started), made.images

    tasks: list[asyncio.Task[tuple[CallOutcome, tuple[Blob, ...]]] | CallOutcome] = []
    for tag in tags:
        if isinstance(tag, Invalid):
            tasks.append(CallOutcome(tag.source, "", {}, tag.start, tag.end, "invalid", tag.reason))
        else:
            task = asyncio.ensure_future(outcome(tag, list(slots)))
            slots.append(asyncio.ensure_future(_made(task)))
            tasks.append(task)
    running = [t for t in tasks if isinstance(t, asyncio.Task)]
    try:
        done = iter(await asyncio.gather(*running))
    finally:
        for task in running:
            task.cancel()
        for slot in slots:
            slot.cancel()
    results = [(t, ()) if isinstance(t, CallOutcome) else next(done) for t in tasks]
    return [o for o, _ in results], [b for _, images in results for b in images]


async def _made(task: asyncio.Task[tuple[CallOutcome, tuple[Blob, ...]]]) -> Made:
    outcome, images = await asyncio.shield(task)
    return Made(images, outcome.provenance, outcome.reason)


def _done(made: Made) -> asyncio.Future[Made]:
    future: asyncio.Future[Made] = asyncio.get_running_loop().create_future()
    future.set_result(made)
    return future
