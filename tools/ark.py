"""The `ark` tool: Seedream draws and SeedEdit edits, on Volcengine's Ark (BytePlus ModelArk by its `url`).

The key is read from ARK_API_KEY. Edits go to the same path as drawings, with the pictures in the request.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence

from replay.record import Blob
from tools.service_tool import ServiceTool


class ArkTool(ServiceTool):
    """Draws and edits by `/images/generations`; options as in `ServiceTool`."""

    service = "ark"
    home = "https://ark.cn-beijing.volces.com/api/v3"
    key_variable = "ARK_API_KEY"

    def _ask(self, prompt: str, images: Sequence[bytes]) -> Blob:
        links = ["data:image/png;base64," + base64.b64encode(image).decode() for image in images]
        given = links[0] if len(links) == 1 else links or None
        fields = self._fields(prompt=prompt, image=given, response_format="b64_json")
        return self._service.picture("images/generations", json=fields)
