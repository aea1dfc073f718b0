"""The `ref` tool: a given or an earlier picture once more, as it is, so that a document can show its source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agent.spec import ToolSpec
from replay.record import Blob
from tools.base import CallFailed, ToolResult


class RefTool:
    """Gives back the picture pointed at, byte for byte; not one of the published four."""

    spec = ToolSpec(
        "ref",
        {"img_index": int},
        "show a given or an earlier image again as it is; img_index counts the user's images first, then the "
        "document's own",
        image_params=("img_index",),
    )

    def run(self, params: Mapping[str, Any], images: Sequence[Blob]) -> ToolResult:
        """The same picture; provenance: `of`.

        Raises:
            CallFailed: there is no picture.
        """
        if not images:
            raise CallFailed("there is no picture to show: img_index must point at an earlier one")
        return ToolResult((images[0],), {"of": [images[0].sha256]})
