"""The built-in pictures: all there, small, described, free, and named in NOTICE."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from corpus import pictures
from corpus.pictures import Picture
from corpus.pictures.build import notice, qrc
from corpus.pictures.build.flags import colours
from corpus.pictures.build.tables import listed, slug
from replay.record import Blob

FREE = {"CC0-1.0", "CC-BY-2.0", "CC-BY-3.0", "CC-BY-4.0", "CC-BY-SA-4.0", "MIT", "Public domain"}
ALL = pictures.load()
MANY = len(ALL)


def test_there_are_many_pictures_of_every_kind() -> None:
    kinds = Counter(p.kind for p in ALL)
    assert set(kinds) == set(pictures.KINDS)
    assert kinds["flag"] == kinds["map"] > 190
    assert kinds["photo"] > 200


def test_every_picture_opens_and_is_small() -> None:
    sizes = []
    for picture in ALL:
        data = pictures.read(picture)
        image = Image.open(io.BytesIO(data))
        image.load()
        assert min(image.size) >= 100, picture.file
        assert max(image.size) <= 320, picture.file
        assert image.convert("L").getextrema()[0] != image.convert("L").getextrema()[1], f"{picture.file} is blank"
        sizes.append(len(data))
    assert max(sizes) <= 60_000
    assert sum(sizes) <= 4_500_000


def test_the_whole_folder_and_its_notice_stay_within_five_megabytes() -> None:
    files = [p for p in pictures.FOLDER.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    notice_file = pictures.FOLDER.parents[1] / "NOTICE"
    assert sum(p.stat().st_size for p in [*files, notice_file]) <= 5_000_000


def test_every_picture_is_described_and_free() -> None:
    for picture in ALL:
        assert len(picture.caption.split()) >= 6, picture.file
        assert picture.caption.endswith("."), picture.file
        assert picture.title and picture.subject and picture.source and picture.author, picture.file
        assert picture.licence in FREE, picture.file


def test_no_two_pictures_are_the_same() -> None:
    for values in ([Blob(pictures.read(p)).sha256 for p in ALL], [p.title for p in ALL], [p.file for p in ALL]):
        assert len(set(values)) == MANY


def test_the_index_and_the_folder_hold_the_same_files() -> None:
    there = {p.relative_to(pictures.FOLDER).as_posix() for k in pictures.KINDS for p in _folder(k).iterdir()}
    assert there == {p.file for p in ALL}


def _folder(kind: str) -> Path:
    return pictures.FOLDER / f"{kind}s"


def test_notice_names_every_picture_with_its_source_author_and_licence() -> None:
    text = (pictures.FOLDER.parents[1] / "NOTICE").read_text(encoding="utf-8")
    assert text == notice.text(ALL)
    for picture in ALL:
        assert f"{picture.file}: {picture.title}, by {picture.author}; {picture.source}" in text


def test_notice_refuses_a_licence_it_does_not_know() -> None:
    with pytest.raises(KeyError):
        notice.text([Picture("a.png", "A", "a", "A thing.", "somewhere", "All rights reserved", "me", "photo")])


def test_every_country_has_a_flag_and_a_map() -> None:
    countries = pictures.countries()
    assert len(set(countries)) == len(countries) == 197
    assert {"Kenya", "South Korea", "Netherlands"} <= set(countries)
    titles = {p.title for p in ALL}
    assert {"Flag of Kenya", "Map of Kenya", "Flag of the Netherlands"} <= titles


def test_subjects_are_unique_and_read_within_a_sentence() -> None:
    subjects = pictures.subjects()
    assert len(set(subjects)) == len(subjects)
    assert {"cat", "cup of coffee", "Eiffel Tower"} <= set(subjects)
    assert not set(subjects) & set(pictures.countries())


def test_a_caption_tells_the_colours_of_a_flag_and_the_neighbours_on_a_map() -> None:
    captions = {p.title: p.caption for p in ALL}
    assert "Kenyan flag" in captions["Flag of Kenya"]
    assert all(colour in captions["Flag of Kenya"] for colour in ("black", "red", "green", "white"))
    assert "borders Ethiopia, Somalia, South Sudan, Tanzania and Uganda" in captions["Map of Kenya"]
    assert "no land border" in captions["Map of Iceland"]


def test_a_map_shows_its_country_in_colour() -> None:
    for picture in (p for p in ALL if p.kind == "map"):
        red, green, blue = Image.open(io.BytesIO(pictures.read(picture))).convert("RGB").split()
        orange = np.count_nonzero((np.asarray(red) > 180) & (np.asarray(green) < 150) & (np.asarray(blue) < 110))
        assert orange >= 12, f"{picture.file} has {orange} orange pixels"


@pytest.mark.parametrize("line", ["", "[]", '{"file": "a.png"}', '{"file": '])
def test_a_broken_line_of_the_index_is_named(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = json.dumps(dict.fromkeys(Picture.__dataclass_fields__, "x"))
    (tmp_path / "index.jsonl").write_text(f"{whole}\n{line}\n{whole}\n")
    monkeypatch.setattr(pictures, "FOLDER", tmp_path)
    pictures.load.cache_clear()
    with pytest.raises(ValueError, match=r"index\.jsonl, line 2"):
        pictures.load()
    pictures.load.cache_clear()


def test_words_of_the_build_are_plain() -> None:
    assert slug("Château d'If & São Tomé") == "chateau-dif-sao-tome"
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b and c"


def test_colours_of_a_flag_come_by_size() -> None:
    flag = Image.new("RGB", (90, 60), "white")
    flag.paste((206, 17, 38), (0, 0, 60, 60))
    assert colours(flag) == ["red", "white"]


def test_a_file_that_is_no_qt_resource_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.rcc").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="not a compiled Qt resource"):
        qrc.read(tmp_path / "x.rcc")
