"""What a call may ask of a tool that makes pictures from words, and the spec that says so to the agent.

The published calls have a prompt, and the picture to edit. An option `parameters` opens more of a tool to the agent:
any of `size`, `steps`, `guidance` and `seed`; what a call does not say, the config does.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from agent.spec import PUBLISHED, ToolSpec
from replay.record import Blob
from tools.base import CallFailed
from tools.picture import Unreadable, decode

#: What a config may open to the agent, each with its type in the protocol and its line in the system prompt.
PARAMETERS: dict[str, tuple[type, str]] = {
    "size": (str, "size is width x height in pixels, as '1024x768'"),
    "steps": (int, "steps is the number of denoising steps, 1 to 100"),
    "guidance": (str, "guidance is how closely the words are followed, as '4.5'"),
    "seed": (int, "seed is any whole number: another one gives another picture"),
}
MOST_STEPS, MOST_GUIDANCE = 100, 50.0  # what a call may ask for; a config is not limited
SIDES = (64, 2048)  # of a picture, in pixels, that a call asks for
GRID = 16  # pixels: sides are multiples of it; every pipeline takes that

Size = int | tuple[int, int]  # the side of a square, or width and height, in pixels


@dataclass(frozen=True)
class Wish:
    """What one call asks for; None is left to the config, and where that says nothing, to the model."""

    prompt: str
    size: Size | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None


def draw_spec(parameters: Sequence[str] = ()) -> ToolSpec:
    """The published diffusion call, with more parameters. Raises ValueError for one that there is not."""
    return _with(PUBLISHED["diffusion"], parameters)


def edit_spec(references: int = 1, parameters: Sequence[str] = ()) -> ToolSpec:
    """The published edit call, for several pictures if `references` is above 1, with more parameters.

    Raises:
        ValueError: there is no such parameter, or fewer than one picture is to be edited.
    """
    if references < 1:
        raise ValueError(f"references must be at least 1, not {references}")
    spec = PUBLISHED["edit"]
    if references > 1:
        when = f"{spec.when}; img_index is a list of up to {references} images, the one to change first: [0, 2]"
        spec = replace(spec, params=dict(spec.params) | {"img_index": list[int]}, when=when)
    return _with(spec, parameters)


def _with(spec: ToolSpec, parameters: Sequence[str]) -> ToolSpec:
    if unknown := [p for p in parameters if p not in PARAMETERS]:
        raise ValueError(f"no parameter {unknown[0]!r} can be opened to the agent: there are {', '.join(PARAMETERS)}")
    more = {name: PARAMETERS[name][0] for name in parameters}
    when = "; ".join([spec.when, *(PARAMETERS[name][1] for name in parameters)])
    return replace(spec, params={**spec.params, **more}, when=when)


def read_wish(params: Mapping[str, Any]) -> Wish:
    """What the parameters of a call ask for.

    Raises:
        CallFailed: the prompt is empty, or a parameter is out of range.
    """
    prompt = str(params["prompt"]).encode("utf-8", "replace").decode().strip()
    if not prompt:
        raise CallFailed("the prompt of the call is empty: say what the picture shows")
    return Wish(
        prompt,
        _called_size(params["size"]) if "size" in params else None,
        int(_in_range("steps", params["steps"], 1, MOST_STEPS)) if "steps" in params else None,
        _in_range("guidance", params["guidance"], 0, MOST_GUIDANCE) if "guidance" in params else None,
        int(_in_range("seed", params["seed"], 0, 2**63 - 1)) if "seed" in params else None,
    )


def _called_size(text: str) -> tuple[int, int]:
    try:
        size = read_size(text)
    except ValueError as error:
        raise CallFailed(str(error)) from error
    width, height = (size, size) if isinstance(size, int) else size
    if not all(SIDES[0] <= side <= SIDES[1] for side in (width, height)):
        raise CallFailed(f"size is {text!r}: each side must be {SIDES[0]} to {SIDES[1]} pixels")
    return on_grid(width), on_grid(height)


def _in_range(name: str, value: Any, least: float, most: float) -> float:
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        number = math.nan
    if not least <= number <= most:
        raise CallFailed(f"{name} is {value!r}: it must be a number from {least:g} to {most:g}")
    return number


def read_size(text: str | int) -> Size:
    """`"1024x768"` or `"512"`, or a number. Raises ValueError for anything else."""
    found = re.fullmatch(r"\s*(\d{1,5})(?:\s*[x×]\s*(\d{1,5}))?\s*", str(text))
    if not found:
        raise ValueError(f"size must be a side as '1024' or width x height as '1024x768', not {str(text)[:40]!r}")
    width, height = found.groups()
    return (int(width), int(height)) if height else int(width)


def on_grid(side: float) -> int:
    """The nearest side that every pipeline takes."""
    return max(GRID, round(side / GRID) * GRID)


def picture_seed(seed: int, prompt: str, images: Sequence[Blob] = ()) -> int:
    """The seed (32 bits) of one picture."""
    text = "\n".join([str(seed), prompt, *(image.sha256 for image in images)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def sources(images: Sequence[Blob], most: int) -> list[Image.Image]:
    """The pictures that a call points at, decoded.

    Raises:
        CallFailed: there are none, more than `most`, or one that cannot be read.
    """
    if not images:
        raise CallFailed("there is no picture to edit: img_index must point at an earlier one")
    if len(images) > most:
        raise CallFailed(f"img_index names {len(images)} pictures: at most {most} are taken")
    try:
        return [decode(image.data) for image in images]
    except Unreadable as error:
        raise CallFailed(f"the picture to edit {error}") from error
