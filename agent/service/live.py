"""A document as Markdown while it is being made, in order: the text waits at a tag until its call has ended."""

from __future__ import annotations

from collections.abc import Callable

from agent.answer import News
from agent.document import strip_marks
from agent.export import figure
from agent.protocol import CLOSE, OPEN
from agent.render import Ended, Wrote
from replay.record import Blob


class Live:
    """Turns events into Markdown that can be sent at once and is never taken back.

    Args:
        link: the address of a picture.
    """

    def __init__(self, link: Callable[[Blob], str]) -> None:
        self._link = link
        self._text, self._at = "", 0  # what was written, and how far it was sent
        self._ended: dict[int, Ended] = {}
        self._next = 0  # the tag that comes next

    def feed(self, event: News) -> str:
        """What can be sent after this event."""
        if isinstance(event, Wrote):
            self._text += event.text
        elif isinstance(event, Ended):
            self._ended[event.index] = event
        return self._ready(len(self._text), whole=False)

    def finish(self) -> str:
        """The rest: nothing more will come."""
        return self._ready(len(self._text), whole=True)

    def _ready(self, end: int, whole: bool) -> str:
        out = ""
        while (tag := self._ended.pop(self._next, None)) is not None:
            out += strip_marks(self._text[self._at : tag.outcome.start]).rstrip() + "\n\n"
            out += figure(tag.outcome, {blob.sha256: blob for blob in tag.images}, self._link) + "\n\n"
            self._at, self._next = tag.outcome.end, self._next + 1
        rest = self._text[self._at : end]
        keep = len(rest) if whole else _safe(rest)
        out += strip_marks(rest[:keep])
        self._at += keep
        return out


def _safe(text: str) -> int:
    """Characters before what is, or may become, a tag; without blanks at their end, since a figure has its own line."""
    opened = text.find(OPEN)
    if opened < 0:
        ends = range(max(len(text) - len(CLOSE), 0), len(text))
        opened = next((i for i in ends if OPEN.startswith(text[i:]) or CLOSE.startswith(text[i:])), len(text))
    return len(text[:opened].rstrip())
