"""The `edit` tool: Pillow operations understood from an instruction in plain English, without any model.

The same picture and instruction give the same bytes: PNG without metadata.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agent.spec import PUBLISHED
from replay.record import Blob
from tools.base import CallFailed, ToolResult
from tools.edit_grammar import understand
from tools.edit_ops import OPERATIONS
from tools.picture import Unreadable, decode, encode


class EditTool:
    """Edits the picture pointed at, as a whole."""

    spec = PUBLISHED["edit"]

    def run(self, params: Mapping[str, Any], images: Sequence[Blob] = ()) -> ToolResult:
        """Edit `images[0]` as `params["prompt"]` says.

        Provenance: `maker`, `operations` (each a name and its arguments), `of`.

        Raises:
            CallFailed: no picture, one that cannot be read or is too large, or nothing to do that the tool can do.
        """
        if not images:
            raise CallFailed("there is no picture to edit: img_index must point at an earlier one")
        operations = understand(params["prompt"])
        try:
            image = decode(images[0].data)
        except Unreadable as error:
            raise CallFailed(f"the picture to edit {error}") from error
        for operation in operations:
            image = OPERATIONS[operation.name](image, **operation.arguments)
        done = [{"name": operation.name, **operation.arguments} for operation in operations]
        provenance = {"maker": "pillow", "operations": done, "of": [images[0].sha256]}
        return ToolResult((Blob(encode(image)),), provenance)
