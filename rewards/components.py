"""A reward as a sum of named terms: a component's share of its range, times a weight, times gates.

    R = sum of weight * gate_1 * gate_2 * ... * share
    share = (value - low) / (high - low), kept within 0..1
    gate = floor + (1 - floor) * the gating component's value, kept within 0..1

A gate with floor 0 closes its term where the gating component is 0; one with floor 0.2 leaves a fifth.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

#: What `rewards.hybrid.score` measures of every document, with the range of each.
RULES = ("rule", "rule_strict", "r_tool", "coverage", "precision", "fit", "missed", "process")
JUDGED = ("r_llm", "r_mllm", "r_mllm_published")
MARKS = ("text", "image_tags", "image_quality", "task_relevance", "text_image_relevance")
COUNTS = ("images", "calls")
COMPONENTS = (*RULES, *JUDGED, *MARKS, *COUNTS)
#: Those that may be gates.
_UNIT = (*RULES, *JUDGED)


@dataclass(frozen=True)
class Term:
    """One term of a reward.

    Attributes:
        weight: what it adds at most; below 0 it is a cost.
        gates: component -> floor, 0..1.
        range: the values that count as 0 and as 1; the first may be the higher one.
    """

    weight: float
    gates: Mapping[str, float] = field(default_factory=dict)
    range: tuple[float, float] = (0.0, 1.0)


Terms = Mapping[str, Term]

#: LLM-I.md: R = 0.2 R_rule + 0.3 R_mllm R_rule + 0.5 R_llm.
PUBLISHED: Terms = {
    "rule": Term(0.2),
    "r_mllm_published": Term(0.3, {"rule": 0.0}),
    "r_llm": Term(0.5),
}
#: R = R_rule (0.2 + 0.8 F) (0.4 + 0.4 R_llm + 0.2 M); `rewards.hybrid` says why.
DEFAULT: Terms = {
    "rule": Term(0.4, {"fit": 0.2}),
    "r_llm": Term(0.4, {"rule": 0.0, "fit": 0.2}),
    "r_mllm": Term(0.2, {"rule": 0.0, "fit": 0.2}),
}
KINDS: dict[str, Terms] = {"default": DEFAULT, "published": PUBLISHED}


def check(terms: Terms) -> None:
    """ValueError, in one sentence, for terms that cannot be summed."""
    if not terms:
        raise ValueError("a reward needs at least one term")
    for name, term in terms.items():
        _known(name, "component")
        if not math.isfinite(term.weight):
            raise ValueError(f"component {name!r} has the weight {term.weight}: give a finite number")
        low, high = term.range
        if not (math.isfinite(low) and math.isfinite(high)) or low == high:
            raise ValueError(f"component {name!r} has the range {low}..{high}: give two different finite numbers")
        for gate, floor in term.gates.items():
            _known(gate, f"gate of component {name!r}:")
            if gate not in _UNIT:
                raise ValueError(f"component {name!r} cannot have the gate {gate!r}, which is not from 0 to 1")
            if not 0 <= floor <= 1:
                raise ValueError(f"the gate {gate!r} of component {name!r} has the floor {floor}: give 0 to 1")


def total(terms: Terms, components: Mapping[str, float]) -> float:
    """The sum; a term whose component the document lacks (a mark of pictures without a picture) adds nothing.

    Raises:
        ValueError: a gate on a component that the document lacks.
    """
    terms = {name: term for name, term in terms.items() if name in components}
    # Rounded, so that documents that are equally good have equal rewards whatever the order of the sum.
    return round(math.fsum(_value(name, term, components) for name, term in terms.items()), 12)


def _value(name: str, term: Term, components: Mapping[str, float]) -> float:
    low, high = term.range
    value = term.weight * _unit((components[name] - low) / (high - low))
    for gate, floor in term.gates.items():
        if gate not in components:
            raise ValueError(f"the gate {gate!r} of component {name!r} is missing in this document")
        value *= floor + (1 - floor) * _unit(components[gate])
    return value


def _unit(value: float) -> float:
    return min(1.0, max(0.0, value))


def _known(name: str, what: str) -> None:
    if name not in COMPONENTS:
        near = difflib.get_close_matches(name, COMPONENTS, 1, 0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMPONENTS)}"
        raise ValueError(f"unknown {what} {name!r}; {hint}")
