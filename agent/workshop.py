"""Where a document is worked on at test time: the writer, the tools and the judges behind it, and what they were asked.

What a question requires is not known at test time. The candidates tell: a *plan* is the tools that an answer calls, and
its share of the candidates the chance that it is what was wanted. Judges score a document as what they expect it to be
worth over these plans, so that of two good answers the one wins that most others agree with (minimum Bayes risk).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from agent.answer import Document, write
from agent.protocol import Text, parse
from agent.render import Made
from agent.spec import PUBLISHED, ToolSpec
from replay.record import Blob

Messages = Sequence[Mapping[str, str]]
#: The tools that an answer calls, in order.
Plan = tuple[str, ...]
#: Call (`call_key`) -> further parameters that it is run with.
Choices = Mapping[str, Mapping[str, Any]]


class CannotWrite(Exception):
    """The writer cannot take up this conversation, for it is too long."""


class Unjudged(Exception):
    """The judges gave no score. Says why."""


@dataclass(frozen=True)
class Draft:
    """A whole answer: its text, the tokens that were sampled for it, and whether it came to its own end."""

    text: str
    tokens: int
    finished: bool = True


class Writer(Protocol):
    """A policy that writes."""

    async def write(self, messages: Messages, written: str, seed: int) -> Draft:
        """The next answer of a conversation, which begins with `written`.

        Raises:
            CannotWrite: it is too long.
        """
        ...


class Tools(Protocol):
    """The tools of the protocol."""

    async def run(self, tool: str, params: Mapping[str, Any], images: Sequence[Blob]) -> Made:
        """What a call made; `params` may hold `rank` or `seed` besides the protocol's own."""
        ...


class Judges(Protocol):
    """Judges of finished documents."""

    async def score(self, document: Document, plans: Mapping[Plan, float]) -> float:
        """What the document is worth, 0..1, in the mean over the plans that may have been wanted.

        Args:
            plans: plan -> its chance.

        Raises:
            Unjudged: no score can be had.
        """
        ...


@dataclass(frozen=True)
class Version:
    """A rendered document with its score; None where it was not judged."""

    document: Document
    choices: Choices
    score: float | None = None

    @property
    def faults(self) -> int:
        """Calls that failed, and what is wrong with charts."""
        return self.document.failures + sum(len(c.provenance.get("warnings", ())) for c in self.document.calls)

    def beats(self, other: Version) -> bool:
        """Whether it has a higher score, or the same with fewer faults; by faults alone if one was not judged."""
        if self.score is None or other.score is None:
            return self.faults < other.faults
        return (round(self.score, 6), -self.faults) > (round(other.score, 6), -other.faults)


@dataclass
class Spent:
    """What was spent so far."""

    tokens: int = 0
    calls: int = 0
    judged: int = 0


class Workshop:
    """What the stages work with: it writes, renders and scores, and counts all that. Equal calls are run once.

    Args:
        messages: the conversation; the last message is the question.
        given: the user's pictures.
        seed: of the first draft; each further one has another.
        document_s: seconds that the calls of one rendering may take.
    """

    def __init__(
        self,
        messages: Messages,
        given: Sequence[Blob],
        writer: Writer,
        tools: Tools,
        judges: Judges,
        specs: Mapping[str, ToolSpec] = PUBLISHED,
        document_s: float | None = None,
        seed: int = 0,
    ) -> None:
        self.messages, self.given, self.specs = messages, given, specs
        self.plans: Mapping[Plan, float] = {}
        self.unjudged = ""  # why the judges gave no score, the last time that they gave none
        self.spent = Spent()
        self._writer, self._tools, self._judges = writer, tools, judges
        self._document_s, self._seed = document_s, seed
        self._made: dict[str, asyncio.Future[Made]] = {}

    async def drafts(self, tasks: Sequence[tuple[Messages, str]]) -> list[Draft]:
        """An answer for each (conversation, beginning), less those that cannot be had."""
        seeds = range(self._seed, self._seed + len(tasks))
        self._seed += len(tasks)
        answers = await asyncio.gather(*(self._draft(m, w, s) for (m, w), s in zip(tasks, seeds, strict=True)))
        return [draft for draft in answers if draft is not None]

    async def version(self, draft: Draft, choices: Choices | None = None) -> Version:
        """The draft rendered, without a score."""
        chosen = choices or {}

        async def run(tool: str, params: Mapping[str, Any], images: Sequence[Blob]) -> Made:
            return await self._run(tool, {**params, **chosen.get(call_key(tool, params), {})}, images)

        question = self.messages[-1]["content"]
        document = await write(question, _once(draft.text), self.given, run, self.specs, self._document_s)
        return Version(replace(document, finished=draft.finished), chosen)

    async def scored(self, version: Version) -> Version:
        """With its score, if the judges give one."""
        self.spent.judged += 1
        try:
            return replace(version, score=await self._judges.score(version.document, self.plans))
        except Unjudged as why:
            self.unjudged = str(why)
            return version

    async def best(self, now: Version, tries: Sequence[tuple[Draft, Choices]]) -> Version:
        """The best of what there is and what else was tried; the first of equals."""
        for other in await asyncio.gather(*(self._try(*one) for one in tries)):
            if other.beats(now):
                now = other
        return now

    def close(self) -> None:
        """Stop the calls that still run."""
        for call in self._made.values():
            call.cancel()

    async def _try(self, draft: Draft, choices: Choices) -> Version:
        return await self.scored(await self.version(draft, choices))

    async def _draft(self, messages: Messages, written: str, seed: int) -> Draft | None:
        try:
            draft = await self._writer.write(messages, written, seed)
        except CannotWrite:
            return None
        self.spent.tokens += draft.tokens
        return draft

    async def _run(self, tool: str, params: Mapping[str, Any], images: Sequence[Blob]) -> Made:
        key = json.dumps([call_key(tool, params), [image.sha256 for image in images]])
        if key not in self._made:
            self.spent.calls += 1
            self._made[key] = asyncio.ensure_future(self._tools.run(tool, params, images))
        return await asyncio.shield(self._made[key])


def call_key(tool: str, params: Mapping[str, Any]) -> str:
    """What tells one call from another."""
    return json.dumps([tool, params], sort_keys=True, ensure_ascii=False)


def plan_of(text: str, specs: Mapping[str, ToolSpec]) -> Plan:
    """The tools that an answer calls, or means to call in a malformed tag."""
    return tuple(s.source for s in parse(text, specs) if not isinstance(s, Text) and s.source in specs)


async def _once(text: str) -> AsyncIterator[str]:
    yield text
