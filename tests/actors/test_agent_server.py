"""What the gateway takes for a user's picture."""

from __future__ import annotations

import io
import time

import pytest
from PIL import Image

from actors.agent_server import read_picture
from tests.security import bad_pictures as bad

BAD = [
    bad.png_bomb(),
    bad.png_bomb_of_bits(),
    bad.webp_giant(),
    bad.gif_screen(),
    bad.jpeg_of_many_scans(),
    bad.half(bad.picture),
    bad.SVG,
    bad.HTML,
    bad.EPS,
    b"",
]


@pytest.mark.parametrize("data", BAD, ids=range(len(BAD)))
def test_bombs_and_lies_are_refused_at_once(data: bytes) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"it (is|has|asks)"):
        read_picture(data)
    assert time.monotonic() - started < 5


def test_only_the_pixels_of_a_users_picture_are_kept() -> None:
    for data in (bad.located_photo(), bad.png_and_script(), bad.jpeg_and_script(), bad.png_and_zip()):
        kept = read_picture(data)
        assert not any(word in kept.data for word in (b"SecretCam", b"script", b"payload"))
        assert Image.open(io.BytesIO(kept.data)).size[0] > 16
