"""Running the calls of one document: each as soon as its tag is closed and the pictures that it points at exist.

A failure is only its own. How a call is run is handed in, so that a Serve handle, a thread or a test can do it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

from agent.protocol import CLOSE, Call, Invalid, check_references, parse
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

#: What is told of a picture that another one was made from.
_ORIGIN = ("title", "author", "licence", "url", "page", "fetched", "source", "maker", "model", "given")


@dataclass(frozen=True)
class _Ended:
    """A call that has ended, with its pictures."""

    outcome: CallOutcome
    images: tuple[Blob, ...] = ()


@dataclass(frozen=True)
class Wrote:
    """More of the text."""

    text: str


@dataclass(frozen=True)
class Began:
    """Tag `index` has closed, from `start` to `end` of the text, and its call runs."""

    index: int
    source: str
    description: str
    start: int
    end: int


@dataclass(frozen=True)
class Ended:
    """What became of tag `index`, with its pictures. A malformed tag ends without having begun."""

    index: int
    outcome: CallOutcome
    images: tuple[Blob, ...] = ()


Event = Wrote | Began | Ended
Tell = Callable[[Event], None]


class Rendering:
    """A document whose calls run while its text is still being written; a context, which stops what runs at its end.

    Args:
        given: the user's pictures.
        run: runs a call.
        specs: the protocol's tools.
        tell: is told of every event as it happens.
    """

    def __init__(
        self,
        given: Sequence[Blob],
        run: Run,
        specs: Mapping[str, ToolSpec] = PUBLISHED,
        tell: Tell = lambda event: None,
    ) -> None:
        self._run, self._specs, self._tell = run, specs, tell
        self._rest, self._at = "", 0  # the text that was not read yet, and where it begins
        self._slots: list[asyncio.Future[_Ended]] = [_given(i, blob) for i, blob in enumerate(given)]
        self._tags: list[CallOutcome | tuple[Call, asyncio.Task[_Ended]]] = []

    def feed(self, text: str) -> None:
        """Add text to the document. The calls whose tags it closes begin."""
        if text:
            self._tell(Wrote(text))
        seen = max(len(self._rest) - len(CLOSE) + 1, 0)
        self._rest += text
        if (closed := self._rest.rfind(CLOSE, seen)) >= 0:
            self._read(closed + len(CLOSE))

    async def finish(self, timeout_s: float | None = None) -> tuple[list[CallOutcome], list[Blob]]:
        """The text is whole: wait for its calls.

        Args:
            timeout_s: a call that has not ended by then has `failed`, and the others are kept.

        Returns:
            The outcome of every tag in order, malformed ones included, and all pictures made.
        """
        self._read(len(self._rest))
        if running := self._running():
            await asyncio.wait(running, timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION)
        for task in running:
            if task.done():
                task.result()  # raises what was no call's fault
        why = f"the document's {timeout_s or 0:g} s were over before this call ended"
        ended = []
        for i, tag in enumerate(self._tags):
            if isinstance(tag, CallOutcome):
                ended.append(_Ended(tag))
            elif tag[1].done():
                ended.append(tag[1].result())
            else:
                ended.append(_failed(tag[0], why))
                self._tell(Ended(i, ended[-1].outcome))
        return [e.outcome for e in ended], [blob for e in ended for blob in e.images]

    async def __aenter__(self) -> Rendering:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None
    ) -> None:
        running = self._running()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _running(self) -> list[asyncio.Task[_Ended]]:
        return [tag[1] for tag in self._tags if not isinstance(tag, CallOutcome)]

    def _read(self, end: int) -> None:
        """Read the tags of the text up to `end`, which lies behind a closed one or at the document's end."""
        segments = check_references(parse(self._rest[:end], self._specs), len(self._slots), self._specs)
        for tag in segments:
            if isinstance(tag, Invalid):
                place = (tag.start + self._at, tag.end + self._at)
                invalid = CallOutcome(tag.source, "", {}, *place, "invalid", tag.reason)
                self._tell(Ended(len(self._tags), invalid))
                self._tags.append(invalid)
            elif isinstance(tag, Call):
                call = replace(tag, start=tag.start + self._at, end=tag.end + self._at)
                before = [self._slots[i] for i in self._specs[call.source].pictures(call.params)]
                self._tell(Began(len(self._tags), call.source, call.description, call.start, call.end))
                task = asyncio.get_running_loop().create_task(self._outcome(len(self._tags), call, before))
                self._slots.append(task)
                self._tags.append((call, task))
        self._rest, self._at = self._rest[end:], self._at + end

    async def _outcome(self, index: int, call: Call, before: Sequence[asyncio.Future[_Ended]]) -> _Ended:
        ended = await self._call(call, before)
        self._tell(Ended(index, ended.outcome, ended.images))
        return ended

    async def _call(self, call: Call, before: Sequence[asyncio.Future[_Ended]]) -> _Ended:
        started = time.monotonic()
        sources = [await asyncio.shield(slot) for slot in before]
        indices = self._specs[call.source].pictures(call.params)
        broken = [i for i, source in zip(indices, sources, strict=True) if not source.images]
        if broken:
            why = f"picture {broken[0]} does not exist: the call that should have made it failed"
            return _failed(call, why, time.monotonic() - started)
        made = await self._run(call.source, call.params, [s.images[0] for s in sources])
        seconds = time.monotonic() - started
        if made.failure:
            return _failed(call, made.failure, seconds, made.provenance)
        provenance = {"maker": call.source, **made.provenance}
        if origins := _origins(s.outcome.provenance for s in sources):
            provenance["origins"] = origins
        place = (call.source, call.description, call.params, call.start, call.end)
        shas = tuple(b.sha256 for b in made.images)
        return _Ended(CallOutcome(*place, "ok", "", shas, provenance, seconds), made.images)


async def render(
    text: str, given: Sequence[Blob], run: Run, specs: Mapping[str, ToolSpec] = PUBLISHED
) -> tuple[list[CallOutcome], list[Blob]]:
    """Run every call of a document whose text is whole.

    Returns:
        The outcome of every tag in order, malformed ones included, and all pictures made.
    """
    async with Rendering(given, run, specs) as rendering:
        rendering.feed(text)
        return await rendering.finish()


def _given(index: int, blob: Blob) -> asyncio.Future[_Ended]:
    """A picture of the user's, as if a call had made it."""
    future: asyncio.Future[_Ended] = asyncio.get_running_loop().create_future()
    outcome = CallOutcome("", "", {}, 0, 0, "ok", "", (blob.sha256,), {"given": index})
    future.set_result(_Ended(outcome, (blob,)))
    return future


def _failed(call: Call, why: str, seconds: float = 0.0, provenance: Mapping[str, Any] | None = None) -> _Ended:
    place = (call.source, call.description, call.params, call.start, call.end)
    return _Ended(CallOutcome(*place, "failed", why, (), provenance or {}, seconds))


def _origins(provenances: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the pictures pointed at come from, and those that they were made from, back to the first; each once."""
    found: list[dict[str, Any]] = []
    for provenance in provenances:
        for origin in ({k: provenance[k] for k in _ORIGIN if k in provenance}, *provenance.get("origins", ())):
            if origin not in found:
                found.append(origin)
    return found
