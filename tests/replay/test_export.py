"""What leaves a store: rows, statuses and pictures as they were put, in files that other programs read."""

import io
import json
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from replay import export
from replay.export import parquet, select, sft
from replay.record import SCHEMAS, Blob
from replay.store import Store, StoreError
from replay.view import View


def picture(colour: str) -> Blob:
    data = io.BytesIO()
    Image.new("RGB", (3, 2), colour).save(data, "PNG")
    return Blob(data.getvalue())


GIVEN, MADE = picture("red"), picture("blue")


def table(stage: str, *rows: dict[str, Any]) -> pa.Table:
    filled = [{n: None for n in SCHEMAS[stage].names} | {"attempt": 0, "turn": 0} | row for row in rows]
    return pa.Table.from_pylist(filled, SCHEMAS[stage])


def put_group(store: Store, order: int, rewards: tuple[float | None, ...], purpose: str = "train") -> None:
    """A group whose samples have these rewards; None for one that was not generated."""
    keys = [{"trajectory": f"g{order}/{i}", "group": f"g{order}"} for i in range(len(rewards))]
    prompt = {"purpose": purpose, "order": order, "question": f"Draw {order}", "given": [GIVEN.sha256, GIVEN.sha256]}
    store.put("pending", table("pending", *(key | prompt for key in keys)), [GIVEN])
    call = {"source": "edit", "status": "ok", "images": [MADE.sha256], "params": "{}", "provenance": "{}"}
    for key, reward in zip(keys, rewards, strict=True):
        if reward is not None:
            tokens = {"token_ids": [1, 2], "logprobs": [-0.5, -1.0], "mask": [1, 1], "versions": [3, 4]}
            store.put("generated", table("generated", key | tokens | {"text": "Here: ä <imgen>"}))
            store.put("rendered", table("rendered", key | {"calls": [call], "finished": True}), [MADE])
            score = {"reward": reward, "reward_strict": reward, "components": [("rule", 1.0), ("images", 2.0)]}
            store.put("scored", table("scored", key | score))


@pytest.fixture
def view(tmp_path: Path) -> View:
    store = Store(tmp_path / "replay")
    for order in range(3):
        put_group(store, order, (0.25 * order, 1.0, None))
    put_group(store, 7, (0.5,), "before")
    claim = store.claim("pending", limit=1, lease_s=9, columns=[])
    assert claim is not None
    store.ack(claim.token, {"g0/2": ("dropped_data", "broken")})
    store.close()
    return View(tmp_path / "replay")


def test_a_purpose_is_selected_with_status_and_reason_in_the_order_of_the_data(view: View) -> None:
    chosen = select(view, "train")
    assert list(chosen) == [f"g{order}/{i}" for order in range(3) for i in range(3)]
    assert chosen["g0/2"] == ("dropped_data", "broken")
    assert chosen["g1/0"] == ("scored", "") and chosen["g1/2"] == ("pending", "")


def test_the_least_reward_leaves_out_what_has_none_and_the_limit_keeps_the_newest(view: View) -> None:
    assert list(select(view, "train", min_reward=0.25)) == ["g0/1", "g1/0", "g1/1", "g2/0", "g2/1"]
    assert list(select(view, "train", min_reward=0.25, limit=2)) == ["g2/0", "g2/1"]


def test_parquet_holds_every_column_of_all_stages(view: View, tmp_path: Path) -> None:
    parquet(view, tmp_path / "out.parquet", select(view, "train"))
    rows = {r["trajectory"]: r for r in pq.read_table(tmp_path / "out.parquet").to_pylist()}
    joined = {name for stage in ("pending", "generated", "rendered", "scored") for name in SCHEMAS[stage].names}
    ours = {"status", "reason", "images", "rendered.seconds", "scored.seconds", "step", "advantage"}
    assert set(rows["g0/0"]) == joined - {"turn"} | ours
    assert rows["g1/1"]["logprobs"] == [-0.5, -1.0] and rows["g1/1"]["versions"] == [3, 4]
    assert rows["g1/1"]["components"] == [{"name": "rule", "value": 1.0}, {"name": "images", "value": 2.0}]
    assert rows["g0/2"]["reason"] == "broken" and rows["g0/2"]["text"] is None and rows["g0/2"]["calls"] is None


def test_parquet_keeps_given_and_made_pictures_as_hugging_face_images(view: View, tmp_path: Path) -> None:
    parquet(view, tmp_path / "out.parquet", select(view, "train"))
    read = pq.read_table(tmp_path / "out.parquet")
    assert json.loads(read.schema.metadata[b"huggingface"])["info"]["features"] == {"images": [{"_type": "Image"}]}
    assert read.schema.field("images").type == pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    first, undone = (read["images"][i].as_py() for i in (0, 2))
    assert [image["bytes"] for image in first] == [GIVEN.data, GIVEN.data, MADE.data]
    assert first[2]["path"] == f"{MADE.sha256}.png"
    assert len(undone) == 2, "the given pictures are there before the answer is"


def test_hugging_face_datasets_reads_the_parquet_and_decodes_its_pictures(view: View, tmp_path: Path) -> None:
    parquet(view, tmp_path / "out.parquet", select(view, "train"))
    rows = datasets.Dataset.from_parquet(str(tmp_path / "out.parquet"), cache_dir=str(tmp_path / "cache"))
    first = next(row for row in rows if row["trajectory"] == "g0/0")
    assert len(rows) == 9 and first["images"][2].getpixel((0, 0)) == (0, 0, 255)
    assert first["token_ids"] and first["components"]


def test_pandas_reads_the_parquet(view: View, tmp_path: Path) -> None:
    parquet(view, tmp_path / "out.parquet", select(view, "train"))
    frame = pd.read_parquet(tmp_path / "out.parquet")
    assert frame.groupby("status").size().to_dict() == {"dropped_data": 1, "pending": 2, "scored": 6}
    assert Image.open(io.BytesIO(frame["images"][0][2]["bytes"])).getpixel((0, 0)) == (0, 0, 255)


def test_batches_change_nothing_but_the_memory(view: View, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet(view, tmp_path / "one.parquet", select(view, "train"))
    monkeypatch.setattr(export, "BATCH", 2)
    heard: list[int] = []
    parquet(view, tmp_path / "many.parquet", select(view, "train"), heard.append)
    assert heard == [2, 4, 6, 8, 9]
    assert pq.ParquetFile(tmp_path / "many.parquet").num_row_groups == 5
    assert pq.read_table(tmp_path / "many.parquet") == pq.read_table(tmp_path / "one.parquet")


def test_sft_examples_are_chats_with_the_given_pictures_beside_them(view: View, tmp_path: Path) -> None:
    sft(view, tmp_path / "best.jsonl", select(view, "train", min_reward=0.5))
    lines = [json.loads(line) for line in (tmp_path / "best.jsonl").read_text().splitlines()]
    assert [line["trajectory"] for line in lines] == ["g0/1", "g1/1", "g2/0", "g2/1"]
    assert lines[2]["messages"] == [
        {"role": "user", "content": "Draw 2"},
        {"role": "assistant", "content": "Here: ä <imgen>"},
    ]
    assert lines[2]["reward"] == 0.5
    assert len(lines[2]["images"]) == 2
    assert (tmp_path / lines[2]["images"][0]).read_bytes() == GIVEN.data


def test_a_missing_picture_is_named_and_leaves_no_half_file(tmp_path: Path) -> None:
    store = Store(tmp_path / "replay")
    lost = Blob(b"never put").sha256
    store.put("pending", table("pending", {"trajectory": "g/0", "group": "g", "purpose": "train", "given": [lost]}))
    store.close()
    view = View(tmp_path / "replay")
    with pytest.raises(StoreError, match=lost):
        parquet(view, tmp_path / "out.parquet", select(view, "train"))
    assert [p.name for p in tmp_path.iterdir()] == ["replay"]
