"""What the service keeps: finished documents, and their pictures under names that cannot be guessed."""

from __future__ import annotations

import contextlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Iterator
from typing import Any

from agent.export import EXTENSIONS
from replay.record import Blob
from replay.storage import Storage, StoreError, storage

_NAME = re.compile(r"[0-9a-f]{5}-[0-9a-f]{64}\.(png|jpg|webp|gif)")
_ID = re.compile(r"[0-9a-f]{32}")
_DAY_S = 86400.0
MIMES = {extension: mime for mime, extension in EXTENSIONS.items()}


class Files:
    """Documents and pictures under a folder, a path or `s3://...`.

    A picture's name is the day, as five hexadecimal digits, and the HMAC of its SHA-256 under a secret of this folder:
    equal pictures are stored once a day, and whoever knows a picture but not the secret cannot tell whether it is here.

    Args:
        url: the folder.
        keep_s: seconds for which anything is kept.
    """

    def __init__(self, url: str, keep_s: float) -> None:
        self._storage: Storage = storage(url)
        self._keep_s = keep_s
        self._secret = self._lasting_secret()
        self._there: set[str] = set()

    def put_picture(self, blob: Blob) -> str:
        """Store a picture; returns its name."""
        content = hmac.digest(self._secret, bytes.fromhex(blob.sha256), "sha256").hex()
        name = f"{_day(time.time()):05x}-{content}{EXTENSIONS[blob.mime]}"
        if name not in self._there:
            self._storage.replace(f"images/{name}", blob.data)
            self._there.add(name)
        return name

    def picture(self, name: str) -> Blob | None:
        """The picture of a name, or None."""
        if not _NAME.fullmatch(name):
            return None
        data = self._read(f"images/{name}")
        return None if data is None else Blob(data, MIMES[name[name.index(".") :]])

    def put_document(self, identity: str, row: dict[str, Any], hidden: dict[str, Any]) -> None:
        """Store a document, or what became of it; `hidden` is what is told to nobody, its `owner` above all."""
        content = json.dumps({"row": row, "hidden": hidden}, ensure_ascii=False)
        self._storage.replace(f"documents/{identity}.json", content.encode())

    def document(self, identity: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """A stored document and what is hidden of it, or None."""
        if not _ID.fullmatch(identity):
            return None
        data = self._read(f"documents/{identity}.json")
        if data is None:
            return None
        stored = json.loads(data)
        return stored["row"], stored["hidden"]

    def documents(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """All of them, the oldest first."""
        for file in sorted(self._storage.files("documents"), key=lambda f: f.name):
            if (found := self.document(file.name.removesuffix(".json"))) is not None:
                yield found

    def rate(self, identity: str, feedback: dict[str, Any]) -> None:
        """Keep what a reader thinks of a stored document."""
        if (found := self.document(identity)) is not None:
            self.put_document(identity, found[0] | {"feedback": feedback}, found[1])

    def forget(self, identity: str) -> None:
        """Delete a document. Its pictures, which others may show too, go when they are old."""
        self._storage.delete(f"documents/{identity}.json")

    def sweep(self) -> None:
        """Delete what is older than `keep_s`; the names tell."""
        oldest = time.time() - self._keep_s
        for file in self._storage.files("documents"):
            if int(file.name[:8], 16) < oldest:
                self._storage.delete(f"documents/{file.name}")
        for file in self._storage.files("images"):
            if int(file.name[:5], 16) < _day(oldest):
                self._storage.delete(f"images/{file.name}")
                self._there.discard(file.name)

    def _read(self, name: str) -> bytes | None:
        try:
            return bytes(self._storage.map(name))
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise

    def _lasting_secret(self) -> bytes:
        with contextlib.suppress(FileExistsError):
            self._storage.create("secret", secrets.token_bytes(32))
        return bytes(self._storage.map("secret"))


def new_id() -> str:
    """A name for a document that cannot be guessed, and tells when it was begun."""
    return f"{int(time.time()):08x}{secrets.token_hex(12)}"


def _day(at: float) -> int:
    return int(at / _DAY_S)
