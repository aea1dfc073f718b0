import base64
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from corpus import grammar
from corpus.prompts import load, report, save
from replay.record import Prompt


def picture(kind: str = "PNG") -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(held, kind)
    return held.getvalue()


def row(**changes: Any) -> dict[str, Any]:
    """A good row; `changes` go to its extra_info, or to the row where it has a column of that name."""
    info: dict[str, Any] = {"split": "train", "image_num": 1, "tools": ["code"], "question": "Compare 3 and 5."}
    columns: dict[str, Any] = {"prompt": "p", "images": None, "data_source": "interleaved"}
    made = columns | {k: v for k, v in changes.items() if k in columns}
    return made | {"extra_info": info | {k: v for k, v in changes.items() if k not in columns}}


def write(folder: Path, *rows: Any) -> str:
    path = folder / "set.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), encoding="utf-8")
    return str(path)


def test_the_grammar_is_a_built_in_set() -> None:
    prompts, problems = load("builtin:grammar", "heldout", 12, seed=4)
    assert prompts == grammar.prompts(12, 4, "heldout") and problems == []


def test_saved_prompts_come_back_whole(tmp_path: Path) -> None:
    made = [
        *grammar.prompts(30, 0, "train"),
        Prompt("own", "Zeig mir Köln.", (picture(), picture("JPEG"), picture("WEBP")), 99, ("search",), {"ä": "ö"}),
    ]
    save(made, tmp_path / "set.parquet")
    prompts, problems = load(str(tmp_path / "set.parquet"), "train")
    assert sorted(prompts, key=lambda p: p.id) == sorted(made, key=lambda p: p.id) and problems == []


def test_a_saved_file_has_the_columns_of_the_published_sets(tmp_path: Path) -> None:
    save(grammar.prompts(6, 0, "unseen"), tmp_path / "set.parquet", split="test")
    table = pq.read_table(tmp_path / "set.parquet")
    assert table.column_names == ["prompt", "images", "data_source", "extra_info"]
    info = table["extra_info"][0].as_py()
    assert info["split"] == "test" and {"image_num", "tools", "question"} < set(info)
    assert set(table["data_source"].to_pylist()) == {"interleaved", "interleaved_mm"}


def test_no_prompts_make_an_empty_file_that_is_refused_when_read(tmp_path: Path) -> None:
    save([], tmp_path / "set.parquet")
    with pytest.raises(ValueError, match="no good row of split 'train'"):
        load(str(tmp_path / "set.parquet"), "train")


def test_the_prompt_may_be_text_or_chat_messages(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "ask"}]
    source = write(tmp_path, row(question=None, prompt="text"), row(question="", prompt=chat), row())
    assert {p.question for p in load(source, "train").prompts} == {"text", "ask", "Compare 3 and 5."}


def test_pictures_come_as_a_path_as_bytes_or_in_base64(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    held = {"bytes": base64.b64encode(picture("JPEG")).decode(), "path": None}
    source = write(tmp_path, row(images=["a.png", {"path": str(tmp_path / "a.png")}, held]))
    assert load(source, "train").prompts[0].images == (picture(), picture(), picture("JPEG"))

    table = pa.Table.from_pylist([row(images=[picture("WEBP")])])
    pq.write_table(table, tmp_path / "raw.parquet")
    assert load(str(tmp_path / "raw.parquet"), "train").prompts[0].images == (picture("WEBP"),)


def test_only_rows_of_the_split_are_loaded_shuffled_and_cut(tmp_path: Path) -> None:
    source = write(tmp_path, *(row(question=f"q{i}", split="train" if i % 2 else "test") for i in range(40)))
    whole = load(source, "train", seed=1).prompts
    assert sorted(p.question for p in whole) == sorted(f"q{i}" for i in range(1, 40, 2))
    assert load(source, "train", 5, seed=1).prompts == whole[:5] != load(source, "train", 5, seed=2).prompts
    assert len({p.id for p in whole + load(source, "test").prompts}) == 40


@pytest.mark.parametrize(
    ("broken", "wrong"),
    [
        ("not json", "not a JSON object"),
        ([1], "not a JSON object"),
        ({"prompt": "p"}, "no extra_info"),
        (row(split=None), "extra_info.split must be text, not None"),
        (row(question=" "), "no question"),
        (row(question=None, prompt=None), "no question"),
        (row(question=None, prompt=[{"role": "system", "content": "s"}]), "no question"),
        (row(image_num=None), "extra_info.image_num must be"),
        (row(image_num="2"), "extra_info.image_num must be"),
        (row(image_num=True), "extra_info.image_num must be"),
        (row(image_num=-2), "extra_info.image_num must be"),
        (row(image_num=-1), "image_num -1 leaves no room for the required tools code"),
        (row(image_num=1, tools=["code", "search"]), "image_num 1 leaves no room for the required tools code, search"),
        (row(tools=None), "extra_info.tools must be a list of names"),
        (row(tools=[3]), "extra_info.tools must be a list of names"),
        (row(tools=["brush"]), "unknown tool 'brush' in extra_info.tools: the config's are code, diffusion, edit, s"),
        (row(images="a.png"), "images must be a list, not str"),
        (row(images=["missing.png"]), r"images\[0\] is no PNG, JPEG, WEBP picture that can be read"),
        (row(images=[{"bytes": None, "path": None}]), r"images\[0\] is no .*: neither bytes nor a path, but NoneType"),
        (row(images=[{"bytes": "%%%"}]), r"images\[0\] is no "),
        (row(images=[{"bytes": base64.b64encode(b"GIF89a").decode()}]), r"images\[0\] is no "),
        (row(images=[{"bytes": base64.b64encode(picture()[:45]).decode()}]), r"images\[0\] is no "),
        (row(meta="[]"), "extra_info.meta must hold texts by name"),
        (row(meta={"a": 1}), "extra_info.meta must hold texts by name"),
        (row(id="twice"), "its id 'twice' is that of an earlier row"),
    ],
)
def test_a_broken_row_is_reported_and_the_others_stay(tmp_path: Path, broken: Any, wrong: str) -> None:
    source = write(tmp_path, row(id="twice"), broken, row(question="last"))
    prompts, problems = load(source, "train")
    assert {p.question for p in prompts} == {"Compare 3 and 5.", "last"}
    assert len(problems) == 1
    with pytest.raises(ValueError, match=wrong):
        raise ValueError(problems[0])
    assert problems[0].startswith(f"{source}, row 2: ")


def test_a_row_may_require_what_the_config_calls_a_tool_and_nothing_else(tmp_path: Path) -> None:
    source = write(tmp_path, row(tools=["plot"]), row(tools=["mcp"]))
    prompts, problems = load(source, "train", known=("plot",))
    assert [p.tools for p in prompts] == [("plot",)]
    assert [p.split(": ", 1)[1] for p in problems] == ["unknown tool 'mcp' in extra_info.tools: the config's are plot"]


NAMES = st.sampled_from(["prompt", "images", "extra_info", "split", "tools", "question", "image_num", "bytes", "meta"])
SCALARS = st.none() | st.booleans() | st.integers() | st.text()


@settings(max_examples=40, deadline=None)
@given(st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(NAMES, inner), max_leaves=12))
def test_no_json_whatever_ends_the_reading_of_a_file(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    source = write(tmp_path_factory.mktemp("any"), value, row(), row(images=[value]), row(tools=value, meta=value))
    prompts, problems = load(source, "train")
    assert 1 <= len(prompts) <= 4 - len(problems) and prompts[0].question


def test_a_report_counts_all_problems_and_shows_a_few() -> None:
    lines = report("set.jsonl", [f"problem {i}" for i in range(9)]).split("\n")
    assert lines[0] == "set.jsonl: 9 broken rows are left out:"
    assert lines[1:] == [*(f"problem {i}" for i in range(5)), "... and 4 more"]


def test_a_file_without_a_good_row_is_one_error_that_tells_of_its_problems(tmp_path: Path) -> None:
    source = write(tmp_path, row(image_num=-9), "{", row(split="test"))
    with pytest.raises(ValueError, match=r"it has test: set extra_info.split to 'train' .*\n.*2 broken rows") as error:
        load(source, "train")
    assert "row 1: extra_info.image_num" in str(error.value)


def test_a_missing_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no prompt file .*gone\.parquet"):
        load(str(tmp_path / "gone.parquet"), "train")


def test_files_of_another_form_are_refused(tmp_path: Path) -> None:
    (tmp_path / "set.csv").write_text("prompt")
    (tmp_path / "set.parquet").write_bytes(b"PAR1 is not enough")
    with pytest.raises(ValueError, match=r"set\.csv is neither a \.parquet nor a \.jsonl file"):
        load(str(tmp_path / "set.csv"), "train")
    with pytest.raises(ValueError, match=r"set\.parquet cannot be read as Parquet"):
        load(str(tmp_path / "set.parquet"), "train")


def test_built_in_sets_are_named_exactly_and_sized() -> None:
    with pytest.raises(ValueError, match="unknown built-in prompt set 'builtin:poems': there is 'builtin:grammar'"):
        load("builtin:poems", "train", 6)
    with pytest.raises(ValueError, match="say how many"):
        load("builtin:grammar", "train")
