"""One answer, from its first word to the finished document."""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from agent.render import Began, CallOutcome, Ended, Event, Rendering, Run, Tell, Wrote
from agent.spec import PUBLISHED, ToolSpec
from replay.record import Blob


@dataclass(frozen=True)
class Stage:
    """A stage of test-time scaling is over.

    Attributes:
        name: one of `agent.scaling.STAGES`.
        tokens, calls, judged, seconds: what it spent: tokens sampled, calls run, documents scored.
        score: of the document that it leaves, 0 where it has none yet.
        changed: what it did, a line each.
    """

    name: str
    tokens: int
    calls: int
    judged: int
    seconds: float
    score: float
    changed: tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """A finished answer.

    Attributes:
        question: what the user asked.
        text: the raw answer, tags included.
        calls: every tag in order, malformed ones too.
        blobs: the pictures made, by SHA-256.
        given: the user's own pictures.
        finished: False if it was cut off at the token limit.
        scaling: the stages of test-time scaling that it went through.
    """

    question: str
    text: str
    calls: tuple[CallOutcome, ...] = ()
    blobs: Mapping[str, Blob] = field(default_factory=dict)
    given: tuple[Blob, ...] = ()
    finished: bool = True
    scaling: tuple[Stage, ...] = ()

    @property
    def failures(self) -> int:
        """Tags that did not become a picture."""
        return sum(call.status != "ok" for call in self.calls)


@dataclass(frozen=True)
class Sampled:
    """An answer as the policy sampled it, to be trained on: its prompt, its tokens, and a log-prob for each."""

    prompt_ids: Sequence[int]
    token_ids: Sequence[int]
    logprobs: Sequence[float]


@dataclass(frozen=True)
class Usage:
    """The text is whole.

    Attributes:
        prompt_tokens, tokens: of the question with its frame, and of the answer.
        finish: `stop`, or `length` where the answer was cut off.
        sampled: where it is wanted, and the text is one sample of the policy's.
    """

    prompt_tokens: int
    tokens: int
    finish: str
    sampled: Sampled | None = None


#: What is told of an answer while it is made.
News = Event | Usage | Stage


def of_events(question: str, given: Sequence[Blob], events: Iterable[News]) -> Document:
    """The document as far as the events tell; a call that has not ended has the status `running`."""
    text, calls, blobs, stages = "", dict[int, CallOutcome](), dict[str, Blob](), list[Stage]()
    for event in events:
        if isinstance(event, Wrote):
            text += event.text
        elif isinstance(event, Began):
            calls[event.index] = CallOutcome(event.source, event.description, {}, event.start, event.end, "running")
        elif isinstance(event, Ended):
            calls[event.index] = event.outcome
            blobs |= {blob.sha256: blob for blob in event.images}
        elif isinstance(event, Stage):
            stages.append(event)
    ordered = tuple(calls[i] for i in sorted(calls))
    return Document(question, text, ordered, blobs, tuple(given), scaling=tuple(stages))


def events_of(document: Document) -> list[Event]:
    """A finished document as it would have been told of while it was made."""
    events: list[Event] = [Wrote(document.text)]
    for i, call in enumerate(document.calls):
        if call.status != "invalid":
            events.append(Began(i, call.source, call.description, call.start, call.end))
        events.append(Ended(i, call, tuple(document.blobs[sha] for sha in call.images)))
    return events


async def write(
    question: str,
    pieces: AsyncIterable[str],
    given: Sequence[Blob],
    run: Run,
    specs: Mapping[str, ToolSpec] = PUBLISHED,
    document_s: float | None = None,
    tell: Tell = lambda event: None,
) -> Document:
    """Run the calls of an answer while it is being written.

    Args:
        pieces: of the answer's text.
        run: runs a call; it must not raise for an outage, which costs the document a picture and not its text.
        document_s: seconds after the text's end in which the calls must end; those that do not have failed.
        tell: is told of every event as it happens.
    """

    written: list[str] = []
    async with Rendering(given, run, specs, tell) as rendering:
        async for piece in pieces:
            written.append(piece)
            rendering.feed(piece)
        calls, made = await rendering.finish(document_s)
    return Document(question, "".join(written), tuple(calls), {b.sha256: b for b in made}, tuple(given))
