"""What a document is expected to be worth where what was required is not known, but only how likely which plan is.

The training reward (`rewards.hybrid`, default) for each plan, as if its tools and its number of pictures had been
required, weighed with the plan's chance. The judges are asked once, with the number of pictures left free.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

from agent.answer import Document
from agent.workshop import Plan, Unjudged
from rewards.base import JudgeFailed, Rendered, Verdict
from rewards.hybrid import MOST_IMAGES, score
from rewards.rules import FREE, NONE_ALLOWED, count_images

#: Gives a judge's verdict. Raises JudgeFailed.
Ask = Callable[[Rendered], Awaitable[Verdict]]


class Expected:
    """The judges of test-time scaling (`agent.workshop.Judges`).

    Args:
        text, image: the text judge and the image judge.
    """

    def __init__(self, text: Ask, image: Ask) -> None:
        self._text, self._image = text, image

    async def score(self, document: Document, plans: Mapping[Plan, float]) -> float:
        """The expected reward, 0..1; without plans, that of free pictures. Raises Unjudged."""
        doc = rendered(document)
        try:
            if 0 < count_images(doc) <= MOST_IMAGES:
                text, image = await asyncio.gather(self._text(doc), self._image(doc))
                return expected(doc, text, image, plans)
            return expected(doc, await self._text(doc), None, plans)
        except JudgeFailed as why:
            raise Unjudged(str(why)) from why


def expected(doc: Rendered, text: Verdict, image: Verdict | None, plans: Mapping[Plan, float]) -> float:
    """The mean reward over the plans that may have been wanted. Raises JudgeFailed as `rewards.hybrid.score` does."""
    if not plans:
        return score(doc, text, image).reward
    wanted = [(replace(doc, tools=plan, image_num=len(plan) or NONE_ALLOWED), share) for plan, share in plans.items()]
    return sum(share * score(one, text, image).reward for one, share in wanted) / sum(plans.values())


def rendered(document: Document) -> Rendered:
    """As judges see it."""
    return Rendered(
        document.question,
        document.text,
        document.calls,
        FREE,
        (),
        document.given,
        document.blobs,
        document.finished,
    )
