"""Does a judge deserve trust? It scores pairs of documents of which one is known to be better.

The judges here are pointwise: they score one document at a time, and a pair is decided by the two means of marks,
m(d) = mean over the criteria, 1..5. The margin of a pair is m(better) - m(worse). What is reported (`Trust`):

- *agreement*: mean over pairs of 1 if the margin is above 0, 0.5 if it is 0 (nearer than TIE), else 0.
- *position bias*: documents go to a judge in batches. Each pair is asked as the batch [better, worse] and as
  [worse, better]; the bias is the mean over documents of m(as the first of its batch) - m(as the second), in marks.
  A judge that scores each document for itself has 0. `flips` is the share of pairs that the order decides differently.
- *length bias*: over pairs whose texts differ in length, the share in which the longer one is preferred (a tie is half)
  less the share in which it is the better one. Above 0, the judge likes length; between -1 and 1.
- *image-count bias*: the same with the number of pictures.
- *self-consistency*: over pairs and repeats in the same order, the share whose decision is that of the first time. A
  judge that keeps verdicts forgets them before each time.
- *calibration*: the expected calibration error of the confidence that a margin claims, 0.5 + |margin| / 8 (so that no
  margin claims a coin's toss and the largest one certainty): sum over BINS equal bins of n_bin / n |mean confidence -
  mean agreement|. 0 is perfect.

None stands where no pair tells. A document without a verdict counts in `failures`, and its pair in nothing else.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from evals.pairs import Pair
from rewards.base import Judge, JudgeFailed, Rendered, Verdict
from rewards.rules import count_images

#: A batch of documents -> a verdict each, or why there is none.
Ask = Callable[[list[Rendered]], Sequence[Verdict | str]]

TIE = 1e-6
BINS = 5


@dataclass(frozen=True)
class Trust:
    """How a judge did; the module says what each number is."""

    pairs: int
    failures: int
    agreement: float | None
    position_bias: float | None
    flips: float | None
    length_bias: float | None
    image_count_bias: float | None
    self_consistency: float | None
    calibration_error: float | None
    by_flaw: dict[str, float]
    first_failure: str = ""

    def row(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


@dataclass(frozen=True)
class _Asked:
    """A pair's marks, (better, worse) each time: in order, in turned order, and again in order."""

    pair: Pair
    straight: tuple[float, float]
    turned: tuple[float, float]
    again: tuple[tuple[float, float], ...]

    @property
    def margin(self) -> float:
        return _margin(self.straight)


def direct(judge: Judge) -> Ask:
    """Ask a judge of this process, which scores each document for itself."""

    def one(doc: Rendered) -> Verdict | str:
        try:
            return judge.judge(doc)
        except JudgeFailed as failed:
            return str(failed) or "the judge gave no reason"
        except Exception as error:  # as its server does: a judge that breaks has failed
            return f"the judge broke: {type(error).__name__}: {error}"

    return lambda docs: [one(doc) for doc in docs]


def check(
    ask: Ask,
    pairs: Sequence[Pair],
    repeats: int = 3,
    *,
    at_once: int = 1,
    begin: Callable[[], None] = lambda: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Trust:
    """Ask a judge for all pairs, `repeats` times in order and once in turned order.

    Args:
        at_once: pairs that are asked at the same time.
        begin: called before each round of all pairs; there a judge forgets the verdicts that it keeps.
        on_progress: told of rounds done and of all rounds.

    Raises:
        ValueError: no pairs, or fewer than one repeat.
    """
    if not pairs or repeats < 1:
        raise ValueError(f"a check needs pairs and at least one repeat, not {len(pairs)} and {repeats}")
    rounds: list[list[tuple[float | str, float | str]]] = []
    with ThreadPoolExecutor(at_once) as threads:
        for number in range(repeats + 1):
            begin()
            turned = number == repeats
            batches = [[p.worse, p.better] if turned else [p.better, p.worse] for p in pairs]
            rounds.append(list(threads.map(lambda docs: _marks(ask(docs)), batches)))
            on_progress(number + 1, repeats + 1)
    asked: list[_Asked] = []
    failures: list[str] = []
    for pair, marks in zip(pairs, zip(*rounds, strict=True), strict=True):
        failures += [mark for both in marks for mark in both if isinstance(mark, str)]
        whole = [(a, b) for a, b in marks if not isinstance(a, str) and not isinstance(b, str)]
        if len(whole) == len(marks):
            *straight, back = whole
            asked.append(_Asked(pair, straight[0], (back[1], back[0]), tuple(straight[1:])))
    flaws = sorted({a.pair.flaw for a in asked})
    return Trust(
        pairs=len(pairs),
        failures=len(failures),
        first_failure=next(iter(failures), ""),
        agreement=_mean([_decision(a.margin) for a in asked]),
        position_bias=_mean([_position(a) for a in asked]),
        flips=_mean([float(_decision(a.margin) != _decision(_margin(a.turned))) for a in asked]),
        length_bias=_lean(asked, lambda doc: len(doc.text)),
        image_count_bias=_lean(asked, count_images),
        self_consistency=_mean([float(_decision(_margin(m)) == _decision(a.margin)) for a in asked for m in a.again]),
        calibration_error=_calibration([a.margin for a in asked]),
        by_flaw={f: statistics.fmean(_decision(a.margin) for a in asked if a.pair.flaw == f) for f in flaws},
    )


def _marks(verdicts: Sequence[Verdict | str]) -> tuple[float | str, float | str]:
    """The mean marks of a batch of two, or why there is none."""
    if len(verdicts) != 2:
        return (f"{len(verdicts)} verdicts for 2 documents",) * 2
    first, second = map(_mark, verdicts)
    return first, second


def _mark(verdict: Verdict | str) -> float | str:
    if isinstance(verdict, str):
        return verdict
    scores = list(verdict.scores.values())
    if not scores or not all(isinstance(s, int | float) and 1 <= s <= 5 for s in scores):
        return f"the scores {dict(verdict.scores)} are not numbers from 1 to 5"
    return statistics.fmean(scores)


def _margin(marks: tuple[float, float]) -> float:
    return marks[0] - marks[1]


def _decision(margin: float) -> float:
    """1 for the better one, 0.5 for a tie, 0 for the worse one."""
    return 0.5 if abs(margin) < TIE else float(margin > 0)


def _position(asked: _Asked) -> float:
    """In order, the better one is first; turned, the worse one."""
    better = asked.straight[0] - asked.turned[0]
    worse = asked.turned[1] - asked.straight[1]
    return (better + worse) / 2


def _lean(asked: Sequence[_Asked], size: Callable[[Rendered], int]) -> float | None:
    leans = []
    for a in asked:
        longer = size(a.pair.better) - size(a.pair.worse)
        if longer:
            decision = _decision(a.margin)
            leans.append(decision - 1.0 if longer > 0 else 1.0 - decision)
    return _mean(leans)


def _calibration(margins: Sequence[float]) -> float | None:
    if not margins:
        return None
    bins: dict[int, list[tuple[float, float]]] = {}
    for margin in margins:
        confidence = min(1.0, 0.5 + abs(margin) / 8)
        bins.setdefault(min(BINS - 1, int((confidence - 0.5) * 2 * BINS)), []).append((confidence, _decision(margin)))
    gaps = [len(b) * abs(statistics.fmean(c for c, _ in b) - statistics.fmean(d for _, d in b)) for b in bins.values()]
    return sum(gaps) / len(margins)


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None
