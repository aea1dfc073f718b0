"""The one interface of all tools, the failures they may raise, and how a tool outside the tree is found.

A tool is an object with a `spec` and a `run`. It runs inside a Serve replica, in a test, or anywhere else: it knows
neither Ray nor the document. Failures are classed where they happen: `CallFailed` is the caller's fault and stays
with the trajectory; anything else that `run` raises is infrastructure, is tried again elsewhere, and is never scored.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
        provenance: who made them, with what, from where, under which licence (docs/tools.md, Provenance); JSON-ready.
    """

    images: tuple[Blob, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)


class Tool(Protocol):
    """A tool. Construct it with the keyword options of its section in the config.

    What a tool may have besides:
        describe(**options) -> ToolSpec: a class method; the spec, where it depends on the options.
        batch: int and run_many(calls) -> results: calls are gathered, at most `batch` at once. `calls` are pairs
            (params, images); the results are a ToolResult or a CallFailed each, in the calls' order.
        check() -> None: raises if the tool is broken for good; its server is then replaced.
        cost(params) -> float: US dollars that a call costs.
        close() -> None: gives back what it holds.
    """

    spec: ToolSpec

    def run(self, params: Mapping[str, Any], images: Sequence[Blob]) -> ToolResult:
        """Run one call.

        Args:
            params: exactly the parameters of `spec`, already validated.
            images: the pictures that `spec.image_params` point at, in the order of `spec.pictures(params)`.

        Raises:
            CallFailed: the caller's fault.
        """
        ...


def builtin() -> dict[str, str]:
    """Built-in tools as `name -> "module:class"`."""
    return {
        "code": "tools.code:CodeTool",
        "mcp": "tools.mcp:McpTool",
        "edit": "tools.edit:EditTool",
        "search": "tools.search:SearchTool",
        "diffusion": "tools.diffusion:DiffusionTool",
        "edit-diffusion": "tools.edit_diffusion:EditDiffusionTool",
        "images-api": "tools.images_api:ImagesApiTool",
        "ark": "tools.ark:ArkTool",
        "ref": "tools.ref:RefTool",
    }


def imported(place: str) -> Any:
    """What `module:name` names.

    Raises:
        LookupError: it cannot be imported.
    """
    module, _, name = place.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise LookupError(f"{place!r} cannot be imported: {error}") from error


def load(use: str) -> Callable[..., Tool]:
    """The class of an implementation: a built-in name, one of the entry point group `llmi.tools`, or `module:class`.

    Raises:
        LookupError: there is none; the message names those that exist.
    """
    known = builtin()
    if ":" in (place := known.get(use, use)):
        return imported(place)
    found = {e.name: e for e in entry_points(group=ENTRY_POINTS)}
    if use not in found:
        raise LookupError(f"unknown tool {use!r}: known are {', '.join(sorted(known.keys() | found.keys()))}")
    return found[use].load()


def spec_of(name: str, use: str, options: Mapping[str, Any]) -> ToolSpec:
    """The contract of implementation `use` with these options, under the name that the protocol has for it.

    Raises:
        LookupError: there is no such implementation.
    """
    tool: Any = load(use)
    spec = tool.describe(**options) if hasattr(tool, "describe") else tool.spec
    return replace(spec, name=name)
