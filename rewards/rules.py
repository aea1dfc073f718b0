"""Rules: counts of pictures and of tool calls. No judge, no model, no text beyond the tags.

`image_num` codes the required pictures: -1 none allowed, 0 free, 99 at least one, N exactly N. A call counts as
*right* if it succeeded and was wanted; a tool that was never called has succeeded at nothing.
"""

from __future__ import annotations

from rewards.base import CallOutcome, Rendered

NONE_ALLOWED, FREE, AT_LEAST_ONE = -1, 0, 99

_STATUSES = frozenset({"ok", "failed", "invalid"})
#: Weights of R_tool (LLM-I.md); a tool from outside the tree weighs as much as the lightest.
_TOOL_WEIGHTS = {"code": 0.4, "edit": 0.3, "search": 0.2, "diffusion": 0.1}
_OTHER_WEIGHT = 0.1
#: What each picture beyond a required number costs.
_EXCESS_COST = 0.3


def rule(images: int, image_num: int) -> float:
    """R_rule for training (LLM-I.md): how well the number of pictures fits, 0..1.

    Raises:
        ValueError: a negative count, or an `image_num` below -1.
    """
    _check(images, image_num)
    if image_num in (NONE_ALLOWED, FREE, AT_LEAST_ONE):
        return rule_strict(images, image_num)
    return images / image_num if images <= image_num else max(0.0, 1 - _EXCESS_COST * (images - image_num))


def rule_strict(images: int, image_num: int) -> float:
    """R_rule for evaluation: 1.0 if the number of pictures is right, else 0.0. Raises as `rule` does."""
    _check(images, image_num)
    if image_num == NONE_ALLOWED:
        return float(images == 0)
    if image_num == FREE:
        return 1.0
    return float(images > 0 if image_num == AT_LEAST_ONE else images == image_num)


def count_images(doc: Rendered) -> int:
    """Rendered pictures of a document (v in LLM-I.md), the user's own not counted.

    Raises:
        ValueError: a call without an end of its own, such as one lost in a tool outage: it must not be scored.
    """
    for call in doc.calls:
        if call.status not in _STATUSES:
            raise ValueError(f"call at {call.start} has status {call.status!r}: only ok, failed, invalid are scored")
    return sum(len(call.images) for call in doc.calls if call.status == "ok")


def accurate(doc: Rendered) -> bool:
    """Tool accuracy of one document: all tags valid and executed, and every required tool used.

    Where no tool is required a document is right without a tag. Two cases follow: where pictures are required but
    no tool is named, at least one tag must be there; where they are free, tags may be there, but must work.
    """
    if any(call.status != "ok" for call in doc.calls):
        return False
    if doc.tools:
        return coverage(doc) == 1.0
    return not doc.calls if doc.image_num == NONE_ALLOWED else bool(doc.calls) or doc.image_num == FREE


def coverage(doc: Rendered) -> float:
    """Share of the required tools with at least one successful call; 1.0 where none is named."""
    used = {call.source for call in doc.calls if call.status == "ok"}
    return len(used & set(doc.tools)) / len(set(doc.tools)) if doc.tools else 1.0


def tool_precision(doc: Rendered) -> float:
    """Share of the made calls that were wanted, successful or not; without a call, 1.0 if none was required."""
    if not doc.calls:
        return float(not doc.tools)
    return sum(_wanted(doc, call) for call in doc.calls) / len(doc.calls)


def missed(doc: Rendered) -> float:
    """Share of the opportunities for a picture at which no call was made, 0..1, whatever became of the calls.

    Opportunities are the required tools and, where their number is known, the required pictures; where pictures are
    free there is one, and none where they are not allowed (after ATP-Bench's missed images).
    """
    wanted = [call for call in doc.calls if _wanted(doc, call)]
    tools = len(set(doc.tools) - {call.source for call in wanted}) / len(set(doc.tools)) if doc.tools else 0.0
    number = {NONE_ALLOWED: 0, FREE: 1, AT_LEAST_ONE: 1}.get(doc.image_num, doc.image_num)
    return max(tools, 1 - len(wanted) / number if number > len(wanted) else 0.0)


def right_calls(doc: Rendered) -> float:
    """Share of the made calls that were wanted and succeeded; 1.0 without a call (`coverage` sees what is missing)."""
    if not doc.calls:
        return 1.0
    return sum(_wanted(doc, call) and call.status == "ok" for call in doc.calls) / len(doc.calls)


def tool_reward(doc: Rendered) -> float:
    """R_tool (LLM-I.md), logged only: half for trying each required tool, half for its share of successful calls.

    A mean over the required tools with the published weights. The published one counts a tool that was never called
    as a success; here it is none. Where no tool is named it is 1.0 for an accurate document, else 0.0.
    """
    if not doc.tools:
        return float(accurate(doc))
    weights = {tool: _TOOL_WEIGHTS.get(tool, _OTHER_WEIGHT) for tool in doc.tools}
    return sum(weight * _tried(doc, tool) for tool, weight in weights.items()) / sum(weights.values())


def _tried(doc: Rendered, tool: str) -> float:
    calls = [call for call in doc.calls if call.source == tool]
    return 0.5 + 0.5 * sum(call.status == "ok" for call in calls) / len(calls) if calls else 0.0


def _wanted(doc: Rendered, call: CallOutcome) -> bool:
    """Whether a call's tool is a required one, or any tool where pictures are wanted but no tool is named."""
    return call.source in doc.tools if doc.tools else doc.image_num != NONE_ALLOWED


def _check(images: int, image_num: int) -> None:
    if images < 0 or image_num < NONE_ALLOWED:
        raise ValueError(f"{images} images for image_num {image_num}: counts start at 0, image_num at -1")
