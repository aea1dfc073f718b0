"""What a tool looks like from the agent's side: its name, its parameters and when to use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ToolSpec:
    """The contract of one tool in the protocol.

    Attributes:
        name: the value of `source` in a tag.
        params: exact parameter names and their types (`str` or `int`).
        when: one sentence for the system prompt: when to use it.
        image_params: the names of integer parameters that point at an earlier image (only backwards).
    """

    name: str
    params: Mapping[str, type]
    when: str
    image_params: tuple[str, ...] = ()


#: The four published tools (LLM-I.md, Tools).
PUBLISHED: dict[str, ToolSpec] = {
    s.name: s
    for s in (
        ToolSpec("search", {"query": str}, "real entities, landmarks, current events: factual grounding"),
        ToolSpec("diffusion", {"prompt": str}, "novel, stylised, imagined pictures"),
        ToolSpec(
            "code",
            {"code": str},
            "charts and plots from data; plt, pd, sns and np are imported; call neither show() nor savefig()",
        ),
        ToolSpec(
            "edit",
            {"img_index": int, "prompt": str},
            "change a given or an earlier image; img_index counts the user's images first, then the document's own",
            image_params=("img_index",),
        ),
    )
}
