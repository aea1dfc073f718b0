"""A keyword rule that guesses the tools of a question: what a person writes in twenty minutes of looking at prompts.

How often it is right is reported beside the policy's, so that one sees how far the built-in prompts can be solved
without reading them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from replay.record import Prompt


def _any(*words: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(words)})\b", re.IGNORECASE)


#: Who asks and who will read it says nothing of what is wanted; a refused picture is not wanted.
_AROUND = re.compile(
    r"^[^:?]{0,25}(?:class|club|room|lesson|readers|newsletter|asks|shop|paintings): |[^.?]* read it\.$", re.I
)
_REFUSED = _any(r"(?:no|not an?|instead of an?|without an?) (?:photo|picture|image|drawing|chart)s?")
_WORDS = _any("words?", "tell me", "describe", "write the tale", "mention", "aloud", "ear", "sum", "nothing", "line")
_EYES = _any("show", "see", "look", "add", "draw", "paint", "eye", "photo", "bars", "chart", "view")
_GIVEN = _any("my (?:own )?(?:photo|picture|snapshot|image)", "this photo", "I (?:sent|took|send|gave you)")
_CHANGE = _any(
    "gr[ea]y", "sepia", "blur(?:red)?", "border", "brighter", "darker", "rotated?", "mirror(?:ed)?", "invert"
)
_REAL = _any("flag", "map", "photo", "real", "true", "genuine")
_DRAWN = _any(
    "draw", "paint", "imagine", "dreamt?", "invented", "circle", "square", "triangle", "star", "house", "tree"
)
_CHART = _any("bars?", "chart", "columns?", "plot", "graph", "diagram", "numbers?", "compare", r"\d+")


def predict(question: str) -> set[str]:
    """The tools that a question seems to want; none if it seems to want words alone."""
    text = _REFUSED.sub("", _AROUND.sub("", question))
    if _WORDS.search(text) and not _EYES.search(text):
        return set()
    tools = set()
    if _GIVEN.search(text) or _CHANGE.search(text):
        tools.add("edit")
    if _REAL.search(text) and not _GIVEN.search(text):
        tools.add("search")
    if _DRAWN.search(text):
        tools.add("diffusion")
    if _CHART.search(text):
        tools.add("code")
    return tools


def measure(prompts: Sequence[Prompt]) -> dict[str, float]:
    """`tool_accuracy`, the share of prompts for which `predict` names every required tool (or none, where none is
    required), and `exact_plan`, the share for which it names no other: the measures of `evals.heldout`.

    Raises:
        ValueError: there are no prompts.
    """
    if not prompts:
        raise ValueError("the keyword rule has no prompts to be measured on")
    guesses = [(predict(p.question), set(p.tools)) for p in prompts]
    right = {
        "tool_accuracy": sum(needed <= named if needed else not named for named, needed in guesses),
        "exact_plan": sum(named == needed for named, needed in guesses),
    }
    return {name: n / len(prompts) for name, n in right.items()}
