"""The operations of the edit tool on RGB and RGBA pictures.

Each takes the picture and its arguments by name and returns a new picture of at least one pixel. Operations on colours
leave transparency as it is; where a picture without transparency gets empty corners, they are white, except for
rounded ones, which make it transparent. Lengths are pixels, angles degrees clockwise.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

from tools.base import CallFailed
from tools.picture import MAX_PIXELS

Picture = Image.Image
Colour = tuple[int, int, int]

_SEPIA = (0.393, 0.769, 0.189, 0, 0.349, 0.686, 0.168, 0, 0.272, 0.534, 0.131, 0)
_WHITE = (255, 255, 255)


def _on_colours(function: Callable[..., Picture]) -> Callable[..., Picture]:
    def on_rgb(image: Picture, **arguments: Any) -> Picture:
        result = function(image.convert("RGB"), **arguments).convert("RGB")
        if image.mode == "RGBA":
            result.putalpha(image.getchannel("A"))
        return result

    return on_rgb


def _check_size(width: float, height: float) -> tuple[int, int]:
    size = max(1, round(width)), max(1, round(height))
    if size[0] * size[1] > MAX_PIXELS:
        raise CallFailed(f"the picture would have {size[0]} x {size[1]} pixels: at most {MAX_PIXELS} are made")
    return size


def _greyscale(image: Picture) -> Picture:
    return ImageOps.grayscale(image)


def _sepia(image: Picture) -> Picture:
    return image.convert("RGB", _SEPIA)


def _invert(image: Picture) -> Picture:
    return ImageOps.invert(image)


def _brightness(image: Picture, factor: float) -> Picture:
    """Below 1 towards black; above 1 a gamma curve, which lifts the dark parts and cuts nothing off."""
    if factor <= 1:
        return ImageEnhance.Brightness(image).enhance(factor)
    return image.point([min(255, round(255 * (v / 255) ** (1 / factor))) for v in range(256)] * 3)


def _contrast(image: Picture, factor: float) -> Picture:
    return ImageEnhance.Contrast(image).enhance(factor)


def _saturation(image: Picture, factor: float) -> Picture:
    return ImageEnhance.Color(image).enhance(factor)


def _blur(image: Picture, radius: float | None = None, strength: float = 0.4) -> Picture:
    side = min(image.size)
    return image.filter(ImageFilter.GaussianBlur(min(radius or max(1.0, 0.04 * strength * side), side)))


def _sharpen(image: Picture, strength: float = 0.4) -> Picture:
    return image.filter(ImageFilter.UnsharpMask(radius=2, percent=round(400 * strength), threshold=0))


def _tint(image: Picture, colour: Colour) -> Picture:
    """Lights stay light and darks dark; the tones between take the colour."""
    toned = ImageOps.colorize(ImageOps.grayscale(image), "black", _WHITE, mid=colour)
    return Image.blend(image, toned, 0.75)


def _posterize(image: Picture, bits: int) -> Picture:
    return ImageOps.posterize(image, min(8, max(1, bits)))


def _pixelate(image: Picture, block: int | None = None) -> Picture:
    block = max(1, block or max(2, min(image.size) // 24))
    small = image.resize((math.ceil(image.width / block), math.ceil(image.height / block)), Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.NEAREST)


def _edges(image: Picture) -> Picture:
    """Dark lines on white."""
    found = ImageOps.grayscale(image).filter(ImageFilter.FIND_EDGES)
    if min(found.size) > 2:  # the filter leaves the outermost pixels as they were
        found = ImageOps.expand(ImageOps.crop(found, 1), 1, 0)
    return ImageOps.invert(ImageOps.autocontrast(found))


def _sketch(image: Picture) -> Picture:
    """A pencil drawing: the grey picture divided by its own blurred self."""
    grey = ImageOps.grayscale(image)
    soft = grey.filter(ImageFilter.GaussianBlur(max(2.0, min(image.size) / 40)))
    ratio = (np.asarray(grey, np.float32) + 16) / (np.asarray(soft, np.float32) + 16)  # 16: less grain in the dark
    return Image.fromarray((255 * np.clip(ratio, 0, 1) ** 3).astype(np.uint8))


def _rotate(image: Picture, clockwise: float) -> Picture:
    turns = {
        90: Image.Transpose.ROTATE_270,
        180: Image.Transpose.ROTATE_180,
        270: Image.Transpose.ROTATE_90,
    }
    angle = clockwise % 360
    if angle in turns:
        return image.transpose(turns[int(angle)])
    a = math.radians(angle)
    cos, sin = abs(math.cos(a)), abs(math.sin(a))
    _check_size(image.width * cos + image.height * sin, image.width * sin + image.height * cos)
    empty = (*_WHITE, 0) if image.mode == "RGBA" else _WHITE
    return image.rotate(-angle, Image.Resampling.BICUBIC, expand=True, fillcolor=empty)


def _flip(image: Picture, axis: str) -> Picture:
    """`axis`: horizontal swaps left and right, vertical swaps top and bottom, or both."""
    if axis in ("horizontal", "both"):
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if axis in ("vertical", "both") else image


def _crop(image: Picture, box: tuple[float, float, float, float]) -> Picture:
    """`box`: left, top, right and bottom as fractions of the width and height."""
    left, top = round(box[0] * image.width), round(box[1] * image.height)
    left, top = min(left, image.width - 1), min(top, image.height - 1)
    right, bottom = round(box[2] * image.width), round(box[3] * image.height)
    return image.crop((left, top, max(left + 1, right), max(top + 1, bottom)))


def _crop_ratio(image: Picture, ratio: float) -> Picture:
    """The largest part in the middle whose width is `ratio` times its height."""
    width = min(image.width, image.height * ratio)
    return _crop_size(image, width, width / ratio)


def _crop_size(image: Picture, width: float, height: float) -> Picture:
    """The middle `width` x `height` pixels, or as many as there are."""
    w, h = (max(1, min(round(n), full)) for n, full in zip((width, height), image.size, strict=True))
    left, top = (image.width - w) // 2, (image.height - h) // 2
    return image.crop((left, top, left + w, top + h))


def _resize(image: Picture, width: float | None = None, height: float | None = None, factor: float = 1) -> Picture:
    """To `width` and `height`; with one of them the other follows; with neither, both times `factor`."""
    w, h = image.size
    if width and height:
        size = _check_size(width, height)
    elif width or height:
        scale = width / w if width else (height or h) / h
        size = _check_size(w * scale, h * scale)
    else:
        size = _check_size(w * factor, h * factor)
    return image.resize(size, Image.Resampling.LANCZOS)


def _thumbnail(image: Picture, side: int) -> Picture:
    """Into a square of `side`, never enlarged."""
    image = image.copy()
    image.thumbnail((max(1, side), max(1, side)), Image.Resampling.LANCZOS)
    return image


def _border(image: Picture, colour: Colour, width: int | None = None, share: float = 0.04) -> Picture:
    """`width` pixels, or `share` of the shorter side, added all around."""
    width = min(width or max(1, round(share * min(image.size))), max(image.size))
    _check_size(image.width + 2 * width, image.height + 2 * width)
    return ImageOps.expand(image, width, (*colour, 255) if image.mode == "RGBA" else colour)


def _round_corners(image: Picture, radius: int | None = None) -> Picture:
    radius = min(radius or max(1, min(image.size) // 8), min(image.size) // 2)
    mask = Image.new("L", (4 * image.width, 4 * image.height) if max(image.size) < 1024 else image.size, 0)
    ImageDraw.Draw(mask).rounded_rectangle(
        (0, 0, mask.width - 1, mask.height - 1), radius * mask.width // image.width, 255
    )
    result = image.convert("RGBA")
    mask = mask.resize(image.size, Image.Resampling.BOX)
    result.putalpha(ImageChops.multiply(result.getchannel("A"), mask))
    return result


@cache
def _font_file() -> str:
    """DejaVu Sans, which matplotlib carries: Latin, Greek, Cyrillic, Arabic and many signs."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise RuntimeError("captions need the font that comes with matplotlib, which is not installed")
    return str(Path(spec.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf")


def _caption(image: Picture, text: str, at: str = "bottom", colour: Colour = _WHITE) -> Picture:
    """Write over the picture, at its top or bottom, wrapped to its width, with a contrasting outline."""
    size = max(8, min(image.size) // 12)
    font = ImageFont.truetype(_font_file(), size)
    result = image.copy()
    draw = ImageDraw.Draw(result)
    lines = _wrap(text, lambda line: draw.textlength(line, font=font), 0.94 * image.width)
    outline = _WHITE if sum(colour) < 384 else (0, 0, 0)
    draw.multiline_text(
        (image.width / 2, size / 3 if at == "top" else image.height - size / 3),
        "\n".join(lines),
        fill=colour,
        font=font,
        anchor="ma" if at == "top" else "md",
        align="center",
        stroke_width=max(1, size // 10),
        stroke_fill=outline,
    )
    return result


def _wrap(text: str, measure: Callable[[str], float], width: float) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and measure(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


OPERATIONS: dict[str, Callable[..., Picture]] = {
    "greyscale": _on_colours(_greyscale),
    "sepia": _on_colours(_sepia),
    "invert": _on_colours(_invert),
    "brightness": _on_colours(_brightness),
    "contrast": _on_colours(_contrast),
    "saturation": _on_colours(_saturation),
    "blur": _on_colours(_blur),
    "sharpen": _on_colours(_sharpen),
    "tint": _on_colours(_tint),
    "posterize": _on_colours(_posterize),
    "pixelate": _on_colours(_pixelate),
    "edges": _on_colours(_edges),
    "sketch": _on_colours(_sketch),
    "rotate": _rotate,
    "flip": _flip,
    "crop": _crop,
    "crop_ratio": _crop_ratio,
    "crop_size": _crop_size,
    "resize": _resize,
    "thumbnail": _thumbnail,
    "border": _border,
    "round_corners": _round_corners,
    "caption": _caption,
}
