"""The trajectory record: one row a trajectory and stage, the closed set of statuses, and the moves between them.

A trajectory is one sample of one prompt. A *group* is all samples of one prompt. Each stage appends its own
columns only; `Store.get` joins them. Nothing here knows of Ray, engines or models.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import StrEnum
from typing import cast

import pyarrow as pa


class Status(StrEnum):
    """Where a trajectory stands. The first four are the stages that put rows; the others are ends."""

    PENDING = "pending"
    GENERATED = "generated"
    RENDERED = "rendered"
    SCORED = "scored"
    TRAINED = "trained"
    DROPPED_DATA = "dropped_data"
    DROPPED_FILTERED = "dropped_filtered"
    SET_ASIDE_JUDGE = "set_aside_judge"
    REQUEUED = "requeued"


_FAILURES = {Status.DROPPED_DATA, Status.REQUEUED}

#: The only allowed moves. A put or an ack that asks for another one is `stale` and changes nothing.
MOVES: dict[Status, frozenset[Status]] = {
    Status.PENDING: frozenset({Status.GENERATED, Status.DROPPED_DATA}),
    Status.GENERATED: frozenset({Status.RENDERED} | _FAILURES),
    Status.RENDERED: frozenset({Status.SCORED, Status.SET_ASIDE_JUDGE} | _FAILURES),
    Status.SCORED: frozenset({Status.TRAINED, Status.DROPPED_FILTERED} | _FAILURES),
    Status.REQUEUED: frozenset({Status.PENDING}),
    Status.TRAINED: frozenset(),  # (a rewind to the committed step voids it)
    Status.DROPPED_DATA: frozenset(),
    Status.DROPPED_FILTERED: frozenset(),
    Status.SET_ASIDE_JUDGE: frozenset(),
}

#: Stages that put rows, in order; each has a log of its own. Ends are kept in one more log, `ended`.
STAGES = (Status.PENDING, Status.GENERATED, Status.RENDERED, Status.SCORED)
#: Statuses that a trajectory never leaves.
ENDS = frozenset(s for s, moves in MOVES.items() if not moves)
#: A group whose samples are all in one of these is complete.
TERMINAL = ENDS | {Status.SCORED}

_VERSION_BITS = 20


def version(incarnation: int, n: int) -> int:
    """A policy version: `n` optimiser steps, in the `incarnation`-th life of the run. Never used twice."""
    return incarnation << _VERSION_BITS | n


def incarnation(packed: int) -> int:
    return packed >> _VERSION_BITS


def updates(packed: int) -> int:
    """Optimiser steps that made this version."""
    return packed & ((1 << _VERSION_BITS) - 1)


def staleness(now: int, then: int) -> int:
    """Optimiser steps between two versions; a version of an abandoned life that was ahead counts as fresh."""
    return updates(now) - updates(then)


_KEY = [
    ("trajectory", pa.string()),  # "GROUP/SAMPLE"
    ("group", pa.string()),
    ("attempt", pa.int16()),  # grows by one with every requeue
    ("turn", pa.int16()),
]

CALL = pa.struct(
    [
        ("source", pa.string()),
        ("description", pa.string()),
        ("params", pa.string()),  # JSON
        ("start", pa.int64()),  # character offsets of the tag in `text`
        ("end", pa.int64()),
        ("status", pa.string()),  # ok | failed | invalid
        ("reason", pa.string()),  # why it failed or is invalid; "" when ok
        ("images", pa.list_(pa.string())),  # SHA-256 of each picture made, in order
        ("provenance", pa.string()),  # JSON: title, source, licence, ...
        ("seconds", pa.float64()),
    ]
)

SCHEMAS: dict[str, pa.Schema] = {
    "pending": pa.schema(
        _KEY
        + [
            ("purpose", pa.string()),  # train | the name of an evaluation
            ("order", pa.int64()),  # place in the data order: the cursor
            ("seed", pa.int64()),
            ("question", pa.string()),
            ("given", pa.list_(pa.string())),  # SHA-256 of the user's images
            ("image_num", pa.int16()),  # -1 none, 0 free, 99 at least one, N exactly N
            ("tools", pa.list_(pa.string())),  # required tools
            ("samples", pa.int16()),  # size of the group
        ]
    ),
    "generated": pa.schema(
        _KEY
        + [
            ("prompt_ids", pa.large_list(pa.int32())),
            ("token_ids", pa.large_list(pa.int32())),  # sampled, never re-tokenised
            ("logprobs", pa.large_list(pa.float32())),  # of the sampler, one a token
            ("mask", pa.large_list(pa.uint8())),  # 1 where the policy is charged for the token
            ("versions", pa.large_list(pa.int32())),  # policy version that made the token
            ("text", pa.string()),
            ("finish", pa.string()),  # stop | length
            ("worker", pa.string()),
            ("seconds", pa.float64()),
        ]
    ),
    "rendered": pa.schema(_KEY + [("calls", pa.list_(CALL)), ("finished", pa.bool_()), ("seconds", pa.float64())]),
    "scored": pa.schema(
        _KEY
        + [
            ("reward", pa.float64()),  # what the policy is trained on
            ("reward_strict", pa.float64()),  # the default hybrid with the strict 0/1 rule
            ("accurate", pa.bool_()),  # counts for tool accuracy
            ("components", pa.map_(pa.string(), pa.float64())),
            ("reasons", pa.string()),  # JSON: a judge's score -> why
            ("seconds", pa.float64()),
        ]
    ),
    "ended": pa.schema(
        _KEY
        + [
            ("status", pa.string()),
            ("reason", pa.string()),
            ("step", pa.int64()),  # optimiser step that trained it, -1 otherwise
            ("advantage", pa.float64()),
            ("time", pa.float64()),  # unix seconds
        ]
    ),
    "cursors": pa.schema([("consumer", pa.string()), ("stage", pa.string()), ("row", pa.int64())]),
    "blobs": pa.schema([("sha256", pa.string()), ("mime", pa.string()), ("data", pa.large_binary())]),
}


@dataclass(frozen=True)
class Prompt:
    """One row of a prompt set (LLM-I.md, Data).

    Attributes:
        id: unique within its set.
        question: what the user asks; it never names a tool.
        images: the user's own pictures as encoded bytes, in order; `img_index` counts them first.
        image_num: required images: -1 none allowed, 0 free, 99 at least one, N exactly N.
        tools: names of the required tools, without repetition.
    """

    id: str
    question: str
    images: tuple[bytes, ...] = ()
    image_num: int = 0
    tools: tuple[str, ...] = ()
    meta: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Blob:
    """An encoded picture (PNG, JPEG or WebP); its name is the SHA-256 of its bytes."""

    data: bytes
    mime: str = "image/png"

    @property
    def sha256(self) -> str:
        known = vars(self)  # no `cached_property`: before Python 3.12, one lock of it is that of all blobs
        if "sha256" not in known:
            known["sha256"] = hashlib.sha256(self.data).hexdigest()
        return cast(str, known["sha256"])

    @classmethod
    def named(cls, sha256: str, data: bytes | memoryview, mime: str) -> Blob:
        """One that was hashed already; its data may be a view of bytes."""
        blob = cls(cast(bytes, data), mime)
        vars(blob)["sha256"] = sha256
        return blob
