"""The `edit-diffusion` tool: pictures changed as the words say, by any diffusers editing or image-to-image pipeline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageOps

from agent.spec import PUBLISHED, ToolSpec
from replay.record import Blob
from tools.base import CallFailed
from tools.drawing import Size, edit_spec, on_grid, picture_seed, read_wish, sources
from tools.pipeline_tool import PipelineTool
from tools.pipelines import SEVERAL, Drawing

MOST_AREA = 1024**2  # pixels that a picture is shrunk to where no size is set: what the models are trained on
LEAST_SIDE = 64  # pixels that a smaller one is enlarged to
MOST_NARROW = 8  # times as long as wide

_WHITE = (255, 255, 255)


class EditDiffusionTool(PipelineTool):
    """Changes the picture pointed at, or makes one of several; options as in `PipelineTool`, and `references`.

    The result has the proportions of the first picture, and its size up to a megapixel. A size that is one number
    sets the area, as that of a square; width x height sets both.

    Args:
        references: pictures that a call may point at, at most; above 1, `img_index` is a list.
    """

    spec = PUBLISHED["edit"]
    edits = True

    def __init__(self, model: str, references: int = 1, **options: Any) -> None:
        super().__init__(model, **options)
        self.spec = self.describe(references=references, **options)
        self._references = references
        if references > 1 and not self._pipeline.takes_several:
            raise ValueError(f"{self._pipeline.name} takes one picture: references above 1 need {', '.join(SEVERAL)}")

    @classmethod
    def describe(cls, parameters: Sequence[str] = (), references: int = 1, **options: Any) -> ToolSpec:
        return edit_spec(references, parameters)

    def _drawing(self, params: Mapping[str, Any], images: Sequence[Blob]) -> Drawing:
        wish = read_wish(params)
        first, *others = (_opaque(image) for image in sources(images, self._references))
        size = _result_size(first, wish.size or self._size)
        first = _resized(first, None) if self._pipeline.takes_size else ImageOps.fit(first, size)
        return Drawing(
            wish.prompt,
            picture_seed(self._seed, wish.prompt, images) if wish.seed is None else wish.seed,
            wish.steps or self._steps,
            self._guidance if wish.guidance is None else wish.guidance,
            size,
            (first, *(_resized(other, None) for other in others)),
        )


def _opaque(image: Image.Image) -> Image.Image:
    """On white: the pipelines know no transparency."""
    if image.mode != "RGBA":
        return image
    ground = Image.new("RGB", image.size, _WHITE)
    ground.paste(image, mask=image)
    return ground


def _resized(image: Image.Image, size: Size | None) -> Image.Image:
    wanted = _result_size(image, size)
    return image if image.size == wanted else image.resize(wanted, Image.Resampling.LANCZOS)


def _result_size(image: Image.Image, size: Size | None) -> tuple[int, int]:
    """Width and height that pipelines take, in the picture's own proportions unless `size` is both.

    Raises:
        CallFailed: it is too long and narrow.
    """
    width, height = image.size
    if max(width, height) > MOST_NARROW * min(width, height):
        raise CallFailed(
            f"the picture is {width} x {height}: at most {MOST_NARROW} times as long as wide can be edited"
        )
    if isinstance(size, tuple):
        return size
    area = size**2 if size else min(width * height, MOST_AREA)
    scale = max(math.sqrt(area / (width * height)), LEAST_SIDE / min(width, height))
    return on_grid(width * scale), on_grid(height * scale)
