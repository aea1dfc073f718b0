"""Where a store's files lie: a local folder, or a bucket behind the S3 protocol.

Both keep the same promise: a file that was made with `create` is there whole or not at all, and of two who make the
same name the second is refused. `replace` asks for the first half only. Only a local folder can also grow a file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa


class StoreError(RuntimeError):
    """The store cannot be opened, read or written as asked; the message says what to do."""


class Locked(StoreError):
    """Another one writes to the store."""


class File(NamedTuple):
    """A file of a folder: its name in it, and its size in bytes."""

    name: str
    size: int


class Storage(Protocol):
    """Files by name, `FOLDER/FILE`.

    All methods raise StoreError with a clear sentence where the disk or the service fails.
    """

    url: str
    #: Seconds after which the lock of an owner that died can be had, at the latest.
    PATIENCE_S: float

    def check(self) -> None:
        """StoreError if nothing could be written here: no such bucket, no credentials, a read-only folder."""

    def files(self, folder: str) -> list[File]:
        """Sorted by name; empty if there is no such folder."""

    def create(self, name: str, data: bytes | pa.Buffer) -> None:
        """Write a whole file, durably. FileExistsError if the name is taken (by other bytes)."""

    def replace(self, name: str, data: bytes | pa.Buffer) -> None:
        """Write a whole file, durably, over what was there."""

    def map(self, name: str) -> pa.Buffer:
        """The bytes of a file, memory-mapped. They stay readable when the file is deleted."""

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""

    def lock(self) -> None:
        """Become the only writer, or raise Locked with the name of the other one."""

    def unlock(self) -> None:
        """Let another one write."""


def storage(url: str | Path, read_only: bool = False) -> Storage:
    """The storage behind `s3://BUCKET/PATH`, `file://PATH` or a path.

    Raises:
        StoreError: no such place (`read_only`), or it cannot be made or reached.
    """
    text = str(url)
    if in_bucket(text):
        return S3Storage(text.rstrip("/"))
    return LocalStorage(Path(text.removeprefix("file://")).expanduser().absolute(), read_only)


def in_bucket(url: str) -> bool:
    return url.startswith("s3://")


def me() -> str:
    """This process, as the lock names it."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def lock(place: Storage, tell: Callable[[str], None] = lambda text: None) -> None:
    """`place.lock()`, with patience: an owner that died a moment ago does not hold it for long.

    Args:
        tell: hears once what is waited for.

    Raises:
        Locked: its owner lives.
    """
    deadline, told = time.monotonic() + place.PATIENCE_S, False
    while True:
        try:
            return place.lock()
        except Locked as error:
            if time.monotonic() > deadline:
                raise
            if not told:
                tell(f"waiting {place.PATIENCE_S:g} s: {error}")
                told = True
        time.sleep(0.5)


class LocalStorage:
    """A folder. Only one process at a time may write; any may read."""

    PATIENCE_S = 10.0

    def __init__(self, root: Path, read_only: bool = False) -> None:
        self.root, self.url = root, str(root)
        self._lock: int | None = None
        if read_only:
            return
        with explained(f"the store {root}"):
            root.mkdir(parents=True, exist_ok=True)

    def check(self) -> None:
        there = next(p for p in (self.root, *self.root.parents) if p.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise StoreError(f"{self.root} cannot be written: {there} is no folder that takes files; choose another")

    def files(self, folder: str) -> list[File]:
        with explained(f"the store {self.root}"):
            found = []
            with contextlib.suppress(FileNotFoundError):
                for entry in os.scandir(self.root / folder):
                    with contextlib.suppress(FileNotFoundError):  # deleted while we look
                        if entry.is_file() and not entry.name.endswith(".tmp"):
                            found.append(File(entry.name, entry.stat().st_size))
        return sorted(found)

    def create(self, name: str, data: bytes | pa.Buffer) -> None:
        path = self.root / name
        with explained(f"writing {path}"), _written_beside(path, data) as tmp:
            try:
                os.link(tmp, path)  # unlike a rename, it is refused where the name is taken
            except FileExistsError:
                if path.read_bytes() != bytes(memoryview(data)):
                    raise

    def replace(self, name: str, data: bytes | pa.Buffer) -> None:
        path = self.root / name
        with explained(f"writing {path}"), _written_beside(path, data) as tmp:
            os.rename(tmp, path)

    def finish(self, name: str, end: int, rest: pa.Buffer, final: str) -> None:
        """Put other bytes behind the first `end` of a file, and give it its final name."""
        path = self.root / name
        with explained(f"writing {path}"):
            os.truncate(path, end)
            with open(path, "ab") as f:
                f.write(rest)
                f.flush()
                os.fsync(f.fileno())
            os.rename(path, self.root / final)
            sync_folder(path.parent)

    def map(self, name: str) -> pa.Buffer:
        return _mapped(self.root / name)

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), explained(f"deleting {self.root / name}"):
            (self.root / name).unlink()

    def lock(self) -> None:
        with explained(f"the store {self.root}"):
            fd = os.open(self.root / "LOCK", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(fd, 200).decode() or "another process"
            os.close(fd)
            raise _taken(self.url, owner) from None
        self._lock = fd
        with explained(f"the store {self.root}"):
            os.ftruncate(fd, 0)
            os.write(fd, me().encode())
            for left in self.root.glob("*/*.tmp"):  # of a life that was killed
                left.unlink()

    def unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class S3Storage:
    """A bucket of any service that speaks S3 and honours `If-None-Match`; credentials from AWS's standard chain.

    An object that was read is kept in a local cache under its ETag, and mapped from there. The lock is an object that
    its owner renews; it is taken over when it was not renewed for `LOCK_S`, or when its owner was a process of this
    machine that is gone. A writer that lost it cannot harm: numbers of segments are taken once only.
    """

    LOCK_S = 60.0
    PATIENCE_S = LOCK_S + 15.0
    CACHE_BYTES = 8 << 30
    #: How often and how long a call is tried, all in all about a minute. (s3fs tries again what these gave up.)
    _CALLS: dict[str, Any] = {
        "connect_timeout": 5,
        "read_timeout": 20,
        "retries": {"mode": "standard", "max_attempts": 5},
    }
    _TRIES = 2

    def __init__(self, url: str) -> None:
        self.url, self._root, self._fs = url, url.removeprefix("s3://"), self.service()
        self._cache = Path(tempfile.gettempdir()) / f"llmi-cache-{os.getuid()}"
        self._cache.mkdir(mode=0o700, exist_ok=True)
        self._renewed = 0.0
        self._held = False
        self._doubtful: dict[str, str] = {}  # files that may have arrived although we were told otherwise -> SHA-256
        owner = {"name": me(), "host": socket.gethostname(), "pid": os.getpid(), "nonce": secrets.token_hex(8)}
        self._claim = json.dumps(owner).encode()

    @classmethod
    def service(cls) -> Any:
        """The service, as a fsspec file system."""
        import s3fs

        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        fs = s3fs.S3FileSystem(endpoint_url=endpoint, use_listings_cache=False, config_kwargs=cls._CALLS)
        fs.retries = cls._TRIES
        return fs

    def check(self) -> None:
        bucket, _, prefix = self._root.partition("/")
        with explained(f"reaching {self.url}"):
            try:
                self._fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1)
            except FileNotFoundError:
                raise _no_bucket(self._root) from None

    def files(self, folder: str) -> list[File]:
        with explained(f"listing {self.url}/{folder}"):
            try:
                found = self._fs.ls(f"{self._root}/{folder}", detail=True, refresh=True)
            except FileNotFoundError:
                return []
        return sorted(File(f["name"].rsplit("/", 1)[1], f["size"]) for f in found if f["type"] == "file")

    def create(self, name: str, data: bytes | pa.Buffer) -> None:
        self._renew()
        path, whole = f"{self._root}/{name}", data.to_pybytes() if isinstance(data, pa.Buffer) else data
        with explained(f"writing {self.url}/{name}"):
            try:
                self._create(path, whole)
            except FileExistsError:
                raise
            except Exception:
                self._doubtful[path] = hashlib.sha256(whole).hexdigest()
                raise
        self._doubtful.pop(path, None)

    def _create(self, path: str, whole: bytes) -> None:
        try:
            self._fs.pipe_file(path, whole, mode="create")
        except FileExistsError:
            there = self._fs.cat_file(path)
            if there == whole:  # our own first try went through, and only its answer was lost
                return
            if hashlib.sha256(there).hexdigest() != self._doubtful.get(path):
                raise
            self._fs.rm_file(path)  # of a call that we reported as failed
            self._fs.pipe_file(path, whole, mode="create")

    def replace(self, name: str, data: bytes | pa.Buffer) -> None:
        with explained(f"writing {self.url}/{name}", passing=()):
            self._fs.pipe_file(f"{self._root}/{name}", bytes(memoryview(data)))

    def map(self, name: str) -> pa.Buffer:
        path = f"{self._root}/{name}"
        with explained(f"reading {self.url}/{name}", passing=()):
            info = self._fs.info(path, refresh=True)
            key = hashlib.sha256(f"{self._fs.endpoint_url} {path} {info['ETag']}".encode()).hexdigest()
            cached = self._cache / key
            if not cached.exists() or cached.stat().st_size != info["size"]:
                self._make_room(info["size"])
                fd, tmp = tempfile.mkstemp(suffix=".tmp", dir=self._cache)
                os.close(fd)
                self._fs.get_file(path, tmp)
                os.rename(tmp, cached)
        return _mapped(cached)

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), explained(f"deleting {self.url}/{name}"):
            self._fs.rm_file(f"{self._root}/{name}")

    def lock(self) -> None:
        with explained(f"locking {self.url}"):
            try:
                self._create(f"{self._root}/LOCK", self._claim)
            except FileNotFoundError:
                raise _no_bucket(self._root) from None
            except FileExistsError:
                owner, age = self._owner(), self._modified("NOW") - self._modified("LOCK")
                if age < self.LOCK_S and not _gone(owner):
                    raise _taken(self.url, f"{owner['name']} (renewed {age:.0f} s ago)") from None
                self._fs.pipe_file(f"{self._root}/LOCK", self._claim)
        self._held, self._renewed = True, time.monotonic()

    def unlock(self) -> None:
        if self._held:
            self._held = False
            with contextlib.suppress(Exception):  # it runs out by itself
                if self._fs.cat_file(f"{self._root}/LOCK") == self._claim:
                    self.delete("LOCK")

    def _owner(self) -> dict[str, Any]:
        return json.loads(self._fs.cat_file(f"{self._root}/LOCK"))

    def _modified(self, name: str) -> float:
        """When an object was written; `NOW` is written for it, because our clock is not the service's."""
        if name == "NOW":
            self._fs.pipe_file(f"{self._root}/{name}", b"")
        return self._fs.info(f"{self._root}/{name}", refresh=True)["LastModified"].timestamp()

    def _renew(self) -> None:
        if self._held and time.monotonic() - self._renewed > self.LOCK_S / 4:
            with explained(f"locking {self.url}", passing=()):
                if self._fs.cat_file(f"{self._root}/LOCK") != self._claim:
                    raise _taken(self.url, self._owner()["name"])
                self._fs.pipe_file(f"{self._root}/LOCK", self._claim)
            self._renewed = time.monotonic()

    def _make_room(self, size: int) -> None:
        """Drop what was used longest ago; what a reader has mapped stays readable for it."""
        files = sorted((p.stat().st_atime, p.stat().st_size, p) for p in self._cache.iterdir() if p.suffix != ".tmp")
        spare = self.CACHE_BYTES - size - sum(s for _, s, _ in files)
        for _, freed, path in files:
            if spare >= 0:
                return
            path.unlink(missing_ok=True)
            spare += freed


def sync_folder(folder: Path) -> None:
    """Make names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _written_beside(path: Path, data: bytes | pa.Buffer) -> Iterator[str]:
    """A durable file with these bytes in the folder of `path`; after the block the folder is durable and it is gone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, tmp = tempfile.mkstemp(suffix=".tmp", dir=path.parent)
    try:
        with open(fd, "wb") as f:
            os.fchmod(fd, 0o644)  # other users may read
            f.write(data)
            f.flush()
            os.fsync(fd)
        yield tmp
    finally:
        Path(tmp).unlink(missing_ok=True)
    sync_folder(path.parent)


def _mapped(path: Path) -> pa.Buffer:
    try:
        if path.stat().st_size == 0:
            return pa.py_buffer(b"")
        return pa.memory_map(str(path)).read_buffer()
    except OSError as error:
        raise StoreError(f"reading {path} failed: {error}") from error


def taken_over(url: str) -> StoreError:
    return StoreError(f"the store {url} was taken over by another writer; this one stops")


def _no_bucket(root: str) -> StoreError:
    return StoreError(f"there is no bucket {root.partition('/')[0]}; make it first")


def _taken(url: str, owner: str) -> Locked:
    return Locked(f"the store {url} is open in {owner}; stop it first, or use another folder")


def _gone(owner: dict[str, Any]) -> bool:
    if owner["host"] != socket.gethostname():
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


_NO_CREDENTIALS = "; give credentials the way AWS's tools take them: environment, profile or role"
_NO_ANSWER = "; check the network, and AWS_ENDPOINT_URL"
#: What to do, by the name of an error's class: the classes are botocore's, which only a bucket needs.
_HINTS = {
    "NoCredentialsError": _NO_CREDENTIALS,
    "PartialCredentialsError": _NO_CREDENTIALS,
    "PermissionError": "; look at what you, or your credentials, may do there",
    "EndpointConnectionError": _NO_ANSWER,
    "ConnectTimeoutError": _NO_ANSWER,
}


@contextlib.contextmanager
def explained(what: str, passing: tuple[type[Exception], ...] = (FileExistsError, FileNotFoundError)) -> Iterator[None]:
    """Turns what a disk or a service says into one sentence; what is `passing` is for the caller."""
    try:
        yield
    except StoreError:
        raise
    except passing:
        raise
    except Exception as error:
        kind, full = type(error).__name__, getattr(error, "errno", None) == errno.ENOSPC
        hint = "; free some space, then resume" if full else _HINTS.get(kind, "")
        raise StoreError(f"{what} failed: {kind}: {error}{hint}") from error
