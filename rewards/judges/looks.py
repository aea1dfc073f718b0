"""What code can see of a picture: whether it opens, how large it is, whether anything is on it, whether two are one."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageStat

from replay.record import Blob

#: The shorter side, in pixels, and the range of a colour channel that are enough to see something.
_ENOUGH_SIDE, _ENOUGH_RANGE = 32, 48
#: Side of the thumbnails that pictures are compared by.
_THUMBNAIL = 32
_MOST_PIXELS = 50_000_000
#: Mean difference of two thumbnails, in levels of 255, that is still none.
_SAME = 0.5


@dataclass(frozen=True)
class Look:
    """What is measured of a picture.

    Attributes:
        pixels: width and height.
        size, visible: as shares of what is enough.
        framed: its outermost pixels are of one colour: if it was drawn on a canvas, nothing is cut off.
    """

    pixels: tuple[int, int]
    size: float
    visible: float
    framed: bool
    thumbnail: Image.Image

    def same(self, other: Look) -> bool:
        """Whether two pictures cannot be told apart: equal in pixels, and in colour but for a trace."""
        if self.pixels != other.pixels:
            return False
        return max(ImageStat.Stat(ImageChops.difference(self.thumbnail, other.thumbnail)).mean) < _SAME


def look(blob: Blob) -> Look | str:
    """Open and measure a picture, or say why it cannot be opened."""
    try:
        with Image.open(io.BytesIO(blob.data)) as image:
            pixels = image.size
            if pixels[0] * pixels[1] > _MOST_PIXELS:
                return f"is of {pixels[0]} x {pixels[1]} pixels: too large to open"
            image.draft("RGB", (8 * _THUMBNAIL, 8 * _THUMBNAIL))
            flat = _on_white(image)
    # What Pillow's decoders raise on broken data.
    except (OSError, SyntaxError, ValueError, EOFError, OverflowError, Image.DecompressionBombError) as error:
        return f"cannot be opened: {error}"
    width, height = flat.size
    # Axes without data have marks at the rim only: the middle two thirds tell whether something is shown.
    middle = flat.crop((width // 6, height // 6, width - width // 6, height - height // 6))
    contrast = max(high - low for low, high in ImageStat.Stat(middle).extrema)
    thumbnail = flat.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX)
    size, visible = min(1.0, min(pixels) / _ENOUGH_SIDE), min(1.0, contrast / _ENOUGH_RANGE)
    return Look(pixels, size, visible, _framed(flat), thumbnail)


def _framed(image: Image.Image) -> bool:
    width, height = image.size
    rims = ((0, 0, width, 1), (0, height - 1, width, height), (0, 0, 1, height), (width - 1, 0, width, height))
    extremes = [ImageStat.Stat(image.crop(rim)).extrema for rim in rims]
    return all(max(e[i][1] for e in extremes) - min(e[i][0] for e in extremes) <= _ENOUGH_RANGE for i in range(3))


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16 bits of grey, which Pillow would clip rather than scale.
        return image.convert("I").point(lambda level: level * (1 / 256)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    clear = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
