"""Encoded pictures that are dangerous, broken, or not what they claim; all small."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

from PIL import Image, PngImagePlugin


def picture(kind: str = "PNG", size: tuple[int, int] = (64, 48), **options: Any) -> bytes:
    """An honest one: a ramp from black to red."""
    image = Image.linear_gradient("L").resize(size)
    buffer = io.BytesIO()
    Image.merge("RGB", (image, image.point(lambda _: 0), image.point(lambda _: 0))).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG with a header that says so, and these chunks."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IEND", b"")


def zeros(megabytes: int) -> bytes:
    """A zlib stream of that many megabytes of zeros, about a thousandth of it."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(megabytes)) + packer.flush()


def after_ihdr(data: bytes, *chunks: bytes) -> bytes:
    return data[:33] + b"".join(chunks) + data[33:]


def png_bomb() -> bytes:
    return png(30_000, 30_000, chunk(b"IDAT", zeros(64)))


def png_bomb_of_bits() -> bytes:
    return png(60_000, 60_000, chunk(b"IDAT", zeros(64)), depth=1, colour=0)


def png_with_text_bomb() -> bytes:
    return after_ihdr(picture(), *[chunk(b"zTXt", b"Comment\0\0" + zeros(80))] * 4)


def png_with_profile_bomb() -> bytes:
    return after_ihdr(picture(), chunk(b"iCCP", b"icc\0\0" + zeros(80)))


def png_of_endless_chunks() -> bytes:
    return after_ihdr(picture(), *[chunk(b"teXt", b"a\0b")] * 40_000)


def gif_screen(side: int = 65_535) -> bytes:
    """A small first frame on a giant screen."""
    data = bytearray(picture("GIF"))
    data[6:10] = struct.pack("<HH", side, side)
    return bytes(data)


def gif_of_many_frames(frames: int = 20_000) -> bytes:
    """One frame a few bytes long, over and over, each on a screen of 2000 x 2000."""
    head = b"GIF89a" + struct.pack("<HHBBB", 2000, 2000, 0x80, 0, 0) + bytes(6)
    frame = b"\x21\xf9\x04\x08\0\0\0\0" + b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return head + frame * frames + b"\x3b"


def apng_bomb() -> bytes:
    many = [Image.new("RGB", (400, 400), (i, 0, 0)) for i in range(60)]
    buffer = io.BytesIO()
    many[0].save(buffer, "PNG", save_all=True, append_images=many[1:])
    return buffer.getvalue()


def webp_giant() -> bytes:
    """An extended WebP whose canvas is said to be 16384 x 16384."""
    inner = picture("WEBP", lossless=True)[12:]
    side = struct.pack("<I", 16_383)[:3]
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + bytes(4) + side + side + inner
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg_of_many_scans(scans: int = 4000) -> bytes:
    """A progressive JPEG of 6000 x 6000 that refines the same coefficients over and over, 30 bytes a time."""
    data = picture("JPEG", (6000, 6000), progressive=True, quality=5)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last : last + 40] * scans + data[-2:]


def png_and_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("payload.html", "<script>alert(1)</script>")
    return picture() + buffer.getvalue()


def gif_and_script() -> bytes:
    return picture("GIF") + b"/*<script>alert(1)</script>*/"


def jpeg_and_script() -> bytes:
    return picture("JPEG", comment=b"<?php system('<script>') ?>")


def png_and_script() -> bytes:
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Comment", "<script>alert(1)</script>")
    notes.add_itxt("XML:com.adobe.xmp", "<x:xmpmeta><script></x:xmpmeta>")
    return picture(pnginfo=notes)


def located_photo(kind: str = "JPEG", orientation: int = 6) -> bytes:
    """With the place and camera it was taken with, a profile, a comment, and turned by its EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "SecretCam"
    exif[0x8825] = {1: "N", 2: (52.0, 31.0, 12.0), 3: "E", 4: (13.0, 24.0, 18.0)}
    return picture(kind, exif=exif.tobytes(), icc_profile=b"SecretProfile" * 20)


def broken_exif() -> bytes:
    exif = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12\0\x03\xff\xff\xff\xff\xff\xff\xff\xff" * 200
    return picture("JPEG", exif=exif)


def half(make: Callable[[], bytes]) -> bytes:
    data = make()
    return data[: len(data) // 2]


SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
HTML = b"<!doctype html><html><body><script>alert(1)</script><img src=x></body></html>" * 20
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n%%EOF\n"
