"""Draws the map of one country out of a TopoJSON world (Natural Earth, as packaged in `world-atlas`).

The projection is Lambert's azimuthal equal-area one, centred on the country itself: no country is cut by the edge of
the sheet, whatever its longitude. Neighbours are the countries that share an arc of the topology.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import font_manager
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont

SIZE = (320, 240)
SCALE = 3  # drawn this much larger, then reduced: smooth edges
SEA, LAND, NEIGHBOUR, COUNTRY, BORDER = "#bcdcf0", "#f0ece2", "#dccfae", "#e0632b", "#8c8573"
LABEL = "#4a4637"
MIN_RADIUS_KM = 25.0  # half the height of the sheet for the smallest countries
TINY, FEW = 0.002, 12  # share of the sheet; number of parts
EARTH_KM = 6371.0
FAR = -0.6  # cosine of the distance beyond which points are left out: the antipode has no place on the sheet

#: The colours and what smooth edges make of any two of them.
_INKS = [ImageColor.getrgb(c) for c in (SEA, LAND, NEIGHBOUR, COUNTRY, BORDER, LABEL, "black", "white")]
PALETTE = sorted({tuple((a + b) // 2 for a, b in zip(x, y, strict=True)) for x in _INKS for y in _INKS})

Ring = NDArray[np.float64]  # (n, 2): longitude, latitude in degrees
Flat = NDArray[np.float64]  # (n, 2): east, north in km


@dataclass(frozen=True)
class Shape:
    """A country of the atlas: its outer rings and the arcs they are made of."""

    rings: tuple[Ring, ...]
    arcs: frozenset[int]

    @cached_property
    def main(self) -> Ring:
        """The largest part."""
        return max(self.rings, key=lambda r: _area(project(r, _middle(r))))

    @cached_property
    def size(self) -> float:
        """Square km of the largest part."""
        return _area(project(self.main, _middle(self.main)))


class Atlas:
    """All countries of one TopoJSON file.

    Args:
        path: `countries-10m.json` of the npm package `world-atlas`.
    """

    def __init__(self, path: Path) -> None:
        topology = json.loads(path.read_text())
        scale, shift = (np.array(topology["transform"][k]) for k in ("scale", "translate"))
        self._arcs = [np.cumsum(np.array(arc), axis=0) * scale + shift for arc in topology["arcs"]]
        self.shapes: dict[str, Shape] = {}
        for geometry in topology["objects"]["countries"]["geometries"]:
            key = geometry.get("id") or geometry["properties"]["name"]
            shape = self._shape(geometry)
            known = self.shapes.get(key, Shape((), frozenset()))  # Australia comes with its outer islands apart
            self.shapes[key] = Shape(known.rings + shape.rings, known.arcs | shape.arcs)

    def _shape(self, geometry: dict) -> Shape:
        polygons = geometry["arcs"] if geometry["type"] == "MultiPolygon" else [geometry["arcs"]]
        rings = tuple(np.concatenate([self._arc(i) for i in polygon[0]]) for polygon in polygons)
        arcs = frozenset(~i if i < 0 else i for polygon in polygons for ring in polygon for i in ring)
        return Shape(rings, arcs)

    def _arc(self, index: int) -> Ring:
        return self._arcs[~index][::-1] if index < 0 else self._arcs[index]

    @cached_property
    def _owners(self) -> dict[int, set[str]]:
        owners: dict[int, set[str]] = defaultdict(set)
        for key, shape in self.shapes.items():
            for arc in shape.arcs:
                owners[arc].add(key)
        return owners

    def neighbours(self, key: str) -> set[str]:
        """Keys of the countries that share a border with `key`."""
        return set().union(*(self._owners[arc] for arc in self.shapes[key].arcs)) - {key}

    def draw(self, key: str, names: dict[str, str]) -> Image.Image:
        """The map of `key` with its neighbours, `SIZE` pixels large.

        Args:
            names: labels by key; a country that is not in it is drawn without a label.
        """
        centre, radius = _frame(self.shapes[key])
        sheet = _Sheet(centre, radius)
        near = self.neighbours(key)
        # Large ones first: an enclave lies on top of the country around it.
        for other, shape in sorted(self.shapes.items(), key=lambda item: -item[1].size):
            sheet.fill(shape, COUNTRY if other == key else NEIGHBOUR if other in near else LAND, thin=other == key)
        sheet.mark_if_tiny(self.shapes[key])
        for other in sorted(near | {key}, key=lambda k: k != key):
            if other in names:
                sheet.label(self.shapes[other], names[other], bold=other == key)
        return sheet.picture()


def project(ring: Ring, centre: tuple[float, float]) -> Flat:
    """Longitude and latitude to km east and north of `centre`; points near the antipode are left out.

    Source: J. P. Snyder, Map Projections: A Working Manual (1987), equations 24-2 to 24-4.
    """
    lon0, lat0 = np.radians(centre)
    lon, lat = np.radians(ring[:, 0]) - lon0, np.radians(ring[:, 1])
    cosine = np.sin(lat0) * np.sin(lat) + np.cos(lat0) * np.cos(lat) * np.cos(lon)
    keep = cosine > FAR
    lon, lat, cosine = lon[keep], lat[keep], cosine[keep]
    k = np.sqrt(2 / (1 + cosine)) * EARTH_KM
    return np.column_stack(
        [k * np.cos(lat) * np.sin(lon), k * (np.cos(lat0) * np.sin(lat) - np.sin(lat0) * np.cos(lat) * np.cos(lon))]
    )


def _area(flat: Flat) -> float:
    x, y = flat[:, 0], flat[:, 1]
    return abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))) / 2


def _middle(ring: Ring) -> tuple[float, float]:
    """The mean direction of a ring's points: right at the date line and at the poles too."""
    lon, lat = np.radians(ring).T
    x, y, z = (np.cos(lat) * np.cos(lon)).mean(), (np.cos(lat) * np.sin(lon)).mean(), np.sin(lat).mean()
    return float(np.degrees(np.arctan2(y, x))), float(np.degrees(np.arctan2(z, np.hypot(x, y))))


def _frame(shape: Shape) -> tuple[tuple[float, float], float]:
    """Centre (degrees) and half height (km) of the sheet: the main land and the larger islands near it."""
    flats = [project(r, _middle(shape.main)) for r in shape.rings]
    sizes = [_area(f) if len(f) else 0.0 for f in flats]
    reach = max(4 * np.sqrt(max(sizes)), 5 * MIN_RADIUS_KM)
    kept = [
        r
        for r, f, size in zip(shape.rings, flats, sizes, strict=True)
        if size > 0.02 * max(sizes) and np.hypot(*f.mean(axis=0)) < reach
    ]
    points = np.concatenate(kept)
    centre = _middle(points)
    flat = project(points, centre)
    low, high = flat.min(axis=0), flat.max(axis=0)
    half = (high - low) / 2
    radius = max(half[1], half[0] * SIZE[1] / SIZE[0], MIN_RADIUS_KM)
    return _inverse((low + high) / 2, centre), 1.35 * float(radius)


def _inverse(offset: NDArray[np.float64], centre: tuple[float, float]) -> tuple[float, float]:
    """The point that lies `offset` km east and north of `centre` (degrees); Snyder, equations 20-14 to 20-18, 24-16."""
    rho = float(np.hypot(*offset))
    if rho == 0:
        return centre
    lon0, lat0 = np.radians(centre)
    c = 2 * np.arcsin(min(1.0, rho / (2 * EARTH_KM)))
    lat = np.arcsin(np.cos(c) * np.sin(lat0) + offset[1] * np.sin(c) * np.cos(lat0) / rho)
    lon = lon0 + np.arctan2(
        offset[0] * np.sin(c), rho * np.cos(lat0) * np.cos(c) - offset[1] * np.sin(lat0) * np.sin(c)
    )
    return float(np.degrees(lon)), float(np.degrees(lat))


class _Sheet:
    """The paper: turns km into pixels and draws."""

    def __init__(self, centre: tuple[float, float], radius: float) -> None:
        self.centre = centre
        width, height = SIZE
        self.image = Image.new("RGB", (width * SCALE, height * SCALE), SEA)
        self.size = np.array(self.image.size)
        self.pixels_per_km = self.size[1] / 2 / radius
        self.pen = ImageDraw.Draw(self.image)
        self.taken: list[tuple[float, float, float, float]] = []

    def _pixels(self, ring: Ring) -> NDArray[np.float64]:
        return project(ring, self.centre) * (1, -1) * self.pixels_per_km + self.size / 2

    def fill(self, shape: Shape, colour: str, thin: bool) -> None:
        for ring in shape.rings:
            points = self._pixels(ring)
            if len(points) > 2 and (points.max(0) > 0).all() and (points.min(0) < self.size).all():
                corners = [tuple(p) for p in points.tolist()]
                self.pen.polygon(corners, fill=colour, outline=BORDER, width=1 if thin else SCALE)

    def mark_if_tiny(self, shape: Shape) -> None:
        """Dots the parts of a country that would be lost on its own map, and circles them if they are few."""
        parts = [p for p in map(self._pixels, shape.rings) if len(p) and ((p > 0) & (p < self.size)).all()]
        if sum(map(_area, parts)) < TINY * self.size.prod():
            for part in parts:
                self._circle(part.mean(axis=0), 2, fill=COUNTRY)
                if len(parts) <= FEW:
                    self._circle(part.mean(axis=0), 9, outline=COUNTRY, width=2 * SCALE)

    def _circle(self, middle: NDArray[np.float64], radius: float, **style: Any) -> None:
        x, y = middle
        r = radius * SCALE
        self.pen.ellipse((x - r, y - r, x + r, y + r), **style)

    def label(self, shape: Shape, name: str, bold: bool) -> None:
        """Writes `name` on the widest part that is on the sheet, unless another label is there already."""
        spot = self._spot(shape)
        if spot is None and not bold:
            return
        if spot is None:  # nothing but specks: above the largest one
            x, y = self._pixels(shape.main).mean(axis=0)
            spot = (float(x), float(y) - 20 * SCALE)
        font = ImageFont.truetype(_font_file(bold), (13 if bold else 9) * SCALE)
        width = self.pen.textlength(name, font=font)
        x = min(max(spot[0], width / 2 + 2 * SCALE), self.size[0] - width / 2 - 2 * SCALE)
        y = min(max(spot[1], 10 * SCALE), self.size[1] - 10 * SCALE)
        box = (x - width / 2, y - font.size / 2, x + width / 2, y + font.size / 2)
        if not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in self.taken):
            self.taken.append(box)
            ink = "black" if bold else LABEL
            self.pen.text((x, y), name, ink, font, anchor="mm", stroke_width=SCALE, stroke_fill="white")

    def _spot(self, shape: Shape) -> tuple[float, float] | None:
        """Where a label has room (pixels): the middle one of the widest rows of what is on the sheet."""
        mask = Image.new("1", self.image.size)
        pen = ImageDraw.Draw(mask)
        for ring in shape.rings:
            if len(points := self._pixels(ring)) > 2:
                pen.polygon([tuple(p) for p in points.tolist()], fill=1)
        step = 2 * SCALE
        runs = []  # (length, middle, row), in steps
        for row, line in enumerate(np.asarray(mask)[::step, ::step]):
            edges = np.flatnonzero(np.diff(np.concatenate([[0], line.astype(np.int8), [0]])))
            runs += [(end - start, (start + end) / 2, row) for start, end in edges.reshape(-1, 2)]
        widest = max((length for length, _, _ in runs), default=0)
        if widest < 3:
            return None
        wide = [run for run in runs if run[0] >= 0.75 * widest]
        _, middle, row = wide[len(wide) // 2]
        return middle * step, row * step

    def picture(self) -> Image.Image:
        """The finished sheet, in the colours of `PALETTE`."""
        palette = Image.new("P", (1, 1))
        palette.putpalette([channel for colour in PALETTE for channel in colour])
        small = self.image.resize(SIZE, Image.Resampling.LANCZOS)
        return small.quantize(palette=palette, dither=Image.Dither.NONE)


def _font_file(bold: bool) -> str:
    return font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal"))
