"""The one interface of all tools, the failures they may raise, and how a tool outside the tree is found.

A tool is an object with a `spec` and a `run`. It runs inside a Serve replica, in a test, or anywhere else: it knows
neither Ray nor the document. Failures are classed where they happen: `CallFailed` is the caller's fault and stays
with the trajectory; anything else that `run` raises is infrastructure, is tried again elsewhere, and is never scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Protocol

from agent.spec import ToolSpec
from replay.record import Blob

ENTRY_POINTS = "llmi.tools"


class CallFailed(Exception):
    """The call itself cannot succeed (bad code, no hit, unknown edit): its message is the reason the agent is given."""


@dataclass(frozen=True)
class ToolResult:
    """What a call made.

    Attributes:
        images: at least one picture, in order.
        provenance: where they come from, JSON-ready. Search: `title`, `source`, `licence`, `caption` at least;
            diffusion: `model`, `seed`; edit: `operations`; code: `figures`.
    """

    images: tuple[Blob, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)


class Tool(Protocol):
    """A tool. Construct it with the keyword options of its section in the config."""

    spec: ToolSpec

    def run(self, params: Mapping[str, Any], images: Sequence[Blob]) -> ToolResult:
        """Run one call.

        Args:
            params: exactly the parameters of `spec`, already validated.
            images: the pictures that `spec.image_params` point at, in that order.

        Raises:
            CallFailed: the caller's fault.
        """
        ...


def builtin() -> dict[str, str]:
    """Built-in tools as `name -> "module:class"`."""
    return {
        "code": "tools.code:CodeTool",
        "edit": "tools.edit:EditTool",
        "search": "tools.search:SearchTool",
        "diffusion": "tools.diffusion:DiffusionTool",
    }


def load(name: str) -> Callable[..., Tool]:
    """The class of a tool: a built-in one, or one that a package offers in the entry point group `llmi.tools`.

    Raises:
        LookupError: no such tool; the message names those that exist.
    """
    if name in (known := builtin()):
        module, _, cls = known[name].partition(":")
        return getattr(__import__(module, fromlist=[cls]), cls)
    found = {e.name: e for e in entry_points(group=ENTRY_POINTS)}
    if name not in found:
        raise LookupError(f"unknown tool {name!r}: known are {', '.join(sorted(known.keys() | found.keys()))}")
    return found[name].load()
