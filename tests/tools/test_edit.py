import io
import json
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from replay.record import Blob
from tools.base import CallFailed, load
from tools.edit import EditTool
from tools.edit_grammar import MAX_INSTRUCTION, MAX_OPERATIONS, understand
from tools.edit_ops import MAX_PIXELS, OPERATIONS


def blob(image: Image.Image, form: str = "PNG") -> Blob:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return Blob(buffer.getvalue(), f"image/{form.lower()}")


def edit(image: Image.Image, prompt: str) -> Image.Image:
    result = EditTool().run({"img_index": 0, "prompt": prompt}, [blob(image)])
    assert len(result.images) == 1 and result.images[0].mime == "image/png"
    return Image.open(io.BytesIO(result.images[0].data))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=float)


def spread(image: Image.Image) -> float:
    """How far the channels are apart: 0 for grey."""
    return float(np.ptp(pixels(image), axis=2).mean())


def detail(image: Image.Image) -> float:
    """Mean squared difference between neighbours."""
    return float((np.diff(pixels(image), axis=1) ** 2).mean())


def operations(prompt: str) -> list[tuple]:
    return [(o.name, *o.arguments.values()) for o in understand(prompt)]


@pytest.fixture
def photo() -> Image.Image:
    """120 x 80: left half reddish, right half bluish, a gradient from top to bottom, a sharp white disc at top left."""
    y = np.linspace(40, 200, 80, dtype=np.uint8)[:, None].repeat(120, 1)
    rgb = np.stack([y, y // 2, y // 3], axis=2)
    rgb[:, 60:] = rgb[:, 60:, ::-1]
    image = Image.fromarray(rgb)
    ImageDraw.Draw(image).ellipse((10, 10, 30, 30), fill="white")
    return image


@pytest.mark.parametrize(
    "prompt",
    ["make it black and white", "greyscale", "convert to grayscale", "make the image grey", "B&W", "monochrome"],
)
def test_black_and_white_leaves_no_colour(photo, prompt):
    assert spread(edit(photo, prompt)) == 0


def test_sepia_is_brown(photo):
    r, g, b = pixels(edit(photo, "give it a sepia look")).mean(axis=(0, 1))
    assert r > g > b


def test_inverting_twice_gives_the_picture_back(photo):
    inverted = edit(photo, "invert the colours")
    assert np.array_equal(pixels(inverted), 255 - pixels(photo))
    assert np.array_equal(pixels(edit(inverted, "make a negative")), pixels(photo))


@pytest.mark.parametrize(
    ("less", "more"), [("slightly brighter", "brighter"), ("brighter by 20%", "70 percent brighter")]
)
def test_brighter_is_brighter_and_more_so_with_a_larger_amount(photo, less, more):
    assert pixels(photo).mean() < pixels(edit(photo, less)).mean() < pixels(edit(photo, more)).mean()


def test_darker_by_half_halves_the_light(photo):
    assert pixels(edit(photo, "make it 50% darker")).mean() == pytest.approx(pixels(photo).mean() / 2, rel=0.05)


def test_contrast_goes_up_and_down(photo):
    def contrast(image):
        return pixels(image).std()

    assert contrast(edit(photo, "less contrast")) < contrast(photo) < contrast(edit(photo, "increase the contrast"))


def test_saturation_goes_up_and_down(photo):
    more, less = edit(photo, "make it more colourful"), edit(photo, "a bit less saturated")
    assert spread(less) < spread(photo) < spread(more)


def test_blur_takes_detail_away_and_sharpen_adds_it(photo):
    assert detail(edit(photo, "blur it")) < detail(photo) < detail(edit(photo, "sharpen it strongly"))
    assert detail(edit(photo, "blur it with 10 pixels")) < detail(edit(photo, "blur it with 1 pixel"))


@pytest.mark.parametrize(
    ("prompt", "transpose"),
    [
        ("rotate it left", Image.Transpose.ROTATE_90),
        ("rotate 90 degrees counter-clockwise", Image.Transpose.ROTATE_90),
        ("turn it to the right", Image.Transpose.ROTATE_270),
        ("rotate by 90°", Image.Transpose.ROTATE_270),
        ("rotate it 270 degrees anticlockwise", Image.Transpose.ROTATE_270),
        ("turn the picture upside down", Image.Transpose.ROTATE_180),
        ("rotate by 180 degrees", Image.Transpose.ROTATE_180),
        ("mirror it", Image.Transpose.FLIP_LEFT_RIGHT),
        ("flip the image horizontally", Image.Transpose.FLIP_LEFT_RIGHT),
        ("flip it vertically", Image.Transpose.FLIP_TOP_BOTTOM),
        ("flip it upside down", Image.Transpose.FLIP_TOP_BOTTOM),
        ("flip horizontally and vertically", Image.Transpose.ROTATE_180),
    ],
)
def test_rotations_and_flips_are_exact(photo, prompt, transpose):
    assert np.array_equal(pixels(edit(photo, prompt)), pixels(photo.transpose(transpose)))


def test_an_oblique_rotation_shows_the_whole_picture_on_white(photo):
    turned = edit(photo, "rotate it by 30 degrees")
    assert turned.width > photo.width and turned.height > photo.height
    assert turned.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("prompt", "box"),
    [
        ("crop to a square", (20, 0, 100, 80)),
        ("crop it to the left half", (0, 0, 60, 80)),
        ("keep only the bottom half", (0, 40, 120, 80)),
        ("crop to the top right quarter", (60, 0, 120, 40)),
        ("cut off the left third", (40, 0, 120, 80)),
        ("crop to the centre", (30, 20, 90, 60)),
        ("crop 10% off each side", (12, 8, 108, 72)),
        ("crop 25% off the top", (0, 20, 120, 80)),
        ("crop to 40x20", (40, 30, 80, 50)),
        ("crop to 2:1", (0, 10, 120, 70)),
    ],
)
def test_crops_keep_the_part_that_they_name(photo, prompt, box):
    assert np.array_equal(pixels(edit(photo, prompt)), pixels(photo.crop(box)))


@pytest.mark.parametrize(
    ("prompt", "size"),
    [
        ("resize to 50x30", (50, 30)),
        ("resize it to 60 pixels wide", (60, 40)),
        ("make it smaller", (60, 40)),
        ("make it 25% smaller", (90, 60)),
        ("scale it to 50%", (60, 40)),
        ("make it larger", (240, 160)),
        ("twice as large", (240, 160)),
        ("enlarge it 3 times", (360, 240)),
        ("make a thumbnail of 30 pixels", (30, 20)),
        ("make a thumbnail", (120, 80)),
    ],
)
def test_resizing_gives_the_size_that_was_asked_for(photo, prompt, size):
    assert edit(photo, prompt).size == size


def test_a_border_surrounds_the_picture_in_its_colour(photo):
    framed = edit(photo, "add a 5 px red border")
    assert framed.size == (130, 90) and framed.convert("RGB").getpixel((2, 45)) == (255, 0, 0)
    assert np.array_equal(pixels(framed)[5:-5, 5:-5], pixels(photo))
    assert edit(photo, "put it in a thick gold frame").convert("RGB").getpixel((0, 0)) == (255, 215, 0)
    assert edit(photo, "thick border").width > edit(photo, "border").width > edit(photo, "thin border").width


@pytest.mark.parametrize(
    ("prompt", "channel"),
    [("tint it blue", 2), ("make it red", 0), ("add a green tint", 1), ("turn the photo #0000ff", 2)],
)
def test_a_tint_makes_its_colour_the_strongest(photo, prompt, channel):
    assert pixels(edit(photo, prompt)).mean(axis=(0, 1)).argmax() == channel


def test_posterizing_leaves_few_tones_and_pixelating_makes_blocks(photo):
    assert len(np.unique(pixels(edit(photo, "posterize it")))) <= 4 < len(np.unique(pixels(photo)))
    blocks = pixels(edit(photo, "pixelate with 20 px blocks"))
    assert (blocks[:20, :20] == blocks[0, 0]).all() and blocks.shape == (80, 120, 3)


def test_edges_and_sketches_are_dark_lines_on_white(photo):
    for prompt in ("show only the edges", "turn it into a pencil sketch"):
        drawn = pixels(edit(photo, prompt))
        assert drawn.mean() > 180 and drawn.min() < 100, prompt
        assert spread(edit(photo, prompt)) == 0


def test_a_caption_is_written_at_the_bottom_or_at_the_top(photo):
    def changed_rows(prompt):
        return np.flatnonzero(np.any(pixels(edit(photo, prompt)) != pixels(photo), axis=(1, 2)))

    assert changed_rows("add the caption 'Hello'").min() > 40
    assert changed_rows("write 'Hello' at the top").max() < 40
    assert operations("write 'Hi' in red")[0] == ("caption", "Hi", "bottom", (255, 0, 0))


def test_captions_in_any_language_and_of_any_length_are_drawn(photo):
    for text in ("Grüße", "日本語", "Привет, мир", "مرحبا", "😀", "long " * 100, "unbroken" * 30):
        assert edit(photo, f'add the caption "{text}"').size == photo.size


def test_rounded_corners_are_transparent(photo):
    rounded = edit(photo, "round the corners")
    assert rounded.mode == "RGBA"
    alpha = np.asarray(rounded)[..., 3]
    assert alpha[0, 0] == 0 and alpha[40, 60] == 255


def test_operations_are_done_in_order_of_appearance(photo):
    assert operations("make it grey, crop to a square and rotate it left, then add a thin blue border") == [
        ("greyscale",),
        ("crop_ratio", 1.0),
        ("rotate", 270.0),
        ("border", (0, 0, 255), 0.015),
    ]
    grey_frame = edit(photo, "add a red border, then make it grey")
    red_frame = edit(photo, "make it grey, then add a red border")
    assert spread(grey_frame) == 0 and red_frame.convert("RGB").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("add the caption 'blur and rotate'", [("caption", "blur and rotate", "bottom")]),
        ('write "It\'s 50% off"', [("caption", "It's 50% off", "bottom")]),
        ("caption: Winter in Riga", [("caption", "Winter in Riga", "bottom")]),
        ("do not blur it, just sharpen it", [("sharpen", 0.4)]),
        ("brighter, but without a border", [("brightness", 1.4)]),
        ("a grey border", [("border", (128, 128, 128))]),
        ("a dark green frame", [("border", (0, 100, 0))]),
        ("increase brightness and contrast by 20%", [("brightness", 1.2), ("contrast", 1.2)]),
        ("reduce brightness by 10% and contrast by 20%", [("brightness", 0.9), ("contrast", 0.8)]),
        ("less dark", [("brightness", 1.4)]),
        ("turn the contrast down a bit", [("contrast", 0.85)]),
        ("desaturate it slightly", [("saturation", 0.85)]),
        ("colorize it with light blue", [("tint", (173, 216, 230))]),
        ("a border in light red", [("border", (255, 127, 127))]),
        ("a red border with the caption 'X'", [("border", (255, 0, 0)), ("caption", "X", "bottom")]),
    ],
)
def test_instructions_are_read_as_people_mean_them(prompt, expected):
    assert operations(prompt) == expected


@pytest.mark.parametrize(
    "prompt", ["", "add a dragon", "make the sky blue", "nice!", "don't blur it", "make it black", "\x00"]
)
def test_an_instruction_without_a_known_edit_fails_and_says_what_can_be_done(photo, prompt):
    with pytest.raises(CallFailed, match="it can do black and white, sepia"):
        edit(photo, prompt)


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("resize it", "to what size"),
        ("resize to 99999x99999", "at most"),
        ("make it 999999 times larger", "cannot be resized"),
        ("make it 500 times larger", "at most"),
        ("add a 99999 px border", None),
        ("blur with 999999 pixels", None),
        ("blur it " * 300, "at most"),
        ("make it darker, then " * (MAX_OPERATIONS + 1), "at most"),
    ],
)
def test_extreme_instructions_fail_or_are_bounded(photo, prompt, reason):
    if reason is None:
        assert edit(photo, prompt).width <= 3 * photo.width
    else:
        with pytest.raises(CallFailed, match=reason):
            edit(photo, prompt)


def test_a_missing_picture_fails():
    with pytest.raises(CallFailed, match="no picture to edit"):
        EditTool().run({"img_index": 0, "prompt": "blur"}, [])


def bomb(width: int, height: int) -> bytes:
    """A valid PNG of one colour, tiny as a file."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack("!I", len(data)) + kind + data + struct.pack("!I", zlib.crc32(kind + data))

    header = struct.pack("!IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_pictures_that_cannot_be_read_fail(photo):
    whole = blob(photo).data
    broken = [
        b"",
        b"rubbish",
        whole[:50],
        whole[: len(whole) // 2],
        whole[:40] + b"\xff" * 200,
        b"%!PS-Adobe-3.0\nshowpage",
    ]
    for data in [*broken, blob(photo, "TIFF").data, b"<svg xmlns='http://www.w3.org/2000/svg'/>"]:
        with pytest.raises(CallFailed, match="cannot be read"):
            EditTool().run({"img_index": 0, "prompt": "blur"}, [Blob(data)])


def test_a_jpeg_that_asks_for_thousands_of_passes_fails_before_it_is_decoded():
    buffer = io.BytesIO()
    Image.new("RGB", (4000, 4000)).save(buffer, "JPEG", progressive=True)
    data, last = buffer.getvalue(), buffer.getvalue().rindex(b"\xff\xda")
    with pytest.raises(CallFailed, match="passes"):
        EditTool().run(
            {"img_index": 0, "prompt": "blur"}, [Blob(data[:-2] + data[last : last + 40] * 1000 + data[-2:])]
        )


@pytest.mark.parametrize("size", [(5001, 5000), (10000, 10000), (100000, 100000)])
def test_too_large_pictures_fail_before_they_are_decoded(size):
    assert size[0] * size[1] > MAX_PIXELS
    with pytest.raises(CallFailed, match=r"pixels"):
        EditTool().run({"img_index": 0, "prompt": "blur"}, [Blob(bomb(*size))])


def test_the_same_call_gives_the_same_bytes_without_metadata(photo):
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", comment=b"secret", exif=b"Exif\x00\x00secret", icc_profile=b"secret")
    source = Blob(buffer.getvalue(), "image/jpeg")
    first, second = (EditTool().run({"img_index": 0, "prompt": "flip it"}, [source]) for _ in range(2))
    assert first.images == second.images
    assert b"secret" not in first.images[0].data


def test_provenance_names_the_operations_and_the_original(photo):
    result = EditTool().run({"img_index": 0, "prompt": "grey, then a red border"}, [blob(photo)])
    assert json.loads(json.dumps(result.provenance)) == {
        "maker": "pillow",
        "operations": [{"name": "greyscale"}, {"name": "border", "colour": [255, 0, 0]}],
        "of": [blob(photo).sha256],
    }


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_pictures_of_every_mode_are_edited(photo, mode):
    image = Image.new("I;16", (20, 20), 9000) if mode == "I;16" else photo.convert(mode)
    form = "JPEG" if mode == "CMYK" else "PNG"
    result = EditTool().run({"img_index": 0, "prompt": "grey and rotate it left"}, [blob(image, form)])
    assert Image.open(io.BytesIO(result.images[0].data)).size == (image.height, image.width)


def test_transparency_survives_edits_of_colour(photo):
    photo.putalpha(Image.linear_gradient("L").resize(photo.size))
    edited = edit(photo, "sepia, darker and more contrast")
    assert np.array_equal(np.asarray(edited)[..., 3], np.asarray(photo)[..., 3])


def test_a_photo_lying_on_its_side_is_turned_by_its_orientation_first():
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20)).save(buffer, "JPEG", exif=exif)
    result = EditTool().run({"img_index": 0, "prompt": "grey"}, [Blob(buffer.getvalue(), "image/jpeg")])
    assert Image.open(io.BytesIO(result.images[0].data)).size == (20, 40)


ONE_OF_EACH = """grey; sepia; invert; brighter; more contrast; vivid; blur; sharpen; tint it blue; posterize; pixelate;
find edges; sketch; rotate by 20 degrees; flip; crop; crop to a square; crop to 5x5; resize to 50%; thumbnail; border;
round the corners; caption 'x'"""
EACH = ONE_OF_EACH.replace("\n", " ").split("; ")


def test_every_operation_can_be_asked_for():
    assert {o.name for prompt in EACH for o in understand(prompt)} == set(OPERATIONS)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 1), (3, 200)])
def test_every_operation_works_on_the_smallest_pictures(size):
    for mode in ("RGB", "RGBA"):
        for prompt in EACH:
            assert min(edit(Image.new(mode, size), prompt).size) >= 1, prompt


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(["it", "turn", "to", "by", "and", "not", "50%", "10", "px", "0", "x", "16:9", ":", "red"]),
            st.sampled_from(ONE_OF_EACH.replace(";", "").split()),
            st.text(max_size=5),
        ),
        max_size=25,
    ).map(" ".join)
)
def test_any_text_is_understood_or_refused_and_never_breaks_anything(text):
    assert len(text) <= MAX_INSTRUCTION
    try:
        understood = understand(text)
        image = Image.new("RGBA", (12, 9), (200, 100, 50, 128))
        for operation in understood:
            image = OPERATIONS[operation.name](image, **operation.arguments)
    except CallFailed:
        return
    assert min(image.size) >= 1
    json.dumps([o.arguments for o in understood])


def test_the_tool_is_found_by_name():
    assert load("edit") is EditTool and EditTool.spec.image_params == ("img_index",)
