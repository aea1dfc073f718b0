"""Documents being made: each is a job, which several may follow, and which ends whatever becomes of them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from agent.answer import Document, News, Usage, of_events
from agent.render import Began, CallOutcome, Ended, Wrote
from agent.service.files import new_id
from replay.record import Blob

TRIES = 3  # of a document whose agent is lost
PAUSE_S = 0.5  # before the next

WRITING, DONE, FAILED, CANCELLED = "writing", "done", "failed", "cancelled"


class AgentLost(Exception):
    """The agent's worker is gone or broke; another one can go on."""


class Refused(Exception):
    """The question cannot be answered, whoever is asked."""


@dataclass(frozen=True)
class Question:
    """What an agent is asked.

    Attributes:
        messages: the conversation, `role` and `content` each; the last one is the user's.
        given: the user's pictures, in order.
        sampling: vLLM's SamplingParams that differ from the service's own.
        scale: how often anything may be tried (`agent.scaling`); 1 is one answer, told as it is written.
        learn: it may be trained on, so that its tokens are wanted too.
        written: what another agent wrote of the answer before it was lost; the new one goes on from there.
    """

    messages: tuple[Mapping[str, str], ...]
    given: tuple[Blob, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    scale: int = 1
    learn: bool = False
    written: str = ""

    @property
    def text(self) -> str:
        """The user's last message."""
        return self.messages[-1]["content"]


class Agents(Protocol):
    """The policies that answer."""

    def weights(self) -> Mapping[str, float]:
        """Policy -> its share of the questions that ask for none."""
        ...

    def write(self, policy: str, question: Question) -> AsyncGenerator[Sequence[News], None]:
        """The events of an answer, several at a time, `question.written` among them.

        Raises:
            AgentLost: another try can succeed.
            Refused: none can.
        """
        ...

    async def ready(self) -> bool:
        """Whether a question would be answered now."""
        ...


class Job:
    """One document, from the question to its end; `follow` tells of it as often as one likes."""

    def __init__(self, policy: str, question: Question, owner: str) -> None:
        self.id, self.created = new_id(), int(time.time())
        self.policy, self.question, self.owner = policy, question, owner
        self.status, self.reason = WRITING, ""
        self.refused = False
        self.feedback: dict[str, object] | None = None
        self.events: list[News] = []
        self.task: asyncio.Task[None] | None = None
        self._news = asyncio.Condition()

    @property
    def usage(self) -> Usage:
        """Tokens of the answer; zeros while it is being written."""
        return next((e for e in reversed(self.events) if isinstance(e, Usage)), Usage(0, 0, ""))

    def document(self) -> Document:
        """What there is of the document."""
        return of_events(self.question.text, self.question.given, self.events)

    async def follow(self, seen: int = 0) -> AsyncIterator[News]:
        """Its events from number `seen` on, until its end."""
        while True:
            async with self._news:
                while seen >= len(self.events) and self.status == WRITING:
                    await self._news.wait()
            for event in self.events[seen:]:
                seen += 1
                yield event
            if self.status != WRITING and seen == len(self.events):
                return

    async def run(self, agents: Agents, deadline_s: float) -> None:
        """Have it written. Ends in every case, also when it is cancelled, with a status and a reason."""
        status, reason = FAILED, ""
        try:
            async with asyncio.timeout(deadline_s):
                await self._write(agents)
            status = DONE
        except TimeoutError:
            reason = f"the document was not done in {deadline_s:g} s"
        except Refused as refused:
            reason, self.refused = str(refused), True
        except AgentLost as lost:
            reason = f"the agent was lost {TRIES} times: {lost}"
        except asyncio.CancelledError:
            status, reason = CANCELLED, "it was cancelled"
        finally:
            self._end_calls(reason or "the agent ended before this call did")
            self.status, self.reason = status, reason
            async with self._news:
                self._news.notify_all()

    async def _write(self, agents: Agents) -> None:
        for attempt in range(TRIES):
            merged = _Merge(self.events)
            question = self.question if not attempt else _with(self.question, merged.text)
            try:
                async with aclosing(agents.write(self.policy, question)) as batches:
                    async for batch in batches:
                        if news := [event for event in batch if merged.is_new(event)]:
                            self.events += merged.cut(news)
                            async with self._news:
                                self._news.notify_all()
                return
            except AgentLost:
                if attempt == TRIES - 1:
                    raise
                await asyncio.sleep(PAUSE_S * random.uniform(1, 2))

    def _end_calls(self, reason: str) -> None:
        """Calls that are still running end with their document."""
        ended = {e.index for e in self.events if isinstance(e, Ended)}
        for event in [e for e in self.events if isinstance(e, Began) and e.index not in ended]:
            outcome = CallOutcome(event.source, event.description, {}, event.start, event.end, "failed", reason)
            self.events.append(Ended(event.index, outcome))


class _Merge:
    """Tells what is new of an answer that is told again from its beginning."""

    def __init__(self, events: Sequence[News]) -> None:
        self.text = "".join(e.text for e in events if isinstance(e, Wrote))
        self._again = len(self.text)  # characters that will be told again
        self._began = {e.index for e in events if isinstance(e, Began)}
        self._ended = {e.index for e in events if isinstance(e, Ended)}

    def is_new(self, event: News) -> bool:
        if isinstance(event, Began):
            return event.index not in self._began
        return not isinstance(event, Ended) or event.index not in self._ended

    def cut(self, events: Sequence[News]) -> list[News]:
        """The events, less the text that is known."""
        out: list[News] = []
        for event in events:
            if isinstance(event, Wrote) and self._again:
                known = min(self._again, len(event.text))
                self._again -= known
                if known == len(event.text):
                    continue
                event = Wrote(event.text[known:])
            out.append(event)
        return out


def _with(question: Question, written: str) -> Question:
    return replace(question, written=written)
