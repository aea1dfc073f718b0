"""National flags out of the npm package `flag-icons`, drawn small, and named by the colours that are seen in them."""

from __future__ import annotations

import io
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from corpus.pictures import Picture
from corpus.pictures.build.tables import countries, listed, slug

PACKAGE = "flag-icons"
SIZE = (240, 180)
SEEN = 0.02  # share of the picture from which on a colour is named

#: Samples of each colour that flags have; a pixel has the name of the nearest sample.
SAMPLES: dict[tuple[int, int, int], str] = {
    (206, 17, 38): "red",
    (235, 0, 30): "red",
    (170, 20, 45): "red",
    (130, 20, 50): "maroon",
    (255, 125, 0): "orange",
    (255, 153, 51): "orange",
    (255, 215, 0): "yellow",
    (255, 240, 60): "yellow",
    (225, 185, 60): "yellow",
    (0, 122, 61): "green",
    (0, 160, 80): "green",
    (0, 85, 45): "green",
    (80, 180, 60): "green",
    (116, 172, 223): "light blue",
    (0, 160, 225): "light blue",
    (0, 40, 140): "blue",
    (0, 85, 185): "blue",
    (0, 45, 100): "blue",
    (255, 255, 255): "white",
    (215, 215, 215): "white",
    (0, 0, 0): "black",
    (40, 40, 40): "black",
}


def make(packages: Path) -> Iterator[tuple[Picture, bytes]]:
    """All flags, with their encoded pictures."""
    for country in countries():
        image = _draw(packages / PACKAGE / "package/flags/4x3" / f"{country.code}.svg")
        adjective = country.adjectives.replace(", ", " or ")
        yield (
            Picture(
                file=f"flags/{slug(country.name)}.png",
                title=f"Flag of {country.phrase}",
                subject=country.name,
                caption=(
                    f"The national flag of {country.phrase}, the {adjective} flag, in {listed(colours(image))}. "
                    f"The country lies in {country.continent}; its capital is {country.capital}." + country.names
                ),
                source=f"flag-icons 7.5.0 (npm), flags/4x3/{country.code}.svg",
                licence="MIT",
                author="Panayiotis Lipiridis and contributors",
                kind="flag",
            ),
            encode(image.quantize(64, dither=Image.Dither.NONE)),
        )


def _draw(svg: Path) -> Image.Image:
    """The flag with a thin grey edge, so that white ones show on a white page."""
    width, height = SIZE
    command = ["rsvg-convert", "-w", str(width), "-h", str(height), "-b", "white", str(svg)]
    image = Image.open(io.BytesIO(subprocess.run(command, check=True, capture_output=True).stdout)).convert("RGB")
    return ImageOps.expand(ImageOps.crop(image, 1), 1, "#999999")


def colours(image: Image.Image) -> list[str]:
    """Names of the colours of a flag, the one that covers most first."""
    pixels = np.asarray(ImageOps.crop(image, 1)).reshape(-1, 3).astype(float)
    distance = ((pixels[:, None, :] - np.array(list(SAMPLES), dtype=float)) ** 2).sum(-1)
    names = list(SAMPLES.values())
    count = Counter(names[i] for i in distance.argmin(1))
    return [name for name, n in count.most_common() if n >= SEEN * len(pixels)]


def encode(image: Image.Image) -> bytes:
    """A small PNG of a picture with a palette."""
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()
