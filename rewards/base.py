"""What the rewards look at, and the one interface of all judges.

A judge reads a `Rendered` document and gives a `Verdict`. A judge that cannot give one raises `JudgeFailed`; the
trajectory is then tried again and at last set aside, never scored low for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from agent.render import CallOutcome as CallOutcome
from replay.record import Blob


class JudgeFailed(Exception):
    """The judge gave no usable verdict. Never charged to the policy."""


@dataclass(frozen=True)
class Rendered:
    """A rendered document as rewards see it.

    Attributes:
        question: what the user asked.
        text: the raw answer, tags included.
        calls: every tag in order, malformed ones as `invalid`.
        image_num: required images (-1 none, 0 free, 99 at least one, N exactly N).
        tools: required tools.
        given: the user's images.
        blobs: every picture of the document by SHA-256 (empty for judges that do not see).
        finished: False if the answer was cut off at the token limit.
    """

    question: str
    text: str
    calls: Sequence[CallOutcome]
    image_num: int
    tools: tuple[str, ...]
    given: tuple[Blob, ...] = ()
    blobs: Mapping[str, Blob] = field(default_factory=dict)
    finished: bool = True


@dataclass(frozen=True)
class Verdict:
    """A judge's scores, criterion -> 1..5, with a reason each.

    `disagreement` is the standard deviation of a score among the answers or judges that it is the mean of.
    """

    scores: Mapping[str, float]
    reasons: Mapping[str, str] = field(default_factory=dict)
    disagreement: Mapping[str, float] = field(default_factory=dict)


class Judge(Protocol):
    """A judge. `sees_images` says whether `Rendered.blobs` must be filled."""

    name: str
    sees_images: bool

    def judge(self, doc: Rendered) -> Verdict:
        """Score one document.

        Raises:
            JudgeFailed: no usable verdict.
        """
        ...
