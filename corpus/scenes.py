"""Drawn scenes: one shape of one colour at one place on one ground, their wordings, and a checker of pictures of them.

The checker (`look`) never sees words: it measures a picture by colour, position and outline alone, so it can judge
what an image model made of a prompt. It relies on one property of the drawings: no ground holds a pixel near one of
the eight object colours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

SHAPES = ("circle", "square", "triangle", "star", "heart", "house", "tree", "boat")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
PLACES = ("left", "right", "top", "bottom", "middle")
GROUNDS = ("meadow", "sea", "desert", "night", "snow")

Point = tuple[float, float]
RGB = tuple[int, int, int]

_RGB: dict[str, RGB] = {
    "red": (216, 36, 44),
    "orange": (246, 130, 22),
    "yellow": (252, 218, 30),
    "green": (28, 148, 62),
    "blue": (34, 82, 216),
    "purple": (128, 48, 172),
    "pink": (250, 126, 184),
    "white": (255, 255, 255),
}
#: Where the middle of an object is, as shares of width and height.
CENTRES: dict[str, Point] = {
    "left": (0.27, 0.5),
    "right": (0.73, 0.5),
    "top": (0.5, 0.27),
    "bottom": (0.5, 0.73),
    "middle": (0.5, 0.5),
}
#: Sky at the top, sky at the horizon, the land, its detail.
_GROUND_RGB: dict[str, tuple[RGB, RGB, RGB, RGB]] = {
    "meadow": ((160, 202, 236), (204, 226, 236), (172, 208, 134), (150, 190, 114)),
    "sea": ((186, 212, 230), (204, 220, 226), (118, 172, 198), (160, 202, 216)),
    "desert": ((238, 212, 170), (242, 222, 186), (222, 194, 146), (206, 174, 126)),
    "night": ((22, 26, 58), (52, 56, 98), (30, 40, 48), (170, 166, 130)),
    "snow": ((158, 176, 202), (180, 194, 212), (204, 214, 228), (186, 200, 218)),
}
_OUTLINE: RGB = (38, 34, 46)
_NIGHT_OUTLINE: RGB = (206, 208, 226)
_SUPERSAMPLING = 4
#: How far a pixel may be from an object colour (Euclidean, 8-bit RGB) and still be of it.
_REACH = {colour: 40.0 if colour == "white" else 62.0 for colour in COLOURS}
#: The smallest object that `look` believes in, in pixels of a 64 x 64 picture.
_SMALLEST = 40


def _circle() -> list[Point]:
    return [(math.cos(a), math.sin(a)) for a in np.linspace(0, 2 * math.pi, 48, endpoint=False)]


def _star() -> list[Point]:
    spikes = ((1.12 if i % 2 == 0 else 0.46, math.pi * (i / 5 - 0.5)) for i in range(10))
    return [(r * math.cos(a), r * math.sin(a) + 0.08) for r, a in spikes]


def _heart() -> list[Point]:
    turns = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    curve = [
        (16 * math.sin(t) ** 3, 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
        for t in turns
    ]
    return [(x / 16, -(y + 2.5) / 15) for x, y in curve]


#: Parts of each shape in units of its half-size, y down: (points, fill), where fill None is the object's colour.
_PARTS: dict[str, list[tuple[list[Point], RGB | None]]] = {
    "circle": [(_circle(), None)],
    "square": [([(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)], None)],
    "triangle": [([(0.0, -1.0), (1.08, 0.9), (-1.08, 0.9)], None)],
    "star": [(_star(), None)],
    "heart": [(_heart(), None)],
    "house": [
        ([(-0.74, -0.2), (0.74, -0.2), (0.74, 1.0), (-0.74, 1.0)], None),
        ([(0.0, -1.1), (1.06, -0.2), (-1.06, -0.2)], None),
        ([(-0.2, 0.36), (0.2, 0.36), (0.2, 1.0), (-0.2, 1.0)], (92, 70, 58)),
    ],
    "tree": [
        ([(-0.18, 0.5), (0.18, 0.5), (0.18, 1.1), (-0.18, 1.1)], (112, 78, 54)),
        ([(0.0, -0.4), (1.0, 0.66), (-1.0, 0.66)], None),
        ([(0.0, -1.14), (0.74, -0.06), (-0.74, -0.06)], None),
    ],
    "boat": [
        ([(-0.06, -1.1), (0.06, -1.1), (0.06, 0.4), (-0.06, 0.4)], (92, 70, 58)),
        ([(0.14, -1.0), (0.92, 0.26), (0.14, 0.26)], None),
        ([(-0.14, -0.8), (-0.14, 0.26), (-0.8, 0.26)], None),
        ([(-1.12, 0.4), (1.12, 0.4), (0.7, 1.0), (-0.7, 1.0)], None),
    ],
}


def draw(shape: str, colour: str, place: str, ground: str, rng: Random, size: int = 64) -> Image.Image:
    """Draw one scene; `rng` varies size, position and the ground a little.

    Returns:
        An RGB picture of `size` x `size` pixels.

    Raises:
        KeyError: a word outside SHAPES, COLOURS, PLACES or GROUNDS.
    """
    big = size * _SUPERSAMPLING
    image = _ground(ground, rng, big)
    x, y = (c + rng.uniform(-0.02, 0.02) for c in CENTRES[place])
    half = rng.uniform(0.19, 0.22)
    pen = ImageDraw.Draw(image)
    outline = _NIGHT_OUTLINE if ground == "night" else _OUTLINE
    parts = [([((x + half * u) * big, (y + half * v) * big) for u, v in part], fill) for part, fill in _PARTS[shape]]
    for corners, _ in parts:  # all outlines first: parts that touch become one silhouette
        pen.line([*corners, corners[0], corners[1]], fill=outline, width=round(big * 0.04), joint="curve")
    for corners, fill in parts:
        pen.polygon(corners, fill=fill or _RGB[colour])
    return image.resize((size, size), Image.Resampling.BOX)


def _ground(ground: str, rng: Random, big: int) -> Image.Image:
    """Sky, land with a gently waved horizon, and a few marks that tell what the land is."""
    top, low, land, detail = _GROUND_RGB[ground]
    ramp = np.linspace(0, 1, big)[:, None] * (np.array(low) - np.array(top)) + np.array(top)
    image = Image.fromarray(np.broadcast_to(ramp[:, None], (big, big, 3)).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    horizon = (0.62 + rng.uniform(-0.02, 0.02)) * big
    _land(pen, horizon, 0.0 if ground == "sea" else 0.025 * big, rng, land, big)
    if ground in ("desert", "snow"):
        _land(pen, horizon + 0.17 * big, 0.03 * big, rng, detail, big)
    else:
        _MARKS[ground](pen, detail, big)
    return image


def _land(pen: ImageDraw.ImageDraw, horizon: float, swell: float, rng: Random, fill: RGB, big: int) -> None:
    start = rng.uniform(0, 2 * math.pi)
    line = [(x, horizon + swell * math.sin(start + 2 * math.pi * x / big)) for x in range(0, big + 8, 8)]
    pen.polygon([*line, (big + 8, big), (0, big)], fill=fill)


def _waves(pen: ImageDraw.ImageDraw, fill: RGB, big: int) -> None:
    for y in (0.72, 0.82, 0.92):
        line = [(x, (y + 0.012 * math.sin(8 * math.pi * x / big)) * big) for x in range(0, big + 8, 4)]
        pen.line(line, fill=fill, width=round(big * 0.02))


def _tufts(pen: ImageDraw.ImageDraw, fill: RGB, big: int) -> None:
    for x, y in ((0.1, 0.86), (0.3, 0.94), (0.5, 0.86), (0.7, 0.94), (0.9, 0.86)):
        for lean in (-0.03, 0.0, 0.03):
            pen.line([(x * big, y * big), ((x + lean) * big, (y - 0.06) * big)], fill=fill, width=round(big * 0.016))


def _stars(pen: ImageDraw.ImageDraw, fill: RGB, big: int) -> None:
    for x, y in ((0.08, 0.1), (0.26, 0.2), (0.1, 0.36), (0.9, 0.12), (0.76, 0.22), (0.93, 0.36), (0.4, 0.06)):
        pen.ellipse(((x - 0.014) * big, (y - 0.014) * big, (x + 0.014) * big, (y + 0.014) * big), fill=fill)


_MARKS: dict[str, Callable[[ImageDraw.ImageDraw, RGB, int], None]] = {
    "meadow": _tufts,
    "sea": _waves,
    "night": _stars,
}

_PLACE_WORDS = {
    "left": ("on the left", "to the left", "on the left side"),
    "right": ("on the right", "to the right", "on the right side"),
    "top": ("at the top", "near the top", "up at the top"),
    "bottom": ("at the bottom", "near the bottom", "down at the bottom"),
    "middle": ("in the middle", "in the centre", "in the very middle"),
}
_GROUND_WORDS = {
    "meadow": ("over a meadow", "on a meadow", "with a meadow behind it"),
    "sea": ("over a sea", "above the sea", "with the sea behind it"),
    "desert": ("over a desert", "in the desert", "with a desert behind it"),
    "night": ("over a night", "at night", "in the night"),
    "snow": ("over snow", "in the snow", "with snow all around"),
}
_OPENINGS = ("", "", "a picture of ", "please draw ", "an illustration of ", "imagine ", "a dreamy storybook scene: ")
_CLOSINGS = ("", "", ", simple and flat", ", in a playful style", " for a children's book", ", soft light")


def describe(shape: str, colour: str, place: str, ground: str, rng: Random, full: bool = False) -> str:
    """Word a scene in one of many ways; unless `full`, one in five leaves out the place and one in four the ground."""
    article = "an" if colour[0] in "aeiou" else "a"
    thing = f"{article} {colour} {shape}"
    if rng.random() < 0.2:
        thing = rng.choice((f"one {colour} {shape}", f"{article} {colour}-coloured {shape}", f"a {shape} in {colour}"))
    where = [rng.choice(_PLACE_WORDS[place])] if full or rng.random() < 0.8 else []
    around = [rng.choice(_GROUND_WORDS[ground])] if full or rng.random() < 0.75 else []
    closing = rng.choice(_CLOSINGS)
    if rng.random() < 0.3 and (where or around):
        return ", ".join([*around, *where, thing]) + closing
    order = [thing, *where, *around] if rng.random() < 0.8 else [thing, *around, *where]
    return rng.choice(_OPENINGS) + " ".join(order) + closing


@dataclass(frozen=True)
class Look:
    """What a picture shows, as far as `look` can measure it; None where it sees no object.

    Attributes:
        shape, colour, place, ground: words of the vocabulary.
        likeness: overlap (0..1) of the object's outline with the best shape.
    """

    shape: str | None
    colour: str | None
    place: str | None
    ground: str
    likeness: float = 0.0


def look(image: Image.Image) -> Look:
    """Measure which scene a picture shows: colour by area, place by centroid, shape by outline."""
    pixels = _pixels(image)
    ground = _nearest_ground(pixels)
    colour, mask = _object(pixels)
    if colour is None:
        return Look(None, None, None, ground)
    rows, columns = np.nonzero(mask)
    centre = ((columns.min() + columns.max() + 1) / 2 / 64, (rows.min() + rows.max() + 1) / 2 / 64)
    place = min(PLACES, key=lambda p: math.dist(centre, CENTRES[p]))
    outline = _outline(mask)
    shape, likeness = max(((s, _overlap(outline, t)) for s, t in _templates().items()), key=lambda pair: pair[1])
    return Look(shape, colour, place, ground, likeness)


def _pixels(image: Image.Image) -> np.ndarray:
    small = image.convert("RGB").resize((64, 64), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32)


def _object(pixels: np.ndarray) -> tuple[str | None, np.ndarray]:
    """The colour with the largest connected patch, and the mask (64, 64) of everything of that colour near it."""
    distances = np.stack([np.linalg.norm(pixels - np.array(_RGB[c]), axis=-1) for c in COLOURS])
    nearest = distances.argmin(0)
    best: tuple[str | None, np.ndarray] = (None, np.zeros((64, 64), dtype=bool))
    for index, colour in enumerate(COLOURS):
        mask = (nearest == index) & (distances[index] < _REACH[colour])
        # Masts, doors and roof lines cut an object into patches: join what lies within four pixels.
        patches, count = ndimage.label(ndimage.binary_dilation(mask, iterations=2))
        if not count:
            continue
        areas = ndimage.sum_labels(mask, patches, range(1, count + 1))
        patch = mask & (patches == 1 + int(areas.argmax()))
        if patch.sum() >= _SMALLEST and patch.sum() > best[1].sum():
            best = (colour, patch)
    return best


def _outline(mask: np.ndarray, size: int = 24) -> np.ndarray:
    """The mask cropped to a square around its box and scaled to (size, size)."""
    rows, columns = np.nonzero(mask)
    half = max(np.ptp(rows), np.ptp(columns)) / 2 + 0.5
    x, y = (columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2
    whole = Image.fromarray(mask.astype(np.uint8) * 255)
    box = (x - half, y - half, x + half, y + half)
    crop = whole.transform((size, size), Image.Transform.EXTENT, box, Image.Resampling.BILINEAR)
    return np.asarray(crop, dtype=np.float32) / 255


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.minimum(a, b).sum() / np.maximum(a, b).sum())


@lru_cache(maxsize=1)
def _templates() -> dict[str, np.ndarray]:
    """The mean outline of each drawn shape."""
    rng = Random(0)
    drawn = {s: [draw(s, "red", "middle", "sea", rng) for _ in range(6)] for s in SHAPES}
    return {s: np.mean([_outline(_object(_pixels(i))[1]) for i in images], axis=0) for s, images in drawn.items()}


def _nearest_ground(pixels: np.ndarray) -> str:
    """By the upper and lower corners, which no object reaches."""
    sky = np.median(np.concatenate([pixels[:6, :6], pixels[:6, -6:]]), axis=(0, 1))
    land = np.median(np.concatenate([pixels[-8:, :6], pixels[-8:, -6:]]), axis=(0, 1))

    def distance(ground: str) -> float:
        top, _, floor, _ = _GROUND_RGB[ground]
        return float(np.linalg.norm(sky - np.array(top)) + np.linalg.norm(land - np.array(floor)))

    return min(GROUNDS, key=distance)
