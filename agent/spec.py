"""What a tool looks like from the agent's side: its name, its parameters and when to use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ToolSpec:
    """The contract of one tool in the protocol.

    Attributes:
        name: the value of `source` in a tag.
        params: exact parameter names and their types: `str`, `int`, or `list[int]` (one index or several).
        when: one sentence for the system prompt: when to use it.
        image_params: the names of parameters that point at earlier pictures (only backwards), `int` or `list[int]`.
    """

    name: str
    params: Mapping[str, type]
    when: str
    image_params: tuple[str, ...] = ()

    def pictures(self, params: Mapping[str, Any]) -> list[int]:
        """The indices of all pictures that these parameters point at, in the order in which the tool is given them."""
        pointed = (params[name] for name in self.image_params)
        return [i for value in pointed for i in (value if isinstance(value, list) else [value])]


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
