"""What the `diffusion` and the `edit-diffusion` tools share: their options, and calls that run together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from agent.spec import ToolSpec
from replay.record import Blob
from tools.base import CallFailed, ToolResult
from tools.drawing import Size, read_size
from tools.picture import encode
from tools.pipelines import Drawing, Pipeline


class PipelineTool(ABC):
    """A tool that makes a call's picture with a diffusers pipeline.

    Args:
        model: a folder that `DiffusionPipeline.save_pretrained` wrote (a relative one is looked for in the working
            directory, then in this tree), or a name on the Hugging Face hub.
        steps: denoising steps; None is the model's own.
        guidance: classifier-free guidance scale, 1 turns it off; None is the model's own.
        size: a side as 1024, or width x height as "1024x768", in pixels, multiples of 8; None is the model's own.
        seed: another seed gives other pictures for the same calls.
        parameters: which of `size`, `steps`, `guidance` and `seed` the agent may set; they join the call's spec.
        batch: calls that go through at once, at most.
        threads: CPU threads of a batch.
        offload: keep on the GPU only the part of the pipeline that works.
        extra: further keyword arguments of the pipeline's call.

    Raises:
        FileNotFoundError: `model` is a path without a pipeline.
        ValueError: an option is out of range, or `model` does something else.
    """

    spec: ToolSpec
    edits: bool

    def __init__(
        self,
        model: str,
        steps: int | None = None,
        guidance: float | None = None,
        size: int | str | None = None,
        seed: int = 0,
        parameters: Sequence[str] = (),
        batch: int = 1,
        threads: int = 1,
        offload: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.spec = self.describe(parameters=parameters)
        for name, number in (("steps", steps), ("batch", batch), ("threads", threads)):
            if number is not None and number < 1:
                raise ValueError(f"{name} of the {self.spec.name} tool must be at least 1, not {number}")
        self._steps, self._guidance, self._size, self._seed = steps, guidance, self._read(size), seed
        self.batch = batch
        self._pipeline = Pipeline(model, edits=self.edits, batch=batch, threads=threads, offload=offload, extra=extra)

    def _read(self, size: int | str | None) -> Size | None:
        try:
            read = None if size is None else read_size(size)
        except ValueError as error:
            raise ValueError(f"size of the {self.spec.name} tool must be pixels: {error}") from error
        sides = () if read is None else (read,) if isinstance(read, int) else read
        if any(side < 8 or side % 8 for side in sides):
            raise ValueError(f"size of the {self.spec.name} tool must be positive multiples of 8, not {size}")
        return read

    @classmethod
    @abstractmethod
    def describe(cls, parameters: Sequence[str] = (), **options: Any) -> ToolSpec:
        """The spec of a tool with these options, without loading its model."""

    @abstractmethod
    def _drawing(self, params: Mapping[str, Any], images: Sequence[Blob]) -> Drawing:
        """What a call asks for. Raises CallFailed."""

    def run(self, params: Mapping[str, Any], images: Sequence[Blob] = ()) -> ToolResult:
        """Make the picture of one call.

        What a prompt has beyond the tokenizer's limit is not looked at; provenance then says `truncated`.

        Raises:
            CallFailed: the prompt is empty, a parameter is out of range, or a picture cannot be read.
            OutOfMemory: the picture does not fit.
        """
        (result,) = self.run_many([(params, images)])
        if isinstance(result, Exception):
            raise result
        return result

    def run_many(self, calls: Sequence[tuple[Mapping[str, Any], Sequence[Blob]]]) -> list[ToolResult | Exception]:
        """Make the pictures of several calls, together where they agree in size, steps and guidance.

        Returns:
            In the calls' order: a result; `CallFailed`, the call's fault; or another exception, infrastructure's.
        """
        plans = [self._plan(*call) for call in calls]
        drawings = [plan for plan in plans if isinstance(plan, Drawing)]
        made = iter(self._pipeline.draw(drawings))
        return [
            self._result(plan, next(made), call[1]) if isinstance(plan, Drawing) else plan
            for plan, call in zip(plans, calls, strict=True)
        ]

    def _plan(self, params: Mapping[str, Any], images: Sequence[Blob]) -> Drawing | CallFailed:
        try:
            return self._drawing(params, images)
        except CallFailed as failed:
            return failed

    def _result(self, drawing: Drawing, made: Any, images: Sequence[Blob]) -> ToolResult | Exception:
        if isinstance(made, Exception):
            return made
        of = {"of": [image.sha256 for image in images]} if images else {}
        return ToolResult((Blob(encode(made)),), self._pipeline.said(drawing) | of)

    def check(self) -> None:
        """Raises RuntimeError when only a new process can go on."""
        self._pipeline.check()
