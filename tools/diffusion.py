"""The `diffusion` tool: a picture from words, by any diffusers text-to-image pipeline.

The noise is seeded by (seed, prompt) and drawn on the CPU, so the same call gives the same picture wherever it runs.
The default model is the small one of the tree, which `learners/scenes_diffusion.py` trains: it knows drawn scenes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agent.spec import PUBLISHED, ToolSpec
from replay.record import Blob
from tools.drawing import draw_spec, picture_seed, read_wish
from tools.pipeline_files import SCENES
from tools.pipeline_tool import PipelineTool
from tools.pipelines import Drawing

_SCENES = {"steps": 8, "guidance": 2.0}  # what the tree's model draws best with


class DiffusionTool(PipelineTool):
    """Draws what a prompt says, with the tree's own small model or any other; options as in `PipelineTool`.

    A size that is one number is the side of a square.
    """

    spec = PUBLISHED["diffusion"]
    edits = False

    def __init__(self, model: str = SCENES, **options: Any) -> None:
        super().__init__(model, **(_SCENES if model == SCENES else {}) | options)

    @classmethod
    def describe(cls, parameters: Sequence[str] = (), **options: Any) -> ToolSpec:
        return draw_spec(parameters)

    def _drawing(self, params: Mapping[str, Any], images: Sequence[Blob]) -> Drawing:
        wish = read_wish(params)
        size = wish.size or self._size
        return Drawing(
            wish.prompt,
            picture_seed(self._seed, wish.prompt) if wish.seed is None else wish.seed,
            wish.steps or self._steps,
            self._guidance if wish.guidance is None else wish.guidance,
            (size, size) if isinstance(size, int) else size,
        )
