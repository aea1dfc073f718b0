"""Photographs (and a few paintings) out of packages that carry them, as `photos.tsv` lists and describes them.

Licences and authors were read in the packages themselves: in the README beside each folder of GCompris' pictures, in
the docstrings of `skimage.data`, and in `sklearn/datasets/images/README.txt`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from PIL import Image

from corpus.pictures import Picture
from corpus.pictures.build import qrc
from corpus.pictures.build.tables import rows, slug

LARGEST = (320, 320)
QUALITY = 70  # of WebP: about 10 kB a picture

VERSIONS = {
    "gcompris-qt-data": "gcompris-qt-data 3.1-2 (Debian)",
    "scikit-image": "scikit-image 0.26.0 (PyPI)",
    "scikit-learn": "scikit-learn 1.9.1 (PyPI)",
}


def make(packages: Path) -> Iterator[tuple[Picture, bytes]]:
    """All photographs, with their encoded pictures."""
    for row in rows("photos.tsv"):
        subject = row["subject"]
        source = f"{VERSIONS[row['package']]}, {row['path']}"
        yield (
            Picture(
                file=f"photos/{slug(subject)}.webp",
                title=subject[0].upper() + subject[1:],
                subject=subject,
                caption=row["caption"],
                source=f"{source}; {row['page']}" if row["page"] else source,
                licence=row["licence"],
                author=row["author"],
                kind="photo",
            ),
            _encode(_original(packages / row["package"], row["package"], row["path"])),
        )


def _original(folder: Path, package: str, path: str) -> bytes:
    if package == "gcompris-qt-data":
        activity = path.split("/")[0]
        return _resource(folder / f"usr/share/gcompris-qt/rcc/{activity}.rcc")[f"gcompris/src/activities/{path}"]
    inside = {"scikit-image": "skimage/data", "scikit-learn": "sklearn/datasets/images"}[package]
    return (folder / inside / path).read_bytes()


@cache
def _resource(path: Path) -> dict[str, bytes]:
    return qrc.read(path)


def _encode(data: bytes) -> bytes:
    """A small WebP; what was transparent is white."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    paper = Image.new("RGBA", image.size, "white")
    paper.alpha_composite(image)
    paper.thumbnail(LARGEST, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    paper.convert("RGB").save(out, "WEBP", quality=QUALITY, method=6)
    return out.getvalue()
