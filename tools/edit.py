"""The `edit` tool: Pillow operations understood from an instruction in plain English, without any model.

The same picture and instruction give the same bytes: PNG without metadata.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageOps

from agent.spec import PUBLISHED
from replay.record import Blob
from tools.base import CallFailed, ToolResult
from tools.edit_grammar import understand
from tools.edit_ops import MAX_PIXELS, OPERATIONS

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # decoders in Pillow itself: none that starts a program


class EditTool:
    """Edits the picture pointed at, as a whole."""

    spec = PUBLISHED["edit"]

    def run(self, params: Mapping[str, Any], images: Sequence[Blob] = ()) -> ToolResult:
        """Edit `images[0]` as `params["prompt"]` says; provenance: `operations` (each a name and its arguments), `of`.

        Raises:
            CallFailed: no picture, one that cannot be read or is too large, or nothing to do that the tool can do.
        """
        if not images:
            raise CallFailed("there is no picture to edit: img_index must point at an earlier one")
        operations = understand(params["prompt"])
        image = _decode(images[0])
        for operation in operations:
            image = OPERATIONS[operation.name](image, **operation.arguments)
        done = [{"name": operation.name, **operation.arguments} for operation in operations]
        return ToolResult((_encode(image),), {"operations": done, "of": images[0].sha256})


def _decode(blob: Blob) -> Image.Image:
    """The picture as RGB, or as RGBA if anything in it is transparent; the first one of an animation."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # a limit of our own follows
            opened = Image.open(io.BytesIO(blob.data), formats=_FORMATS)
        width, height = opened.size
        if width * height > MAX_PIXELS:
            raise CallFailed(f"the picture to edit has {width} x {height} pixels: at most {MAX_PIXELS} are edited")
        image = ImageOps.exif_transpose(opened)
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    except CallFailed:
        raise
    except Exception as error:  # decoders of broken data raise nearly anything
        raise CallFailed(f"the picture to edit cannot be read: {error}") from error


def _encode(image: Image.Image) -> Blob:
    image.info = {}  # colour profiles, comments and dates of the original
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Blob(buffer.getvalue())
