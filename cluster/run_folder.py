"""The run folder `runs/NAME/`: what is in it, and how each part is written so that a crash leaves no half file."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.config import Config


class RunFolder:
    """Paths and small files of one run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.replay, self.checkpoints = root / "replay", root / "checkpoints"
        self.start, self.policy = root / "start", root / "policy"
        self.metrics, self.summary, self.report = root / "metrics.jsonl", root / "summary.json", root / "report.html"

    def open(self, config: Config, resume: bool) -> None:
        """Make the folder, or take it up again.

        A folder of an earlier run is moved aside (`NAME.old-TIME`), never written over.

        Raises:
            FileNotFoundError: `resume`, and there is nothing to resume.
        """
        if resume and not (self.root / "config.yaml").exists():
            raise FileNotFoundError(f"nothing to resume in {self.root}; start without --resume")
        if not resume and self.root.exists():
            self.root.rename(self.root.with_name(f"{self.root.name}.old-{time.strftime('%Y%m%d-%H%M%S')}"))
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write(self.root / "config.yaml", config.dump())

    def next_incarnation(self) -> int:
        """Count this life of the run; the first is 0."""
        path = self.root / "incarnation"
        n = int(path.read_text()) + 1 if path.exists() else 0
        write(path, str(n))
        return n

    def checkpoint(self) -> dict[str, Any] | None:
        """The committed checkpoint's manifest, or None."""
        path = self.checkpoints / "manifest.json"
        return json.loads(path.read_text()) if path.exists() else None

    def steps(self) -> list[dict[str, Any]]:
        """Metrics of every optimiser step, the last word on each."""
        if not self.metrics.exists():
            return []
        rows = (json.loads(line) for line in self.metrics.read_text().splitlines())
        return list({row["step"]: row for row in rows}.values())

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one optimiser step to metrics.jsonl."""
        with open(self.metrics, "a") as f:
            f.write(_line(row))

    def rewind(self, step: int) -> None:
        """Forget metrics of steps that were not committed."""
        kept = [row for row in self.steps() if row["step"] <= step]
        write(self.metrics, "".join(map(_line, kept)))

    def summarise(self, summary: Mapping[str, Any]) -> None:
        write(self.summary, json.dumps(summary, indent=2) + "\n")


def _line(row: Mapping[str, Any]) -> str:
    """One row as strict JSON: what is not finite (a skipped step's norm) becomes null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite) + "\n"


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    tmp = path.with_name(path.name + ".tmp")
    with open(tmp, "w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    tmp.rename(path)
