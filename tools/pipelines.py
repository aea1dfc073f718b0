"""Running diffusers pipelines: calls that agree in size, steps and guidance go through together.

Each picture has a generator of its own, on the CPU, so its noise is the same alone and in any company. A batch that
breaks is halved until the picture that broke it is alone: its failure is its own, the others are made.
"""

from __future__ import annotations

import gc
import inspect
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from tools.pipeline_files import load

log = logging.getLogger(__name__)

#: Classes that make one picture of several: a list of pictures is one call there, and a batch of calls elsewhere.
SEVERAL = ("QwenImageEditPlusPipeline", "Flux2Pipeline", "Flux2KleinPipeline", "Flux2KleinKVPipeline")


#: What the tools set themselves, or what would make something else than one encoded picture a call.
_RESERVED = frozenset(
    ("prompt", "image", "generator", "num_inference_steps", "width", "height", "max_area", "latents")
    + ("num_images_per_prompt", "output_type", "return_dict")
)


class OutOfMemory(RuntimeError):
    """One picture alone does not fit."""


@dataclass(frozen=True)
class Drawing:
    """One picture to make; None is the pipeline's own.

    Attributes:
        seed: of its noise.
        size: width and height in pixels.
        images: what it is made of, first the one to change; equal sizes batch.
    """

    prompt: str
    seed: int
    steps: int | None = None
    guidance: float | None = None
    size: tuple[int, int] | None = None
    images: tuple[Image.Image, ...] = ()


class Pipeline:
    """A loaded pipeline.

    Args:
        model: a folder that `DiffusionPipeline.save_pretrained` wrote, or a hub name.
        edits: whether it is to make pictures of pictures, or of words alone.
        batch: pictures that go through at once, at most; halved for good when the memory does not hold them.
        threads: CPU threads.
        offload: keep on the GPU only the part that works; without a GPU it changes nothing.
        extra: further keyword arguments of the pipeline's call, as its documentation names them.

    Raises:
        FileNotFoundError: `model` is a path without a pipeline.
        ValueError: an option is out of range or unknown, or the pipeline cannot do this.
    """

    def __init__(
        self,
        model: str,
        *,
        edits: bool = False,
        batch: int = 1,
        threads: int = 1,
        offload: bool = False,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        if batch < 1 or threads < 1:
            raise ValueError(f"batch and threads must be at least 1, not {batch} and {threads}")
        self.model, self._threads, self._extra = model, threads, dict(extra or {})
        self._pipeline, self._in_inference_mode = load(model, edits, offload)
        self.name = type(self._pipeline).__name__
        self._known = inspect.signature(self._pipeline.__call__).parameters
        self._guidance = _guidance_name(self._known)
        free = [key for key in self._known if key not in _RESERVED | {self._guidance}]
        if wrong := [key for key in self._extra if key not in free]:
            raise ValueError(f"extra may not hold {wrong[0]!r} for {self.name}: it may hold {', '.join(free)}")
        self.takes_size = "height" in self._known and "width" in self._known
        self.takes_several = edits and self.name in SEVERAL
        self._batch = 1 if self.takes_several else batch
        self._broken = ""
        self._lock = threading.Lock()  # a pipeline's scheduler holds the state of the pictures it works on

    def draw(self, drawings: Sequence[Drawing]) -> list[Image.Image | Exception]:
        """The picture of each, or why there is none."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, d in enumerate(drawings):
            groups.setdefault((d.steps, d.guidance, d.size, *(image.size for image in d.images)), []).append(i)
        made: dict[int, Image.Image | Exception] = {}
        for group in groups.values():
            while group:
                part, group = group[: self._batch], group[self._batch :]
                made.update(zip(part, self._together([drawings[i] for i in part]), strict=True))
        return [made[i] for i in range(len(drawings))]

    def _together(self, drawings: Sequence[Drawing]) -> list[Image.Image | Exception]:
        """Pictures that agree, at once; if that breaks, in two halves."""
        try:
            with self._lock:
                return list(self._call(drawings))
        except Exception as error:
            problem = self._problem(error, drawings[0])
        # out of the handler, so that nothing holds the frames with the failed batch's tensors any more
        if isinstance(problem, OutOfMemory):
            _free()
        if len(drawings) == 1:
            return [problem]
        half = (len(drawings) + 1) // 2
        if isinstance(problem, OutOfMemory):
            log.warning("%s does not fit %d pictures: from now on at most %d at once", self.model, len(drawings), half)
            self._batch = min(self._batch, half)
        return self._together(drawings[:half]) + self._together(drawings[half:])

    def _call(self, drawings: Sequence[Drawing]) -> list[Image.Image]:
        import torch  # heavy, and loaded by now

        torch.set_num_threads(self._threads)
        noise = [torch.Generator("cpu").manual_seed(d.seed) for d in drawings]
        with torch.inference_mode() if self._in_inference_mode else torch.no_grad():
            images = self._pipeline(generator=noise, **self._arguments(drawings)).images
        if len(images) != len(drawings) or not all(isinstance(image, Image.Image) for image in images):
            raise RuntimeError(f"{self.name} was to make {len(drawings)} pictures, and made something else")
        return images

    def _arguments(self, drawings: Sequence[Drawing]) -> dict[str, Any]:
        """The call's keyword arguments; pipelines differ in what they call guidance."""
        first, count = drawings[0], len(drawings)
        asked: dict[str, Any] = {"prompt": [d.prompt for d in drawings]}
        if first.images:
            asked["image"] = list(first.images) if self.takes_several else [d.images[0] for d in drawings]
        if first.steps is not None:
            asked["num_inference_steps"] = first.steps
        if first.guidance is not None and self._guidance:
            asked[self._guidance] = first.guidance
        if first.size is not None and self.takes_size:
            asked |= {"width": first.size[0], "height": first.size[1]}
            if "max_area" in self._known:  # FLUX Kontext would scale any size to this area
                asked["max_area"] = first.size[0] * first.size[1]
        extra = dict(self._extra)
        if self._guidance == "true_cfg_scale":
            extra.setdefault("negative_prompt", " ")  # without one, the Qwen-Image family leaves guidance out
        if isinstance(extra.get("negative_prompt"), str):
            extra["negative_prompt"] = [extra["negative_prompt"]] * count
        return asked | extra

    def said(self, drawing: Drawing) -> dict[str, Any]:
        """The provenance of a picture: `maker`, `model`, `steps`, `guidance`, `seed`, and `truncated` where it is."""
        steps = self._known["num_inference_steps"].default if drawing.steps is None else drawing.steps
        facts = {"maker": self.model, "model": self.model, "steps": steps}
        if self._guidance:
            guidance = drawing.guidance
            facts["guidance"] = self._known[self._guidance].default if guidance is None else guidance
        return facts | {"seed": drawing.seed} | ({"truncated": True} if self._cuts(drawing.prompt) else {})

    def _cuts(self, prompt: str) -> bool:
        """Whether the only tokenizer of the pipeline has a limit and cuts the prompt there."""
        tokenizer = getattr(self._pipeline, "tokenizer", None)
        if tokenizer is None or hasattr(self._pipeline, "tokenizer_2"):
            return False
        return len(tokenizer(prompt).input_ids) > tokenizer.model_max_length

    def _problem(self, error: Exception, drawing: Drawing) -> Exception:
        """The failure as its call is told of it, without the frames that it came through."""
        import torch

        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
            size = f"{drawing.size[0]} x {drawing.size[1]} " if drawing.size else ""
            return OutOfMemory(
                f"the memory does not hold one {size}picture of {self.model}: set a smaller size, or offload: true"
            )
        if isinstance(error, torch.AcceleratorError):
            self._broken = f"the accelerator failed, and this process cannot use it any more: {_line(error)}"
        return RuntimeError(f"{self.name} of {self.model} failed: {type(error).__name__}: {_line(error)}")

    def check(self) -> None:
        """Raises RuntimeError when the accelerator failed in a way that only a new process mends."""
        if self._broken:
            raise RuntimeError(self._broken)


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no reason given")


def _guidance_name(known: Mapping[str, inspect.Parameter]) -> str:
    """What the pipeline calls classifier-free guidance; "" if it has none."""
    if "true_cfg_scale" in known and ("guidance_scale" not in known or known["guidance_scale"].default is None):
        return "true_cfg_scale"  # the Qwen-Image family; in FLUX it is a second guidance beside the distilled one
    return "guidance_scale" if "guidance_scale" in known else ""


def _free() -> None:
    """Give unused memory of the accelerator back."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
