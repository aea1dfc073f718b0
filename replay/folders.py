"""Folders that libraries read and write, such as models and checkpoints, at a path or in a bucket.

Libraries want a local folder. For what lies in a bucket there is one under the temp dir: `fetched` before reading,
`written` or `added` around writing. A path stands for itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from replay.storage import S3Storage, StoreError, explained, in_bucket, storage

#: Every model has it. It arrives last and goes first, so that a folder in a bucket that has it is whole.
_MODEL = "config.json"
#: Seconds after which a local copy that nobody asked for again is dropped; who still reads its files keeps them.
_KEPT_S = 24 * 3600.0
#: Files that are sent or fetched at once; up to 100 MB of each are held in memory.
_AT_ONCE = 4
#: Files that the service copies at once.
_COPIES_AT_ONCE = 32


def is_model(url: str | Path) -> bool:
    """Whether a whole model in Hugging Face form lies at `url`."""
    return _MODEL in {f.name for f in storage(url, read_only=True).files("")}


def fetched(url: str) -> str:
    """The folder at `url` as a local path. What is not in a bucket (a path, a model's name on the hub) stays as it is.

    Raises:
        StoreError: it is empty, or cannot be fetched.
    """
    if not in_bucket(url):
        return url
    with explained(f"fetching {url}", passing=()):
        there = _Bucket(url)
        files = there.files()
        if not files:
            raise StoreError(f"there is nothing in {url}")
        key = hashlib.sha256(json.dumps([there.service.endpoint_url, url, files], sort_keys=True).encode()).hexdigest()
        place = _scratch() / key[:32]
        place.mkdir(exist_ok=True)
        os.utime(place)
        _drop_old()
        copy = place / url.rstrip("/").rpartition("/")[2]
        with open(place / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes on a machine, one fetches
            if not copy.exists():
                part = Path(tempfile.mkdtemp(dir=place))
                there.get(files, part)
                part.rename(copy)
    return str(copy)


@contextlib.contextmanager
def written(url: str) -> Iterator[str]:
    """A local folder, not made yet, to write a model into; when the block ends, it takes the place of the one at `url`.

    At a path it does so in one step, so that there is a whole model at every moment.

    Raises:
        StoreError: it could not be uploaded; what was at `url` may be gone.
    """
    if not in_bucket(url):
        path = Path(url)
        fresh = path.with_name(f"{path.name}.unfinished")
        shutil.rmtree(fresh, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield str(fresh)
            _replace(fresh, path)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        return
    with _local(url) as fresh:
        yield str(fresh)
        with explained(f"writing {url}", passing=()):
            _Bucket(url).replace(_files(fresh), lambda there, names: there.put(fresh, names))


def copy(url: str, to: str) -> None:
    """Put a copy of the folder at `url` in the place of the one at `to`, both at paths or both in a bucket.

    Raises:
        StoreError: it could not be copied; what was at `to` may be gone.
    """
    if not in_bucket(url):
        with written(to) as fresh:
            shutil.copytree(url, fresh, copy_function=_link)
        return
    with explained(f"copying {url} to {to}", passing=()):
        source = _Bucket(url)
        _Bucket(to).replace([*source.files()], lambda _, names: source.copy(names, to))


@contextlib.contextmanager
def added(url: str) -> Iterator[str]:
    """A local folder to write files of the folder at `url` into; when the block ends, they are there.

    Several processes may do so at a time, each with files of its own.

    Raises:
        StoreError: they could not be uploaded.
    """
    if not in_bucket(url):
        Path(url).mkdir(parents=True, exist_ok=True)
        yield url
        return
    with _local(url) as fresh:
        fresh.mkdir()
        yield str(fresh)
        with explained(f"writing {url}", passing=()):
            _Bucket(url).put(fresh, _files(fresh))


def exists(url: str) -> bool:
    """Whether there is anything at `url`."""
    if in_bucket(url):
        with explained(f"looking for {url}", passing=()):
            return _Bucket(url).exists()
    return Path(url).exists()


def subfolders(url: str) -> list[str]:
    """Names of the folders in a folder, sorted; empty if there is none."""
    if in_bucket(url):
        with explained(f"listing {url}", passing=()):
            return _Bucket(url).folders()
    return sorted(p.name for p in Path(url).iterdir() if p.is_dir()) if Path(url).is_dir() else []


def remove(url: str) -> None:
    """Delete a folder and all that is in it, if it is there."""
    if in_bucket(url):
        with explained(f"deleting {url}", passing=()):
            there = _Bucket(url)
            there.delete([*there.files()])
    else:
        shutil.rmtree(url, ignore_errors=True)


def move(url: str, to: str, sign: str) -> None:
    """Rename a folder that nobody writes to. A move in a bucket that broke off leaves the file `sign` in at most one of
    the two, and where it is the folder is whole.
    """
    with explained(f"moving {url} to {to}", passing=()):
        if not in_bucket(url):
            Path(url).rename(to)
            return
        there = _Bucket(url)
        names = [*there.files()]
        signs, others = [n for n in names if n == sign], [n for n in names if n != sign]
        for part in (others, signs):
            there.copy(part, to)
        for part in (signs, others):
            there.delete(part)


class _Bucket:
    """What lies under a URL of a bucket, by name relative to it."""

    def __init__(self, url: str) -> None:
        self.service, self._root = S3Storage.service(), url.removeprefix("s3://").rstrip("/")

    def files(self) -> dict[str, tuple[int, str]]:
        """Name -> (bytes, ETag), in all depths, sorted."""
        found = self.service.find(self._root, detail=True, refresh=True)
        at = len(self._root) + 1
        return {
            path[at:]: (info["size"], info["ETag"])
            for path, info in sorted(found.items())
            if info["type"] == "file" and path[at:] and not path.endswith("/")  # consoles make empty "folders"
        }

    def exists(self) -> bool:
        return self.service.exists(self._root)

    def folders(self) -> list[str]:
        try:
            found = self.service.ls(self._root, detail=True, refresh=True)
        except FileNotFoundError:
            return []
        return sorted(f["name"].rpartition("/")[2] for f in found if f["type"] == "directory")

    def get(self, files: dict[str, tuple[int, str]], folder: Path) -> None:
        """Download files of these sizes into a folder."""
        local = [folder / name for name in files]
        self.service.get([self._path(name) for name in files], list(map(str, local)), batch_size=_AT_ONCE)
        for path, (name, (size, _)) in zip(local, files.items(), strict=True):
            if (got := path.stat().st_size) != size:
                raise OSError(f"{name} has {size} bytes, {got} arrived")

    def put(self, folder: Path, names: Sequence[str]) -> None:
        """Upload files of a folder."""
        if names:
            local = [str(folder / name) for name in names]
            self.service.put(local, [self._path(name) for name in names], batch_size=_AT_ONCE)

    def copy(self, names: Sequence[str], to: str) -> None:
        """Copy within the service."""
        if names:
            there = [f"{to.removeprefix('s3://')}/{name}" for name in names]
            self.service.copy([self._path(name) for name in names], there, batch_size=_COPIES_AT_ONCE)

    def delete(self, names: Sequence[str]) -> None:
        """Raises PermissionError if they stay: the service's answer does not reach us."""
        if names:
            self.service.rm([self._path(name) for name in names])
            if left := self.files().keys() & set(names):
                raise PermissionError(f"{len(left)} files cannot be deleted, such as {min(left)}")

    def replace(self, names: Sequence[str], bring: Callable[[_Bucket, Sequence[str]], None]) -> None:
        """Put the model of these files, which `bring` brings, in the place of the one that is here."""
        old = self.files()
        self.delete([name for name in old if name == _MODEL])
        bring(self, [name for name in names if name != _MODEL])
        self.delete([name for name in old if name not in names])
        bring(self, [name for name in names if name == _MODEL])

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


@contextlib.contextmanager
def _local(url: str) -> Iterator[Path]:
    """A path under the temp dir that ends as `url` does, for as long as the block runs."""
    _drop_old()
    with tempfile.TemporaryDirectory(dir=_scratch()) as folder:
        yield Path(folder) / url.rstrip("/").rpartition("/")[2]


def _replace(fresh: Path, path: Path) -> None:
    """Put a folder in the place of what is at a path, in one step where the file system can."""
    if not path.exists():
        fresh.rename(path)
    elif not _swapped(fresh, path):
        old = path.with_name(f"{path.name}.replaced")
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        fresh.rename(path)
        shutil.rmtree(old)


def _swapped(a: Path, b: Path) -> bool:
    """Swap two names (renameat2 with RENAME_EXCHANGE, of Linux); False if it cannot be done here."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2
    return swap is not None and swap(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0


def _link(source: str, target: str) -> None:
    """Copy a file; where the file system can, it takes no room."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _scratch() -> Path:
    """Where local copies lie."""
    folder = Path(tempfile.gettempdir()) / f"llmi-folders-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _drop_old() -> None:
    """Drop local copies that nobody asked for again, and what killed processes left."""
    for old in _scratch().iterdir():
        with contextlib.suppress(FileNotFoundError):
            if time.time() - old.stat().st_mtime > _KEPT_S:
                shutil.rmtree(old, ignore_errors=True)


def _files(folder: Path) -> list[str]:
    """Names of all files in a folder, in all depths, sorted."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
