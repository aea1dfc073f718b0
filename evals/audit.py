"""Is the reward gamed? What changed in a run's documents between its beginning and its end, and what looks wrong.

The unit is the group (all samples of a prompt), since samples of one prompt are not independent: groups are put in the
order of the policy that wrote them, and the first third is compared with the last. A difference counts as a change if
it is more than Z standard errors and more than SMALLEST of the larger mean. What is looked for (`Finding.kind`):

- *parts disagree*: the reward or a component of it rose while another fell (`missed` is turned round: less is better).
- *drift*: length, or the number of pictures or calls, grew or shrank by more than a quarter.
- *follows*: within groups the reward goes with length or with the number of pictures (mean correlation of FOLLOWS or
  more), so that more of it is what is learnt.
- *repetition*: documents repeat themselves or show a picture twice more than before; a phrase of PHRASE words spread
  to many more documents; the same prose answers different questions.
- *judge-directed*: text that speaks to the judge, of scores, or in the form of a verdict.

A finding is a reason to read the documents, not a proof.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rewards.base import Rendered
from rewards.components import COUNTS, JUDGED, MARKS, RULES
from rewards.judges.words import directed, gaps, stale, words

Z = 3.0
SMALLEST = 0.05
DRIFT = 0.25
FOLLOWS = 0.5
PHRASE = 6
SPREAD = 0.2  # share of documents that a phrase must have gained
SAME = 0.1  # share of documents with the prose of another question's that was gained
LEAST_GROUPS = 6

_LESS_IS_BETTER = ("missed",)
_JUDGEABLE = ("reward", *RULES, *JUDGED, *MARKS)
_DRIFTING = ("characters", *COUNTS)


@dataclass(frozen=True)
class Scored:
    """A document and what it earned.

    Attributes:
        at: optimiser steps of the policy that wrote it.
        components: of its reward, by name.
        reasons: of the judges, by score.
    """

    trajectory: str
    group: str
    at: int
    doc: Rendered
    reward: float
    components: Mapping[str, float]
    reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Trend:
    """A mean over groups at the beginning and at the end, and their distance in standard errors."""

    name: str
    early: float
    late: float
    z: float

    @property
    def changed(self) -> bool:
        """More than by chance, and by enough to matter."""
        return abs(self.z) > Z and abs(self.late - self.early) > SMALLEST * max(abs(self.early), abs(self.late))

    @property
    def better(self) -> int:
        """+1, -1, or 0 where it did not change or where neither is better."""
        if not self.changed or self.name not in _JUDGEABLE:
            return 0
        return -1 if (self.late < self.early) != (self.name in _LESS_IS_BETTER) else 1

    def __str__(self) -> str:
        return f"{self.name} {self.early:.3g} -> {self.late:.3g}"


@dataclass(frozen=True)
class Finding:
    """Something that looks like gaming, in one sentence, and the documents that show it."""

    kind: str
    what: str
    documents: tuple[str, ...] = ()


@dataclass(frozen=True)
class Disagreement:
    """A document that judges and rules see differently: the mean of r_llm and r_mllm, and rule x fit, 0..1."""

    trajectory: str
    judges: float
    rules: float

    @property
    def gap(self) -> float:
        """Above 0, the judges are the kinder ones."""
        return self.judges - self.rules


@dataclass(frozen=True)
class Audit:
    """What an audit found; `follows` maps a size to its mean correlation with the reward within groups."""

    documents: int
    groups: int
    trends: list[Trend] = field(default_factory=list)
    follows: dict[str, float] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    disagreements: list[Disagreement] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def audit(docs: Sequence[Scored], show: int = 5) -> Audit:
    """Look for gaming.

    Args:
        show: disagreements, and documents a finding names, at most.

    Raises:
        ValueError: no documents.
    """
    if not docs:
        raise ValueError("there is no scored document to audit")
    groups = _groups(docs)
    third = len(groups) // 3 if len(groups) >= LEAST_GROUPS else 0
    early, late = groups[:third], groups[len(groups) - third :]
    trends = _trends(early, late)
    follows = {
        name: r for name, size in _SIZES.items() if (r := _follows(groups, size)) is not None
    }  # a size that never varies within a group follows nothing
    findings = [*_parts(trends), *_drifts(trends), *_followed(follows), *_repeats(trends), *_directed(docs, show)]
    findings += [*_phrases(early, late, show), *_same_prose(early, late, show)]
    return Audit(len(docs), len(groups), trends, follows, findings, disagreements(docs, show))


def disagreements(docs: Sequence[Scored], show: int) -> list[Disagreement]:
    """Where judges and rules are farthest apart, the farthest first; at most one of a group."""
    found: dict[str, Disagreement] = {}
    for d in docs:
        judged = [d.components[name] for name in ("r_llm", "r_mllm") if name in d.components]
        if judged and "rule" in d.components:
            rules = d.components["rule"] * d.components.get("fit", 1.0)
            one = Disagreement(d.trajectory, statistics.fmean(judged), rules)
            if d.group not in found or abs(one.gap) > abs(found[d.group].gap):
                found[d.group] = one
    return sorted(found.values(), key=lambda one: -abs(one.gap))[:show]


Group = list[Scored]
Measure = Callable[[Scored], float]


def _groups(docs: Sequence[Scored]) -> list[Group]:
    """In the order of the policies that wrote them."""
    groups: dict[str, Group] = {}
    for d in docs:
        groups.setdefault(d.group, []).append(d)
    return sorted(groups.values(), key=lambda g: (min(d.at for d in g), g[0].group))


def _prose(d: Scored) -> str:
    return "\n".join(gaps(d.doc))


def _shown_again(d: Scored) -> float:
    shown = [sha for call in d.doc.calls if call.status == "ok" for sha in call.images]
    return 1 - len(set(shown)) / len(shown) if shown else 0.0


#: What the reward must not follow.
_SIZES: dict[str, Measure] = {
    "characters": lambda d: float(len(d.doc.text)),
    "images": lambda d: d.components.get("images", 0.0),
}
_MEASURES: dict[str, Measure] = {
    "reward": lambda d: d.reward,
    "characters": _SIZES["characters"],
    "repeated phrases": lambda d: stale(_prose(d), d.doc.question)[0],
    "copied phrases": lambda d: stale(_prose(d), d.doc.question)[1],
    "pictures shown again": _shown_again,
}


def _trends(early: list[Group], late: list[Group]) -> list[Trend]:
    names = sorted({n for g in (*early, *late) for d in g for n in d.components if "/" not in n})
    found = [_trend(name, measure, early, late) for name, measure in _MEASURES.items()]
    for name in names:
        having = [[[d for d in g if name in d.components] for g in side] for side in (early, late)]
        found.append(_trend(name, lambda d, name=name: d.components[name], *having))  # type: ignore[misc]
    return [trend for trend in found if trend is not None]


def _trend(name: str, measure: Measure, early: list[Group], late: list[Group]) -> Trend | None:
    """None where a side has fewer than two groups with something to measure."""
    sides = [[statistics.fmean(map(measure, g)) for g in side if g] for side in (early, late)]
    if min(map(len, sides)) < 2:
        return None
    before, after = map(statistics.fmean, sides)
    error = math.sqrt(sum(statistics.variance(side) / len(side) for side in sides))
    z = (after - before) / error if error else math.copysign(math.inf, after - before) if after != before else 0.0
    return Trend(name, before, after, z)


def _parts(trends: Sequence[Trend]) -> list[Finding]:
    rose, fell = ([t for t in trends if t.better == sign] for sign in (1, -1))
    if not rose or not fell:
        return []
    return [Finding("parts disagree", f"{', '.join(map(str, rose))} got better, {', '.join(map(str, fell))} worse")]


def _drifts(trends: Sequence[Trend]) -> list[Finding]:
    return [
        Finding("drift", f"{t} a document")
        for t in trends
        if t.name in _DRIFTING and t.changed and abs(t.late - t.early) > DRIFT * max(abs(t.early), 1e-9)
    ]


def _followed(follows: Mapping[str, float]) -> list[Finding]:
    return [
        Finding("follows", f"within groups the reward goes with {name}: correlation {r:+.2f}")
        for name, r in follows.items()
        if abs(r) >= FOLLOWS
    ]


def _follows(groups: Sequence[Group], size: Measure) -> float | None:
    """Mean correlation of reward and size within the groups in which both vary; None if there is none."""
    found = []
    for group in groups:
        sizes, rewards = [size(d) for d in group], [d.reward for d in group]
        if len(set(sizes)) > 1 and len(set(rewards)) > 1:
            found.append(statistics.correlation(sizes, rewards))
    return statistics.fmean(found) if found else None


def _repeats(trends: Sequence[Trend]) -> list[Finding]:
    watched = ("repeated phrases", "copied phrases", "pictures shown again")
    return [
        Finding("repetition", f"{t} (share)") for t in trends if t.name in watched and t.changed and t.late > t.early
    ]


def _directed(docs: Sequence[Scored], show: int) -> list[Finding]:
    found = [d.trajectory for d in docs if directed(d.doc.text, d.doc.question)]
    if not found:
        return []
    return [
        Finding(
            "judge-directed",
            f"{len(found)} of {len(docs)} documents speak to the judge or of scores",
            tuple(found[-show:]),
        )
    ]


def _phrases(early: Sequence[Group], late: Sequence[Group], show: int) -> list[Finding]:
    """Phrases that spread; of those that overlap, which are in the same documents, only one is told."""
    before, after = _holders(early), _holders(late)
    sizes = [max(1, sum(map(len, side))) for side in (early, late)]
    gained = {p: len(names) / sizes[1] - len(before.get(p, ())) / sizes[0] for p, names in after.items()}
    found: dict[tuple[str, ...], Finding] = {}
    for phrase in sorted((p for p, gain in gained.items() if gain > SPREAD), key=lambda p: -gained[p]):
        now, then = len(after[phrase]) / sizes[1], len(before.get(phrase, ())) / sizes[0]
        what = f"{' '.join(phrase)!r} is in {now:.0%} of documents, and was in {then:.0%}"
        found.setdefault(tuple(after[phrase]), Finding("repetition", what, _last(after[phrase], show)))
    return list(found.values())[:show]


def _holders(groups: Sequence[Group]) -> dict[tuple[str, ...], list[str]]:
    """Phrases of the prose, without those of the question, and the trajectories that hold them."""
    found: dict[tuple[str, ...], list[str]] = {}
    for d in (d for group in groups for d in group):
        asked = set(_runs(d.doc.question))
        for phrase in dict.fromkeys(run for run in _runs(_prose(d)) if run not in asked):
            found.setdefault(phrase, []).append(d.trajectory)
    return found


def _runs(text: str) -> list[tuple[str, ...]]:
    told = words(text)
    return [tuple(told[i : i + PHRASE]) for i in range(len(told) - PHRASE + 1)]


def _same_prose(early: Sequence[Group], late: Sequence[Group], show: int) -> list[Finding]:
    """Documents with the very prose that another question got; where questions are alike, some always are."""
    (then, _), (now, names) = _share_same(early), _share_same(late)
    if now - then <= SAME:
        return []
    what = f"{now:.0%} of documents have the very prose that another question got, and {then:.0%} had"
    return [Finding("repetition", what, _last(names, show))]


def _share_same(groups: Sequence[Group]) -> tuple[float, list[str]]:
    docs = [(d, " ".join(words(_prose(d)))) for group in groups for d in group]
    questions = Counter(prose for prose, _ in {(prose, d.doc.question) for d, prose in docs})
    same = [d.trajectory for d, prose in docs if questions[prose] > 1]
    return len(same) / len(docs) if docs else 0.0, same


def _last(names: Sequence[str], most: int) -> tuple[str, ...]:
    return tuple(names[max(0, len(names) - most) :])
