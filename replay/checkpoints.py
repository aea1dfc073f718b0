"""The checkpoints of a run, and its lives: which life may commit, and what counts.

Each life of a run takes a number that no other ever has, by making the file `lives/NUMBER`. Only the newest life
commits: one that was cut off, and taken for dead, finds that out before it can do harm. Folders of checkpoints are
named after step and life, so that no two lives write into the same. `manifest.json` names the one that counts; it is
written last and whole.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from replay import folders
from replay.storage import StoreError, me, storage

_LIVES, _MANIFEST = "lives", "manifest.json"


class Checkpoints:
    """At a path or in a bucket.

    Args:
        url: of their folder.
    """

    def __init__(self, url: str) -> None:
        self.url, self._files = url, storage(url, read_only=True)

    def begin(self) -> int:
        """Count this life of the run; the first is 0. From now on no earlier one commits."""
        who = json.dumps({"process": me(), "time": time.time(), "nonce": secrets.token_hex(8)}).encode()
        n = self._newest() + 1
        while True:
            try:
                self._files.create(f"{_LIVES}/{n:06d}", who)
                return n
            except FileExistsError:
                n += 1

    def committed(self) -> dict[str, Any] | None:
        """The manifest of the checkpoint that counts, or None."""
        if _MANIFEST not in {f.name for f in self._files.files("")}:
            return None
        return json.loads(self._files.map(_MANIFEST).to_pybytes())

    @contextmanager
    def writing(self, tag: str) -> Iterator[tuple[str, str]]:
        """Folder and tag to save a checkpoint, or one rank's part of it, with; it is in place when the block ends."""
        with folders.added(f"{self.url}/{tag}") as folder:
            yield _split(folder)

    def fetched(self, tag: str) -> tuple[str, str]:
        """Folder and tag to load a checkpoint with."""
        return _split(folders.fetched(f"{self.url}/{tag}"))

    def commit(self, manifest: Mapping[str, Any], incarnation: int) -> None:
        """Make a checkpoint the one that counts; every part of it is in place.

        Raises:
            StoreError: a later life has taken the run up.
        """
        if (newest := self._newest()) != incarnation:
            raise StoreError(f"life {newest} has taken up the run of {self.url}; this one, {incarnation}, stops")
        self._files.replace(_MANIFEST, json.dumps(manifest).encode())

    def adopt(self, other: Checkpoints, manifest: Mapping[str, Any]) -> None:
        """Begin, before the first life, with a checkpoint of another run."""
        folders.copy(f"{other.url}/{manifest['tag']}", f"{self.url}/{manifest['tag']}")
        self._files.replace(_MANIFEST, json.dumps({**manifest, "best": None}).encode())

    def tags(self) -> list[str]:
        """Tags of all checkpoints, also those that were never committed, oldest first."""
        return [name for name in folders.subfolders(self.url) if name != _LIVES]

    def keep(self, newest: int, best: str) -> None:
        """Remove all but the newest so many and the best."""
        for tag in self.tags()[:-newest]:
            if tag != best:
                folders.remove(f"{self.url}/{tag}")

    def _newest(self) -> int:
        """Number of the newest life, -1 if there was none."""
        return max((int(f.name) for f in self._files.files(_LIVES)), default=-1)


def _split(folder: str) -> tuple[str, str]:
    path = Path(folder)
    return str(path.parent), path.name
