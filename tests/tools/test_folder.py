"""A folder of one's own pictures as a place to search."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tools.search_service import picture
from tools.base import CallFailed
from tools.search import SearchTool


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "animals").mkdir()
    for i, name in enumerate(("animals/red-fox.png", "animals/IMG_0001.PNG", "golden_gate_bridge.png", "broken.png")):
        (tmp_path / name).write_bytes(picture(("red", "brown", "orange")[i]) if i < 3 else b"\x89PNG but no more")
    about = {"file_name": "IMG_0001.PNG", "title": "Otter", "text": "An otter eats a fish.", "author": "Ann"}
    about |= {"licence": "CC0-1.0", "page": "https://example.org/otter"}
    (tmp_path / "animals/metadata.jsonl").write_text(json.dumps(about) + "\n")
    (tmp_path / "animals/red-fox.txt").write_text("A young fox\nin the snow.\n")
    return tmp_path


def search(folder: Path, query: str) -> dict[str, object]:
    return dict(SearchTool("folder", path=str(folder)).run({"query": query}).provenance)


def test_a_picture_is_found_by_metadata_by_the_text_beside_it_and_by_its_name(folder: Path) -> None:
    otter = search(folder, "otter with a fish")
    assert (otter["title"], otter["author"], otter["licence"]) == ("Otter", "Ann", "CC0-1.0")
    assert otter["page"] == "https://example.org/otter" and otter["maker"] == "folder" and "fetched" not in otter
    fox = search(folder, "fox in deep snow")
    assert (fox["title"], fox["caption"], fox["licence"]) == ("red fox", "A young fox in the snow.", "unknown")
    assert search(folder, "the Golden Gate")["title"] == "golden gate bridge"


def test_what_is_not_there_is_not_found_and_a_broken_picture_is_not_taken(folder: Path) -> None:
    with pytest.raises(CallFailed, match="no picture found for 'elephant': ask in other words"):
        search(folder, "elephant")
    with pytest.raises(CallFailed, match="none of the 1 pictures found for 'broken' could be taken"):
        search(folder, "broken")


def test_the_folder_is_read_when_it_is_first_asked(folder: Path) -> None:
    tool = SearchTool("folder", path=str(folder))
    (folder / "zebra.png").write_bytes(picture("white"))
    assert tool.run({"query": "zebra"}).provenance["title"] == "zebra"
    (folder / "zebra.png").unlink()
    with pytest.raises(RuntimeError, match=r"zebra\.png cannot be read"):
        tool.run({"query": "zebra"})


def test_a_folder_that_is_none_and_metadata_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        SearchTool("folder", path=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="holds no picture"):
        search(tmp_path, "x")
    (tmp_path / "a.png").write_bytes(picture("red"))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n["a.png"]\n')
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 2: not an object with a file_name"):
        search(tmp_path, "a")


def test_titles_without_words_and_in_any_script_do_no_harm(tmp_path: Path) -> None:
    for name in ("___.png", "富士山.png", "the.png"):
        (tmp_path / name).write_bytes(picture("blue"))
    assert search(tmp_path, "富士山")["title"] == "富士山"
    with pytest.raises(CallFailed, match="no picture found"):
        search(tmp_path, "mountain")
