"""The `images-api` tool: pictures by the OpenAI images API, from OpenAI or any server that speaks it.

The key is read from OPENAI_API_KEY; a server at another `url` may need none.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from replay.record import Blob
from tools.service_tool import ServiceTool


class ImagesApiTool(ServiceTool):
    """Draws by `/images/generations`, edits by `/images/edits`; options as in `ServiceTool`."""

    service = "images-api"
    home = "https://api.openai.com/v1"
    key_variable = "OPENAI_API_KEY"

    def _ask(self, prompt: str, images: Sequence[bytes]) -> Blob:
        # GPT Image models always answer with the picture itself, and refuse to be told so
        form = None if "gpt-image" in self._model else "b64_json"
        fields = self._fields(prompt=prompt, n=1, response_format=form)
        if not images:
            return self._service.picture("images/generations", json=fields)
        name = "image" if len(images) == 1 else "image[]"
        files = [(name, (f"{i}.png", image, "image/png")) for i, image in enumerate(images)]
        data = {key: value if isinstance(value, str) else json.dumps(value) for key, value in fields.items()}
        return self._service.picture("images/edits", data=data, files=files)
