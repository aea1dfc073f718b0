"""Reading encoded pictures that others made, and writing our own: PNG without metadata."""

from __future__ import annotations

import io
import warnings

from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # decoders in Pillow itself: none that starts a program
MAX_PIXELS = 25_000_000  # of a picture that comes in, and of one that a tool makes
MAX_WORK = 25 * MAX_PIXELS  # pixels times passes: a progressive JPEG may ask for thousands over the same pixels


class Unreadable(ValueError):
    """The bytes are no whole picture of a known format, or too large a one; the message says which."""


def decode(data: bytes) -> Image.Image:
    """The whole picture as RGB, or as RGBA if anything in it is transparent; the first one of an animation.

    Raises:
        Unreadable: it is broken, truncated, of another format, or has more than `MAX_PIXELS` pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # a limit of our own follows
            opened = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = opened.size
        if width * height > MAX_PIXELS:
            raise Unreadable(f"has {width} x {height} pixels: at most {MAX_PIXELS} are read")
        if opened.format == "JPEG" and data.count(b"\xff\xda") * width * height > MAX_WORK:
            raise Unreadable("asks for too many passes over its pixels")
        image = ImageOps.exif_transpose(opened)
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    except Unreadable:
        raise
    except Exception as error:  # decoders of broken data raise nearly anything
        raise Unreadable(f"cannot be read: {error}") from error


def encode(image: Image.Image) -> bytes:
    """PNG without colour profiles, comments and dates of the original."""
    image.info = {}
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
