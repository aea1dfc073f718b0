"""The run folder `runs/NAME/`, at a path or in a bucket: what is in it. Every file is written whole or not at all."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.config import Config, ConfigError
from cluster.console import say
from replay import folders
from replay.checkpoints import Checkpoints
from replay.storage import storage
from replay.view import wait_until_free

CONFIG, METRICS, SUMMARY, REPORT = "config.yaml", "metrics.jsonl", "summary.json", "report.html"
_ORIGIN, _START = "origin", "start"


class RunFolder:
    """Names and small files of one run.

    Args:
        url: an absolute path, or `s3://BUCKET/PATH`.
    """

    def __init__(self, url: str) -> None:
        self.url, self._files = url, storage(url, read_only=True)
        self.replay, self.start, self.policy = (f"{url}/{name}" for name in ("replay", _START, "policy"))
        self.checkpoints = Checkpoints(f"{url}/checkpoints")
        self._rows: dict[int, dict[str, Any]] | None = None

    def check(self) -> None:
        """StoreError, in one sentence, if nothing could be written here."""
        self._files.check()

    def check_begin(self, config: Config) -> None:
        """ConfigError if a new run here would move aside what it is to begin with."""
        if not self._earlier():
            return
        for key, url in {"policy.path": config.policy.path, "train.store": config.train.store}.items():
            if url and _path(url).is_relative_to(_path(self.url)):
                raise ConfigError(
                    f"{key} {url} lies in {self.url}, which a new run of that name moves aside: give it another name="
                )

    def open(self, config: Config, resume: bool) -> None:
        """Make the folder, or take it up again, once nobody writes to it any more.

        A folder of an earlier run is moved aside (`NAME.old-TIME`), never written over; a cold start alone is kept.

        Raises:
            FileNotFoundError: `resume`, and there is nothing to resume.
            StoreError: it cannot be written, or another process has this run under way.
        """
        if resume and not self.has(CONFIG):
            raise FileNotFoundError(f"nothing to resume in {self.url}; start without --resume")
        wait_until_free(self.replay, say)
        if not resume and self._earlier():
            aside = f"{self.url}.old-{time.strftime('%Y%m%d-%H%M%S')}"
            say(f"moving the earlier run to {aside}")
            folders.move(self.url, aside, CONFIG)
        self.write(CONFIG, config.dump())

    def clone(self, other: RunFolder, config: Config) -> None:
        """Begin anew with another run's committed checkpoint, if it has one, and with a store of its own.

        Args:
            other: the run that is cloned; it may go on meanwhile.
            config: of the clone.
        """
        checkpoint = other.checkpoints.committed()
        self.open(config, resume=False)
        if folders.exists(other.start):
            folders.copy(other.start, self.start)
        if checkpoint is not None:
            self.write(_ORIGIN, str(checkpoint["step"]))
            self.checkpoints.adopt(other.checkpoints, checkpoint)

    def origin(self) -> int:
        """Optimiser steps that the run had behind it when it began here: 0, unless it is a clone."""
        return int(self.read(_ORIGIN)) if self.has(_ORIGIN) else 0

    def has(self, name: str) -> bool:
        return name in {f.name for f in self._files.files("")}

    def read(self, name: str) -> str:
        return self._files.map(name).to_pybytes().decode()

    def write(self, name: str, text: str) -> None:
        self._files.replace(name, text.encode())

    def steps(self) -> list[dict[str, Any]]:
        """Metrics of every optimiser step, in order."""
        if self._rows is None:
            lines = self.read(METRICS).splitlines() if self.has(METRICS) else []
            self._rows = {row["step"]: row for row in map(json.loads, lines)}
        return list(self._rows.values())

    def log(self, row: dict[str, Any]) -> None:
        """Add one optimiser step to metrics.jsonl. It is written anew: nothing in a bucket can grow."""
        self._keep([*self.steps(), row])

    def rewind(self, step: int) -> None:
        """Forget metrics of steps that were not committed."""
        self._keep([row for row in self.steps() if row["step"] <= step])

    def summarise(self, summary: Mapping[str, Any]) -> None:
        self.write(SUMMARY, json.dumps(summary, indent=2) + "\n")

    def _earlier(self) -> bool:
        """Whether there is more here than what `llmi sft` makes."""
        return bool(self._files.files("")) or any(name != _START for name in folders.subfolders(self.url))

    def _keep(self, rows: list[dict[str, Any]]) -> None:
        self._rows = {row["step"]: row for row in rows}
        self.write(METRICS, "".join(map(_line, self._rows.values())))


def _path(url: str) -> Path:
    """A place, to compare with others; a URL of a bucket is a path of its own then."""
    return Path(url.removeprefix("file://")).expanduser().resolve()


def _line(row: Mapping[str, Any]) -> str:
    """One row as strict JSON: what is not finite (a skipped step's norm) becomes null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite) + "\n"
