"""Before and after: the same held-out prompts, the same seeds, the strict rule."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

#: Columns of the store that a summary is made of.
COLUMNS = ["question", "tools", "image_num", "given", "text", "calls", "reward_strict", "accurate", "components"]


def class_of(row: Mapping[str, Any]) -> str:
    """The kind of prompt: its one required tool, `several`, or `none`."""
    tools = row["tools"]
    return "none" if not tools else tools[0] if len(tools) == 1 else "several"


def summarise(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over documents.

    Args:
        rows: with `COLUMNS`; those without a score (set aside or dropped) are counted apart.

    Returns:
        `documents`, `unscored`, `reward` (default hybrid, strict rule), `tool_accuracy`, `exact_plan` (accurate, and
        not a call too many), and `by_class` with all but `unscored` for each kind of prompt.
    """
    rows = list(rows)
    scored = [r for r in rows if r["reward_strict"] is not None]
    by_class = {c: [r for r in scored if class_of(r) == c] for c in sorted({class_of(r) for r in scored})}
    return (
        {"documents": len(scored), "unscored": len(rows) - len(scored)}
        | _means(scored)
        | {"by_class": {c: {"documents": len(rs)} | _means(rs) for c, rs in by_class.items()}}
    )


def _means(rows: list[Mapping[str, Any]]) -> dict[str, float]:
    if not rows:
        return {"reward": 0.0, "tool_accuracy": 0.0, "exact_plan": 0.0}
    return {
        "reward": statistics.fmean(r["reward_strict"] for r in rows),
        "tool_accuracy": statistics.fmean(r["accurate"] for r in rows),
        "exact_plan": statistics.fmean(r["accurate"] and len(r["calls"]) == len(r["tools"]) for r in rows),
    }


def noise(a: Sequence[float], b: Sequence[float]) -> float:
    """Standard error of the difference of two means; at least two rewards each."""
    return math.hypot(*(statistics.stdev(rewards) / math.sqrt(len(rewards)) for rewards in (a, b)))
