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
from agent.workshop import CannotWrite, Draft, Plan, Spent, Version, Workshop, plan_of

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
    told: list[Stage] = []

    def over(name: str, before: Spent, version: Version | None, changed: Sequence[str]) -> None:
        now = shop.spent
        spent = (now.tokens - before.tokens, now.calls - before.calls, now.judged - before.judged)
        seconds = round(time.monotonic() - before.at, 3)
        score = round(version.score, 4) if version else 0.0
        notes = [f"judged by rules alone: {shop.unjudged}"] if shop.unjudged else []
        told.append(Stage(name, *spent, seconds, score, (*changed, *notes)))
        tell(told[-1])

    choosing = "checks" in stages or "selection" in stages
    before = _mark(shop)
    drafts = await shop.drafts([(shop.messages, "")] * (n if choosing else 1))
    if not drafts:
        raise CannotWrite("the question is too long for the model")
    shop.plans = _plans(drafts, shop.specs)
    over("candidates", before, None, [f"{len({d.text for d in drafts})} different answers of {len(drafts)}"])

    before = _mark(shop)
    versions, dropped = await _checked(shop, drafts, "checks" in stages)
    if "checks" in stages:
        over("checks", before, None, dropped)

    before = _mark(shop)
    best = await _selected(shop, versions if "selection" in stages else versions[:1])
    if "selection" in stages:
        place = [v.document.text for v in versions].index(best.document.text) + 1
        over("selection", before, best, [f"answer {place} of {len(versions)}"])
    for name, stage in (("enhancement", enhance), ("polishing", polish)):
        if name in stages and n > 1:
            before = _mark(shop)
            best, changed = await stage(shop, best, n)
            over(name, before, best, changed)
    return replace(best.document, scaling=tuple(told))


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


def _mark(shop: Workshop) -> Spent:
    return replace(shop.spent, at=time.monotonic())
