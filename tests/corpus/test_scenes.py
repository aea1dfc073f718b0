"""Scenes: drawings follow their words, wordings name what is drawn, and the checker reads pictures rightly."""

from itertools import product
from random import Random

import pytest
from PIL import Image

from corpus.scenes import COLOURS, GROUNDS, PLACES, SHAPES, describe, draw, look

ALL = list(product(SHAPES, COLOURS, PLACES, GROUNDS))


def test_the_checker_reads_every_kind_of_drawing():
    rng = Random(3)
    for scene in rng.sample(ALL, 120):
        seen = look(draw(*scene, rng))
        assert (seen.shape, seen.colour, seen.place, seen.ground) == scene
        assert seen.likeness > 0.7


def test_the_checker_sees_no_object_on_a_plain_picture():
    for colour in ("black", "grey", "tan", "skyblue"):
        assert look(Image.new("RGB", (64, 64), colour)).shape is None


def test_a_picture_of_another_size_or_mode_is_read_too():
    picture = draw("star", "red", "left", "sea", Random(0), size=128).convert("RGBA")
    seen = look(picture)
    assert (seen.shape, seen.colour, seen.place) == ("star", "red", "left")


def test_a_picture_filled_with_one_object_colour_is_read_without_an_error():
    assert look(Image.new("RGB", (64, 64), (216, 36, 44))).colour == "red"


def test_drawings_vary_with_the_generator_and_repeat_with_the_seed():
    words = ("boat", "white", "top", "night")
    assert draw(*words, Random(1)).tobytes() == draw(*words, Random(1)).tobytes()
    assert draw(*words, Random(1)).tobytes() != draw(*words, Random(2)).tobytes()


def test_a_word_outside_the_vocabulary_is_refused():
    with pytest.raises(KeyError):
        draw("dragon", "red", "left", "sea", Random(0))
    with pytest.raises(KeyError):
        draw("star", "red", "left", "volcano", Random(0))


def test_every_wording_names_shape_and_colour_and_wordings_differ():
    rng = Random(5)
    texts = [describe("house", "orange", "left", "desert", rng) for _ in range(300)]
    assert all("house" in t and "orange" in t for t in texts)
    assert len(set(texts)) > 100
    left, desert = (sum(w in t for t in texts) / 300 for w in ("left", "desert"))
    assert 0.7 < left < 0.9 and 0.65 < desert < 0.85


def test_a_full_wording_leaves_nothing_out():
    rng = Random(6)
    texts = [describe("tree", "pink", "right", "snow", rng, full=True) for _ in range(100)]
    assert all(w in t for t in texts for w in ("tree", "pink", "right", "snow"))
