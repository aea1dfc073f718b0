"""Reading a model judge's answer: one flat JSON object, and scores as fine as the log-probs of their tokens allow."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rewards.base import JudgeFailed, Verdict
from rewards.judges.rubrics import GRADES, Rubric


class Unreadable(JudgeFailed):
    """An answer came and cannot be read: another try may do better."""


class TooLong(JudgeFailed):
    """The prompt is longer than the model can read."""


@dataclass(frozen=True)
class Token:
    """A sampled token and the log-probs of the likeliest in its place, by text."""

    text: str
    likely: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What a model said; `tokens` are those of `text`, or none where the engine tells none."""

    text: str
    tokens: Sequence[Token] = ()


#: How vLLM, OpenAI and others say that a prompt is too long.
_TOO_LONG = re.compile(r"context.?length|maximum model length|prompt is too long|too many tokens", re.IGNORECASE)


def refused(why: str) -> JudgeFailed:
    """The failure that a refusal's words mean."""
    return TooLong(why) if _TOO_LONG.search(why) else JudgeFailed(why)


_SPACE = re.compile(r"[ \t\r\n]*")
_FENCE = re.compile(r"\s*(?:<think>.*?</think>\s*)?(?:```(?:json)?\s*)?", re.DOTALL)


def read(answer: Answer, rubric: Rubric) -> Verdict:
    """The verdict in an answer.

    A score is sum(g p(g)) / sum(p(g)) over the grades g = 1..5 in the place of its token, where log-probs are given.

    Raises:
        Unreadable: it is not the JSON object that was asked for, or a score is no grade.
    """
    values, places = _flat(answer.text)
    scores, reasons = {}, {}
    for name in rubric.criteria:
        score, reason = values.get(name), values.get(f"{name}_reason", "")
        if type(score) is not int or score not in GRADES:
            raise Unreadable(f"the judge gave {score!r:.80} for {name!r}: wanted a whole number from 1 to 5")
        if not isinstance(reason, str):
            raise Unreadable(f"the judge's reason for {name!r} is no text")
        fine = _weighted(answer.tokens, places[name]) if _is_text(answer) else None
        scores[name], reasons[name] = float(score) if fine is None else fine, reason.encode(errors="replace").decode()
    return Verdict(scores, reasons)


def _flat(text: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Keys and values of the one object that a text is, and the offset of each value."""
    opening = _FENCE.match(text)
    at = opening.end() if opening else 0
    values: dict[str, Any] = {}
    places: dict[str, int] = {}
    decoder = json.JSONDecoder(strict=False)  # engines' grammars let control characters into strings
    try:
        at = _expect(text, at, "{")
        while True:
            key, at = decoder.raw_decode(text, _SPACE.match(text, at).end())  # type: ignore[union-attr]
            if not isinstance(key, str) or key in values:
                raise ValueError(f"the key {key!r:.40} is no text, or twice there")
            at = _SPACE.match(text, _expect(text, at, ":")).end()  # type: ignore[union-attr]
            places[key] = at
            values[key], at = decoder.raw_decode(text, at)
            at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
            if text[at : at + 1] == "}":
                break
            at = _expect(text, at, ",")
        if text[at + 1 :].strip(" \t\r\n`"):
            raise ValueError("there is more behind it")
    except (ValueError, RecursionError) as error:
        raise Unreadable(
            f"the judge's answer is not the JSON object that was asked for: {error}: {text!r:.120}"
        ) from None
    return values, places


def _expect(text: str, at: int, sign: str) -> int:
    at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
    if text[at : at + 1] != sign:
        raise ValueError(f"wanted {sign!r} at character {at}")
    return at + 1


def _is_text(answer: Answer) -> bool:
    """Whether the tokens are the text's, so that an offset is good for both."""
    return bool(answer.tokens) and "".join(token.text for token in answer.tokens).startswith(answer.text)


def _weighted(tokens: Sequence[Token], place: int) -> float | None:
    """The mean grade at a character, or None where the log-probs do not tell."""
    start = 0
    for token in tokens:
        if place < start + len(token.text):
            break
        start += len(token.text)
    before, after = token.text[: place - start], token.text[place - start + 1 :]
    weights = dict.fromkeys(GRADES, 0.0)
    for text, logprob in token.likely.items():
        for grade in GRADES:
            if text.strip() == f"{before}{grade}{after}".strip():
                weights[grade] += math.exp(min(0.0, logprob))
    mass = sum(weights.values())
    if not math.isfinite(mass) or mass <= 0:
        return None
    return min(5.0, max(1.0, sum(grade * weight for grade, weight in weights.items()) / mass))
