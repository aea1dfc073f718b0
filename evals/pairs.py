"""Pairs of documents of which one is known to be better: a file of them, and a built-in set with planted flaws.

A file holds one JSON object a line:

    {"judge": "text",            # which judge can see the difference: text or image
     "flaw": "wrong number",     # what is wrong with the worse one; results are given by it
     "question": "...", "image_num": 1, "tools": ["search"], "given": ["mine.png"],
     "better": {"text": "... <imgen>{...}</imgen> ...", "pictures": ["a.png"], "provenance": [{"title": "..."}]},
     "worse": {"text": "...", "finished": false}}

`pictures` holds a path for each tag in order (relative to the file), or null for one whose call failed; `provenance`
what is told of each. `question`, `text` and `judge` are needed; `image_num` is 0 without it, `finished` true.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.protocol import Call, Invalid, parse
from replay.record import Blob
from rewards.base import CallOutcome, Rendered

JUDGES = ("text", "image")


class PairsError(ValueError):
    """The pairs cannot be used; the message says which line and why."""


@dataclass(frozen=True)
class Pair:
    """Two answers to one question.

    Attributes:
        judge: which judge can see the difference, one of JUDGES.
        flaw: what is wrong with the worse one.
    """

    judge: str
    flaw: str
    better: Rendered
    worse: Rendered


def load(path: Path) -> list[Pair]:
    """Read a file of pairs.

    Raises:
        PairsError: there is no file, it holds no pair, or a line is none.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PairsError(f"cannot read the pairs in {path}: {error}") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                pairs.append(_pair(json.loads(line), path.parent))
            except (ValueError, TypeError, KeyError, OSError) as error:
                why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
                raise PairsError(f"{path}, line {number} is no pair: {why}") from None
    if not pairs:
        raise PairsError(f"{path} holds no pair; docs/judges.md shows what a line looks like")
    return pairs


def _pair(row: Any, folder: Path) -> Pair:
    if not isinstance(row, Mapping):
        raise ValueError("it is not a JSON object")
    if row["judge"] not in JUDGES:
        raise ValueError(f"`judge` is {row['judge']!r}, not one of {', '.join(JUDGES)}")
    better, worse = (_document(row, row[side], folder) for side in ("better", "worse"))
    return Pair(row["judge"], str(row.get("flaw", "other")), better, worse)


def _document(row: Mapping[str, Any], side: Mapping[str, Any], folder: Path) -> Rendered:
    made = [None if name is None else Blob((folder / name).read_bytes()) for name in side.get("pictures", ())]
    given = [Blob((folder / name).read_bytes()) for name in row.get("given", ())]
    return document(
        row["question"],
        side["text"],
        made,
        int(row.get("image_num", 0)),
        tuple(row.get("tools", ())),
        given,
        side.get("provenance", ()),
        bool(side.get("finished", True)),
    )


def document(
    question: str,
    text: str,
    made: Sequence[Blob | None],
    image_num: int = 0,
    tools: tuple[str, ...] = (),
    given: Sequence[Blob] = (),
    provenance: Sequence[Mapping[str, Any]] = (),
    finished: bool = True,
) -> Rendered:
    """A rendered document from its text: tag i made picture i, or failed where that is None.

    Raises:
        ValueError: there are more pictures than tags.
    """
    tags = [tag for tag in parse(text) if isinstance(tag, Call | Invalid)]
    if len(made) > len(tags):
        raise ValueError(f"{len(made)} pictures for {len(tags)} tags in the text")
    calls = []
    for i, tag in enumerate(tags):
        blob = made[i] if i < len(made) else None
        if isinstance(tag, Invalid):
            calls.append(CallOutcome(tag.source, "", {}, tag.start, tag.end, "invalid", tag.reason))
            continue
        status, reason = ("ok", "") if blob else ("failed", "it made no picture")
        images = (blob.sha256,) if blob else ()
        told = provenance[i] if i < len(provenance) else {}
        calls.append(
            CallOutcome(
                tag.source, tag.description, tag.params, tag.start, tag.end, status, reason, images, dict(told or {})
            )
        )
    blobs = {blob.sha256: blob for blob in (*made, *given) if blob}
    return Rendered(question, text, calls, image_num, tools, tuple(given), blobs, finished)
