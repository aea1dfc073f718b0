"""Trajectories taken out of a store, as files that other programs read: Parquet and JSON lines.

Both are written in batches, so memory stays bounded, and whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from replay.join import field
from replay.record import SCHEMAS, STAGES, Blob, Status
from replay.store import StoreError
from replay.view import View

#: What `select` found: trajectory -> (status, reason).
Chosen = Mapping[str, tuple[str, str]]

BATCH = 100  # trajectories; a row group of the Parquet file, with its pictures
#: Columns of all stages, joined. (`turn` is the place of one stage's row, not of the trajectory.)
COLUMNS = list(dict.fromkeys(name for stage in STAGES for name in SCHEMAS[stage].names if name != "turn"))
COLUMNS += ["rendered.seconds", "scored.seconds", "step", "advantage"]

_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # as Hugging Face datasets store an Image
_COMPONENTS = pa.list_(pa.struct([("name", pa.string()), ("value", pa.float64())]))  # datasets know no maps
_FEATURES = {"huggingface": json.dumps({"info": {"features": {"images": [{"_type": "Image"}]}}})}


def _schema() -> pa.Schema:
    fields = {name: field(name) for name in COLUMNS}
    joined = [pa.field(n, _COMPONENTS if n == "components" else f.type) for n, f in fields.items()]
    ours = [pa.field("status", pa.string()), pa.field("reason", pa.string()), pa.field("images", pa.list_(_IMAGE))]
    return pa.schema(joined + ours, _FEATURES)


SCHEMA = _schema()


def statuses(view: View, purpose: str) -> dict[str, tuple[str, str]]:
    """Trajectory -> (status, reason) of a purpose; the reason is "" where none was given."""
    ends = view.ends(purpose)
    return {name: ends.get(name, (s.value, "")) for s in Status for name in view.find(purpose, [s])}


def select(
    view: View, purpose: str, min_reward: float | None = None, limit: int | None = None
) -> dict[str, tuple[str, str]]:
    """Trajectories of a purpose with status and reason, in the order of the data.

    Args:
        min_reward: only those that have a reward (`reward_strict`), and at least this one.
        limit: only the newest so many.
    """
    known = statuses(view, purpose)
    rows = view.get(list(known), ["order", "reward_strict"]).to_pylist()
    if min_reward is not None:
        rows = [r for r in rows if r["reward_strict"] is not None and r["reward_strict"] >= min_reward]
    rows.sort(key=lambda r: (r["order"] or 0, len(r["trajectory"]), r["trajectory"]))  # sample 10 after sample 9
    return {r["trajectory"]: known[r["trajectory"]] for r in (rows[-limit:] if limit else rows)}


def batches(
    view: View, names: Sequence[str], columns: Sequence[str], tell: Callable[[int], None] = lambda done: None
) -> Iterator[pa.Table]:
    """`View.get` in batches; after each, `tell` hears how many are done."""
    for start in range(0, len(names), BATCH):
        yield view.get(names[start : start + BATCH], columns)
        tell(min(start + BATCH, len(names)))


def pictures(view: View, names: Iterable[str]) -> dict[str, Blob]:
    """`View.blobs` with a clear error (StoreError) where one is missing."""
    try:
        return view.blobs(dict.fromkeys(names))
    except KeyError as error:
        raise StoreError(f"the store lacks the picture {error.args[0]} that a row refers to; verify it") from None


def pictures_of(row: Mapping[str, Any]) -> list[str]:
    """SHA-256 of a row's pictures: those given (`given`), then those made (`calls`), in order."""
    return [*(row["given"] or ()), *(sha for call in row["calls"] or () for sha in call["images"] or ())]


def parquet(view: View, out: Path, chosen: Chosen, tell: Callable[[int], None] = lambda done: None) -> None:
    """One row a trajectory: the columns of all stages, null where it did not get to, `status`, `reason` and `images`.

    pandas reads it, and so does Hugging Face `datasets`, which decodes `images` by itself: the given pictures, then
    those made, in order; a `path` is the picture's SHA-256 and its suffix. `components` is a list of name and value.

    Raises:
        StoreError: a picture is missing.
    """
    with whole(out) as tmp, pq.ParquetWriter(tmp, SCHEMA) as writer:
        for rows in batches(view, list(chosen), COLUMNS, tell):
            status, reason = zip(*(chosen[name] for name in rows["trajectory"].to_pylist()), strict=True)
            more = {"status": pa.array(status), "reason": pa.array(reason), "images": _images(view, rows)}
            parts = {name: rows[name] for name in COLUMNS} | more
            parts["components"] = rows["components"].cast(_COMPONENTS)
            writer.write_table(pa.table(parts, SCHEMA))


def _images(view: View, rows: pa.Table) -> pa.Array:
    names = [pictures_of(row) for row in rows.select(["given", "calls"]).to_pylist()]
    blobs = pictures(view, (sha for of_row in names for sha in of_row))
    images = [[{"bytes": blobs[sha].data, "path": _file(blobs[sha])} for sha in of_row] for of_row in names]
    return pa.array(images, pa.list_(_IMAGE))


def _file(blob: Blob) -> str:
    return f"{blob.sha256}.{blob.mime.rpartition('/')[2]}"


def sft(view: View, out: Path, chosen: Chosen, tell: Callable[[int], None] = lambda done: None) -> None:
    """One line of JSON a trajectory that has a reward, to train on: `trajectory`, `messages`, `reward` and `images`.

    The answer keeps its tags: pictures are made by tools, so a policy learns to write the tags. `images` are the given
    pictures, as files in a folder beside `out` (`NAME-images/`), named relative to the folder that `out` is in.

    Raises:
        StoreError: a picture is missing.
    """
    folder = out.with_name(f"{out.stem}-images")
    with whole(out) as tmp, open(tmp, "w", encoding="utf-8") as file:
        for rows in batches(view, list(chosen), ["question", "given", "text", "reward_strict"], tell):
            for row in rows.to_pylist():
                if row["reward_strict"] is not None:
                    images = _put_beside(folder, view, row["given"] or ())
                    file.write(json.dumps(_example(row, images), ensure_ascii=False) + "\n")


def _example(row: Mapping[str, Any], images: list[str]) -> dict[str, Any]:
    messages = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["text"]}]
    return {"trajectory": row["trajectory"], "messages": messages, "reward": row["reward_strict"], "images": images}


def _put_beside(folder: Path, view: View, names: Sequence[str]) -> list[str]:
    blobs = pictures(view, names)
    for blob in blobs.values():
        folder.mkdir(exist_ok=True)
        (folder / _file(blob)).write_bytes(blob.data)
    return [f"{folder.name}/{_file(blobs[name])}" for name in names]


@contextlib.contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A path to write to, which becomes `out` when all of it is written, and goes away if that fails."""
    tmp = out.with_name(out.name + ".tmp")
    try:
        yield tmp
        tmp.rename(out)
    finally:
        tmp.unlink(missing_ok=True)
