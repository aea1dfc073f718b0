"""Pictures from the internet, taken with care.

What comes back is never what was sent: every picture is decoded, at most at a set number of pixels, and encoded anew
as PNG, JPEG or WebP, upright. So nothing but pixels is passed on: no EXIF, GPS, XMP, colour profile or comment, no
second file hidden behind the first, no frame of an animation but its first one.
"""

from __future__ import annotations

import io
import logging
import threading

from PIL import Image, ImageOps

from replay.record import Blob
from tools.fetch import Fetcher, Refused, Unreachable

MAX_PIXELS = 40_000_000  # that are decoded; a 24-megapixel camera's are
MAX_WORK = 25 * MAX_PIXELS  # pixels times passes: a progressive JPEG may ask for thousands over the same pixels
LONGEST_SIDE = 2048  # pixels of what comes back: a document shows no more
AT_ONCE, ROOM_S = (
    2,
    10.0,
)  # pictures that are decoded at once, as one may take half a gigabyte; and how long others wait
SHORTEST_SIDE = 16  # a smaller one counts visitors, and shows nothing

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")  # decoders that start no program and fetch nothing
_UNSAID = ("", "application/octet-stream", "binary/octet-stream", "image/*")
_ALIASES = {"image/jpg": "image/jpeg", "image/pjpeg": "image/jpeg", "image/x-png": "image/png"}
_TRIED_AGAIN = (408, 425, 429, 500, 502, 503, 504)

logging.getLogger("PIL").setLevel(logging.WARNING)  # it tells each chunk of a hostile file at the debug level


class Downloader:
    """Downloads pictures; thread-safe.

    Args:
        fetcher: gets the bytes; by default from the public internet only.
    """

    def __init__(self, fetcher: Fetcher | None = None) -> None:
        self._fetcher = fetcher or Fetcher()

    def picture(self, url: str, timeout_s: float | None = None) -> Blob:
        """The picture at `url`, cleaned.

        Args:
            timeout_s: less time than the fetcher's own.

        Raises:
            Refused: it is not acceptable, or not a picture, or not the kind of picture that it is said to be.
            Unreachable: the network or the server failed, or other pictures take all room.
        """
        reply = self._fetcher.get(url, {"Accept": "image/webp,image/png,image/jpeg,image/gif"}, timeout_s)
        if reply.status in _TRIED_AGAIN:
            raise Unreachable(f"the server answered {reply.status}")
        if reply.status != 200:
            raise Refused(f"the server answered {reply.status}")
        said = reply.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        said = _ALIASES.get(said, said)
        with _opened(reply.body) as image:
            if said not in _UNSAID and said != Image.MIME[image.format or ""]:
                raise Refused(f"it is said to be {said[:40]!r} and is {Image.MIME[image.format or '']!r}")
            if min(image.size) < SHORTEST_SIDE:
                raise Refused(f"it has only {image.size[0]} x {image.size[1]} pixels")
            return _encoded(image)


def clean(data: bytes) -> Blob:
    """A picture of which only the pixels are kept, at most `LONGEST_SIDE` a side.

    Raises:
        Refused: it is not a whole PNG, JPEG, WebP or GIF picture, or is too large.
        Unreachable: other pictures take all room.
    """
    with _opened(data) as image:
        return _encoded(image)


def _opened(data: bytes) -> Image.Image:
    """A picture whose header is read and is acceptable, and nothing else is."""
    too_large = Refused(f"it has more than {MAX_PIXELS} pixels")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:  # (Pillow's own limit, which lies above ours)
        raise too_large from error
    except Exception as error:  # decoders of hostile data raise nearly anything
        raise Refused("it is not a PNG, JPEG, WebP or GIF picture") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise too_large
    if image.format == "JPEG" and data.count(b"\xff\xda") * width * height > MAX_WORK:
        raise Refused("it asks for too many passes over its pixels")
    return image


_room = threading.BoundedSemaphore(AT_ONCE)


def _encoded(image: Image.Image) -> Blob:
    if not _room.acquire(timeout=ROOM_S):
        raise Unreachable("too many pictures are being decoded")
    try:
        return _pixels(image)
    finally:
        _room.release()


def _pixels(image: Image.Image) -> Blob:
    kind = image.format if image.format in ("JPEG", "WEBP") else "PNG"
    try:
        image.draft("RGB", (LONGEST_SIDE, LONGEST_SIDE))  # a large JPEG is decoded at a half or a quarter
        image.load()
        if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip to white
            image = image.convert("I").point(lambda value: value / 256).convert("L")
        alpha = image.has_transparency_data and kind != "JPEG"
        pixels = ImageOps.exif_transpose(image).convert("RGBA" if alpha else "RGB")
    except Exception as error:
        raise Refused("it is broken or incomplete") from error
    pixels.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    pixels.info = {}
    buffer = io.BytesIO()
    pixels.save(buffer, kind, **({} if kind == "PNG" else {"quality": 90}))
    return Blob(buffer.getvalue(), Image.MIME[kind])
