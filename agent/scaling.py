"""Test-time scaling: what a document gains when more is spent on it than one answer (LLM-I.md, five stages).

    candidates   several complete answers
    checks       those with a malformed tag, or with a call that fails, go
    selection    the best of the rest stays
    enhancement  each call in turn: other search hits, other seeds; one that failed, or whose chart has faults, is
                 written anew, told what went wrong and not told (`agent.enhance`)
    polishing    the text, told what the pictures show (`agent.enhance`)

Every stage keeps what it was given unless the score that the judges expect of it rises (`agent.workshop`).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from agent.answer import Document, Stage
from agent.enhance import enhance, polish
from agent.protocol import Invalid, parse
from agent.spec import ToolSpec
from agent.workshop import CannotWrite, Draft, Plan, Version, Workshop, plan_of

STAGES = ("candidates", "checks", "selection", "enhancement", "polishing")
MOST = 16  # of whatever a stage tries


async def scaled(
    shop: Workshop, n: int, stages: Sequence[str] = STAGES, tell: Callable[[Stage], None] = lambda stage: None
) -> Document:
    """A document on which up to `n` times as much is spent.

    Args:
        n: candidates, tries of each call, and tries of the text.
        stages: those that run; without `checks` and `selection` there is one candidate.
        tell: hears of each stage when it is over.

    Raises:
        CannotWrite: not even one answer.
    """
    record = _Record(shop, tell)
    try:
        return replace(await _through(shop, n, stages, record), scaling=tuple(record.stages))
    finally:
        shop.close()


async def _through(shop: Workshop, n: int, stages: Sequence[str], record: _Record) -> Document:
    several = "checks" in stages or "selection" in stages
    drafts = await shop.drafts([(shop.messages, "")] * (n if several else 1))
    if not drafts:
        raise CannotWrite("the question is too long for the model")
    shop.plans = _plans(drafts, shop.specs)
    record.over("candidates", None, [f"{len({d.text for d in drafts})} different answers of {len(drafts)}"])
    versions, dropped = await _checked(shop, drafts, "checks" in stages)
    if "checks" in stages:
        record.over("checks", None, dropped)
    best = await _selected(shop, versions if "selection" in stages else versions[:1])
    if "selection" in stages:
        place = [v.document.text for v in versions].index(best.document.text) + 1
        record.over("selection", best.score, [f"answer {place} of {len(versions)}"])
    for name, stage in (("enhancement", enhance), ("polishing", polish)):
        if name in stages:
            best, changed = await stage(shop, best, n)
            record.over(name, best.score, changed)
    return best.document


class _Record:
    """What each stage spent and changed."""

    def __init__(self, shop: Workshop, tell: Callable[[Stage], None]) -> None:
        self.stages: list[Stage] = []
        self._shop, self._tell = shop, tell
        self._before, self._at = replace(shop.spent), time.monotonic()

    def over(self, name: str, score: float | None, changed: Sequence[str]) -> None:
        """A stage is over: what was spent since the one before is its."""
        now, then, at = self._shop.spent, self._before, time.monotonic()
        spent = (now.tokens - then.tokens, now.calls - then.calls, now.judged - then.judged, round(at - self._at, 3))
        notes = [f"judged by rules alone: {self._shop.unjudged}"] if self._shop.unjudged else []
        self.stages.append(Stage(name, *spent, round(score or 0.0, 4), (*changed, *notes)))
        self._tell(self.stages[-1])
        self._before, self._at = replace(now), at


async def _checked(shop: Workshop, drafts: Sequence[Draft], drop: bool) -> tuple[list[Version], list[str]]:
    """The different drafts, rendered, without those that fail where others do not; and what was dropped."""
    different = list({draft.text: draft for draft in drafts}.values())
    sound = [d for d in different if not any(isinstance(s, Invalid) for s in parse(d.text, shop.specs))]
    kept = (sound or different) if drop else different[:]
    versions = list(await asyncio.gather(*(shop.version(draft) for draft in kept)))
    fewest = min(v.document.failures for v in versions)
    best = [v for v in versions if v.document.failures == fewest] if drop else versions
    why = [f"{len(different) - len(kept)} malformed", f"{len(versions) - len(best)} with calls that fail"]
    return best, [f"dropped {w}" for w in why if not w.startswith("0 ")]


async def _selected(shop: Workshop, versions: Sequence[Version]) -> Version:
    scored = await asyncio.gather(*(shop.scored(version) for version in versions))
    best = scored[0]
    for other in scored[1:]:
        best = other if other.beats(best) else best
    return best


def _plans(drafts: Sequence[Draft], specs: Mapping[str, ToolSpec]) -> dict[Plan, float]:
    """Share of the drafts with each plan."""
    counted = Counter(plan_of(draft.text, specs) for draft in drafts)
    return {plan: count / len(drafts) for plan, count in counted.items()}
