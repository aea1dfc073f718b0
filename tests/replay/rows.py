"""Rows, and the store's verbs with the defaults that tests want."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa

from replay.record import SCHEMAS
from replay.store import Store


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def table(stage: str, rows: list[dict[str, Any]]) -> pa.Table:
    filled = [{n: None for n in SCHEMAS[stage].names} | {"attempt": 0, "turn": 0} | row for row in rows]
    return pa.Table.from_pylist(filled, SCHEMAS[stage])


def pending(group: str = "g0", samples: int = 2, purpose: str = "train", **values: object) -> pa.Table:
    common = {"group": group, "purpose": purpose, "question": "q"} | values
    return table("pending", [{"trajectory": f"{group}/{i}"} | common for i in range(samples)])


def row(stage: str, trajectory: str, **values: object) -> pa.Table:
    return table(stage, [{"trajectory": trajectory, "group": trajectory.split("/")[0]} | values])


def to_scored(store: Store, trajectory: str, at: int = 0) -> None:
    assert store.put("generated", row("generated", trajectory, versions=[at, at + 1], text="t")) == ["ok"]
    assert store.put("rendered", row("rendered", trajectory)) == ["ok"]
    assert store.put("scored", row("scored", trajectory, reward=1.0)) == ["ok"]


def claim(store: Store, stage: str, **options: Any) -> Any:
    defaults: dict[str, Any] = {"limit": 9, "lease_s": 10, "columns": []}
    return store.claim(stage, **(defaults | options))


def train(store: Store, group: str, step: int = 1, samples: int = 2, **values: Any) -> None:
    """Take a new group through all stages to its end."""
    store.put("pending", pending(group, samples, **values))
    for k in range(samples):
        to_scored(store, f"{group}/{k}")
    while got := claim(store, "scored", by_group=True):
        store.ack(got.token, {t: ("trained", "") for t in got.trajectories}, step=step)


def reopen(store: Store, clock: Clock | None = None) -> Store:
    store.close()
    return Store(store.root, clock or Clock())


def killed(store: Store, to: Path) -> Path:
    """The folder as a process that dies now leaves it."""
    return Path(shutil.copytree(store.root, to))
