"""Prompt sets: the built-in grammar, or a file of LLM-I's form (columns `prompt`, `images`, `data_source`,
`extra_info = {split, image_num, tools, question}`) as Parquet or JSON lines.

A broken row never ends a run that has others: `load` returns the good ones, and a line about each broken one that
names the file, the row and what is wrong with it.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from agent.spec import PUBLISHED
from corpus import grammar
from replay.record import Prompt

GRAMMAR = "builtin:grammar"
FORMATS = ("PNG", "JPEG", "WEBP")
_SCHEMA = pa.schema(
    [
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("data_source", pa.string()),
        (
            "extra_info",
            pa.struct(
                [
                    ("split", pa.string()),
                    ("image_num", pa.int16()),
                    ("tools", pa.list_(pa.string())),
                    ("question", pa.string()),
                    ("id", pa.string()),
                    ("meta", pa.string()),  # JSON
                ]
            ),
        ),
    ]
)


class Loaded(NamedTuple):
    """Prompts, and one line about every row that could not be one."""

    prompts: list[Prompt]
    problems: list[str]


def load(
    source: str, split: str, n: int | None = None, seed: int = 0, *, known: Collection[str] = tuple(PUBLISHED)
) -> Loaded:
    """Load the prompts of one split, shuffled by `seed`, at most `n`.

    Args:
        source: "builtin:grammar", or the path of a .parquet or .jsonl file; its pictures' paths are relative to it.
        n: None for all of a file's; the grammar needs a number.
        known: names of the tools that there are, as the config has them; a file's rows may require no others.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the source is of no known form, or has no good row of the split.
    """
    if source == GRAMMAR:
        if n is None:
            raise ValueError(f"{GRAMMAR} makes as many prompts as it is asked for: say how many")
        return Loaded(grammar.prompts(n, seed, split), [])
    if source.startswith("builtin:"):
        raise ValueError(f"unknown built-in prompt set {source!r}: there is {GRAMMAR!r}")
    prompts, problems = _read(Path(source), split, known)
    Random(seed).shuffle(prompts)
    return Loaded(prompts[:n], problems)


def save(prompts: Sequence[Prompt], path: str | Path, split: str = "train") -> None:
    """Write prompts as a Parquet file that `load` reads back, pictures included."""
    rows = [
        {
            "prompt": [{"role": "user", "content": p.question}],
            "images": [{"bytes": data, "path": None} for data in p.images],
            "data_source": "interleaved_mm" if p.images else "interleaved",
            "extra_info": {
                "split": split,
                "image_num": p.image_num,
                "tools": list(p.tools),
                "question": p.question,
                "id": p.id,
                "meta": json.dumps(p.meta, ensure_ascii=False),
            },
        }
        for p in prompts
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), path)


def report(source: str, problems: Sequence[str], shown: int = 5) -> str:
    """What is wrong with a prompt file, counted, in at most `shown` + 2 lines."""
    rest = [f"... and {len(problems) - shown} more"] if len(problems) > shown else []
    return "\n".join([f"{source}: {len(problems)} broken rows are left out:", *problems[:shown], *rest])


def _read(path: Path, split: str, known: Collection[str]) -> tuple[list[Prompt], list[str]]:
    prompts: dict[str, Prompt] = {}
    problems: list[str] = []
    others: set[str] = set()
    for number, row in _rows(path):
        try:
            prompt, its_split = _prompt(row, f"{path.stem}-{number}", path.parent, known)
            if its_split != split:
                others.add(its_split)
                continue
            if prompt.id in prompts:
                raise ValueError(f"its id {prompt.id!r} is that of an earlier row")
            prompts[prompt.id] = prompt
        except ValueError as error:
            problems.append(f"{path}, row {number}: {error}")
    if not prompts:
        had = (
            f"; it has {', '.join(sorted(others))}: set extra_info.split to {split!r} in those to use" if others else ""
        )
        broken = f"\n{report(str(path), problems)}" if problems else ""
        raise ValueError(f"{path} has no good row of split {split!r}{had}{broken}")
    return list(prompts.values()), problems


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Number, from 1, and content of each row; a line that is no JSON comes as its text."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no prompt file {path}: check the path in the config")
    if path.suffix == ".parquet":
        yield from enumerate(_parquet(path), 1)
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8", errors="replace") as lines:
            yield from ((number, _json(line)) for number, line in enumerate(lines, 1) if line.strip())
    else:
        raise ValueError(f"{path} is neither a .parquet nor a .jsonl file")


def _parquet(path: Path) -> Iterator[Any]:
    try:
        for batch in pq.ParquetFile(path).iter_batches(256):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return line


def _prompt(row: Any, name: str, folder: Path, known: Collection[str]) -> tuple[Prompt, str]:
    """One row as a prompt, and its split.

    Raises:
        ValueError: what is wrong with the row.
    """
    if not isinstance(row, Mapping):
        raise ValueError("not a JSON object")
    info = row.get("extra_info")
    if not isinstance(info, Mapping):
        raise ValueError("no extra_info")
    split = info.get("split")
    if not isinstance(split, str):
        raise ValueError(f"extra_info.split must be text, not {split!r}")
    tools = _tools(info.get("tools"), known)
    return Prompt(
        id=str(info.get("id") or name),
        question=_question(row, info),
        images=_images(row.get("images"), folder),
        image_num=_image_num(info.get("image_num"), tools),
        tools=tools,
        meta=_meta(info.get("meta")),
    ), split


def _question(row: Mapping[str, Any], info: Mapping[str, Any]) -> str:
    """`extra_info.question`, else the prompt: text, or chat messages whose last one by the user counts."""
    question = info.get("question") or row.get("prompt")
    if isinstance(question, list):
        said = [m.get("content") for m in question if isinstance(m, Mapping) and m.get("role") == "user"]
        question = said[-1] if said else None
    if not isinstance(question, str) or not question.strip():
        raise ValueError("no question: neither extra_info.question nor prompt holds any text of a user")
    return question


def _tools(value: Any, known: Collection[str]) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(tool, str) for tool in value):
        raise ValueError(f"extra_info.tools must be a list of names, not {value!r}")
    if strange := sorted(set(value).difference(known)):
        there = ", ".join(sorted(known)) or "none"
        raise ValueError(f"unknown tool {strange[0]!r} in extra_info.tools: the config's are {there}")
    return tuple(dict.fromkeys(value))


def _image_num(value: Any, tools: tuple[str, ...]) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not -1 <= value <= 99:
        raise ValueError(f"extra_info.image_num must be -1, 0, 99 or a number of images, not {value!r}")
    if value not in (0, 99) and len(tools) > max(0, value):
        raise ValueError(f"extra_info.image_num {value} leaves no room for the required tools {', '.join(tools)}")
    return value


def _images(value: Any, folder: Path) -> tuple[bytes, ...]:
    if value is not None and not isinstance(value, list):
        raise ValueError(f"images must be a list, not {type(value).__name__}")
    return tuple(_image(image, at, folder) for at, image in enumerate(value or ()))


def _image(value: Any, at: int, folder: Path) -> bytes:
    """A picture given as bytes, as a path, or as {bytes, path}, where JSON holds the bytes in Base64."""
    try:
        if isinstance(value, Mapping):
            held = value.get("bytes")
            value = base64.b64decode(held, validate=True) if isinstance(held, str) else held or value.get("path")
        data = (folder / value).read_bytes() if isinstance(value, str) else value
        if not isinstance(data, bytes):
            raise ValueError(f"neither bytes nor a path, but {type(data).__name__}")
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"images[{at}] is no {', '.join(FORMATS)} picture that can be read: {error}") from error
    return data


def _meta(value: Any) -> dict[str, str]:
    meta = json.loads(value) if isinstance(value, str) else value or {}
    if not isinstance(meta, Mapping) or not all(isinstance(v, str) for v in meta.values()):
        raise ValueError(f"extra_info.meta must hold texts by name, not {value!r}")
    return dict(meta)
