"""The built-in picture collection: captioned, freely licensed pictures of real things.

`index.jsonl` holds one object a picture; the encoded files lie beside it in `flags/`, `maps/` and `photos/`. Every
country of `countries()` has both a flag and a map. NOTICE names the source and licence of every file; `build.py` says
how they were made.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
KINDS = ("flag", "map", "photo")


@dataclass(frozen=True)
class Picture:
    """One picture of the collection.

    Attributes:
        file: path within this folder, such as `flags/kenya.png`.
        title: short and unique: "Flag of Kenya", "Map of Kenya", "Giraffe".
        subject: what it shows, as it reads within a sentence: "Kenya", "giraffe", "Eiffel Tower".
        caption: one or two sentences that say what is seen.
        source: the package that carries it, its version, and the file or page it comes from.
        licence: SPDX identifier, or "Public domain".
        author: who made it.
        kind: one of `KINDS`.
    """

    file: str
    title: str
    subject: str
    caption: str
    source: str
    licence: str
    author: str
    kind: str


@cache
def load() -> tuple[Picture, ...]:
    """All pictures, in the order of the index.

    Raises:
        ValueError: a line of the index is not a picture; the message says which.
    """
    lines = (FOLDER / "index.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(_parse(number, line) for number, line in enumerate(lines, 1))


def _parse(number: int, line: str) -> Picture:
    try:
        return Picture(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise ValueError(f"corpus/pictures/index.jsonl, line {number}: not a picture ({error})") from error


def read(picture: Picture) -> bytes:
    """The encoded picture (PNG, JPEG or WebP)."""
    return (FOLDER / picture.file).read_bytes()


@cache
def countries() -> tuple[str, ...]:
    """Common English names of the countries that have both a flag and a map, such as "Kenya" and "South Korea"."""
    mapped = set(_subjects("map"))
    return tuple(name for name in _subjects("flag") if name in mapped)


@cache
def subjects() -> tuple[str, ...]:
    """What the photographs show, as it reads within a sentence: "giraffe", "cup of tea", "Eiffel Tower"."""
    return _subjects("photo")


def _subjects(kind: str) -> tuple[str, ...]:
    return tuple(p.subject for p in load() if p.kind == kind)
