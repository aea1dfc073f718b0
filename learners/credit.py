"""Credit of single tool calls: the tokens of a tag are credited with what its own call was worth (`rewards.process`).

A credit is added to the advantage of the tag's tokens. Scores are centred over all calls of the group, as rewards are:
a call is credited for being better than the others for the same prompt, and none for being there.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Credit:
    """What the characters `start` to `end` of a text add to the advantage of their tokens."""

    start: int
    end: int
    advantage: float


def of_group(calls: Mapping[str, Sequence[tuple[int, int, float]]], coef: float) -> dict[str, list[Credit]]:
    """Calls of each sample of a group as (start, end, score) -> credits of coef * (score - mean) for those with any."""
    scores = [score for of in calls.values() for *_, score in of]
    mean = statistics.fmean(scores) if scores else 0.0
    return {
        name: [Credit(start, end, coef * (score - mean)) for start, end, score in of]
        for name, of in calls.items()
        if of
    }


def by_token(
    credits: Sequence[Credit], text: str, token_ids: Sequence[int], decode: Callable[[Sequence[int]], str]
) -> np.ndarray:
    """[tokens] float64, the sum of the credits of each token.

    A token that holds a part of a tag counts as the tag's. Where the tokens do not decode to the tag that the text has,
    nothing is credited.

    Args:
        decode: token ids -> text, as the engine does it; of the ids' first k, it must not be shorter for a larger k.
    """
    found = np.zeros(len(token_ids))
    decoded = decode(token_ids) if credits else ""

    def length(k: int) -> int:
        return len(decode(token_ids[:k]))

    places = range(len(token_ids) + 1)
    for credit in credits:
        if decoded[credit.start : credit.end] == text[credit.start : credit.end]:
            first = bisect_right(places, credit.start, key=length) - 1
            found[first : bisect_left(places, credit.end, key=length)] += credit.advantage
    return found
