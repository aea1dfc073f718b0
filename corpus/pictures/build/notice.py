"""Writes NOTICE: every shipped picture with its author, source and licence, grouped by licence."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from corpus.pictures import FOLDER, Picture

HEAD = """llmi
Licensed under the Apache License, Version 2.0.

This product ships the following pictures in corpus/pictures. They are not covered by the licence of the code: each is
under its own, named below. All were reduced in size and encoded anew; planets were set on white.

Flags: drawn from the SVG files of flag-icons (MIT). Maps: drawn for this collection from Natural Earth's borders
(public domain), which the npm package world-atlas carries (ISC). Photographs: taken from the packages named.

Texts of the licences:
"""

TEXTS = {
    "CC0-1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "CC-BY-2.0": "https://creativecommons.org/licenses/by/2.0/",
    "CC-BY-3.0": "https://creativecommons.org/licenses/by/3.0/",
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/",
    "CC-BY-SA-4.0": "https://creativecommons.org/licenses/by-sa/4.0/",
    "MIT": "at the end of this file",
    "Public domain": "https://creativecommons.org/publicdomain/mark/1.0/",
}

MIT = """The MIT License, of flag-icons

Copyright (c) 2013 Panayiotis Lipiridis

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def text(pictures: Iterable[Picture]) -> str:
    """The whole of NOTICE.

    Raises:
        KeyError: a picture has a licence that is not in `TEXTS`: add it only if it is a free one.
    """
    parts = [HEAD + "".join(f"  {name}: {where}\n" for name, where in TEXTS.items())]
    ordered = sorted(pictures, key=lambda p: (p.licence, p.kind, p.file))
    for (licence, kind), group in groupby(ordered, key=lambda p: (p.licence, p.kind)):
        TEXTS[licence]
        lines = (f"  {p.file}: {p.title}, by {p.author}; {p.source}\n" for p in group)
        parts.append(f"{licence} ({kind}s)\n" + "".join(lines))
    return "\n".join([*parts, MIT])


def write(pictures: Iterable[Picture]) -> None:
    (FOLDER.parents[1] / "NOTICE").write_text(text(pictures), encoding="utf-8")
