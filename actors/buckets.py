"""Named tensors in buckets of shared memory, which other processes of the node map without a copy.

A bucket lies in an anonymous file (memfd): no folder names it, so it is gone with the last process that has it, however
that ends, and no limit of /dev/shm applies to it. Fresh pages cost ten times what copying into old ones does, so a
writer writes over what nobody reads any more. A reader locks what it reads (flock; the kernel unlocks what a dead
process held) and checks it against the checksum that it was told, since it may have come too late with its lock.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from isal.isal_zlib import crc32  # zlib.crc32, ten times as fast
from torch import Tensor

BUCKET_BYTES = 256 << 20  # of a bucket at most; a larger tensor has a bucket of its own
_NAME = "llmi-weights"
_ALIGNED = 64  # bytes that the place of a tensor is a multiple of
_THREADS = 2  # that check what was read: as many as the smallest machine has cores
_HOT = 1 << 20  # bytes that are copied before their checksum is taken: they are in the cache then


#: Path, and name, dtype, shape and offset of each piece.
Plain: TypeAlias = tuple[str, list[tuple[str, str, list[int], int]]]


class BucketGone(Exception):
    """A bucket does not hold what it held: it was written over, or the process that wrote it has ended."""


@dataclass(frozen=True)
class Piece:
    """A tensor in a bucket: `dtype` is torch's name of it (bfloat16), `offset` its place in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Bucket:
    """`nbytes` that this node's processes can map from `path`; `checksum` is their CRC-32."""

    path: str
    nbytes: int
    checksum: int
    pieces: tuple[Piece, ...]

    def plain(self) -> Plain:
        """What a reader needs, in types that every serialiser knows."""
        return self.path, [(p.name, p.dtype, list(p.shape), p.offset) for p in self.pieces]


class Memory:
    """Shared memory of a writer, of `nbytes`; `bytes` is a tensor over it. Pages are taken when first written."""

    def __init__(self, nbytes: int) -> None:
        self._fd = os.memfd_create(_NAME)
        os.ftruncate(self._fd, nbytes)
        self.bytes = torch.frombuffer(mmap.mmap(self._fd, nbytes), dtype=torch.uint8)
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"

    def lock(self) -> bool:
        """Lock readers out; False if there are some."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def unlock(self) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    def __del__(self) -> None:
        os.close(self._fd)


class Pool:
    """A writer's memory: what was written in the last turn, and what may be written over in the next."""

    def __init__(self) -> None:
        self._last: list[Memory] = []
        self._spare: list[Memory] = []

    @contextmanager
    def turn(self) -> Iterator[Callable[[int], Memory]]:
        """Yields a function that gives memory of at least so many bytes, locked, which nobody reads.

        Until the turn has ended well, what was written in the last one stays as it is.
        """
        taken: list[Memory] = []

        def take(nbytes: int) -> Memory:
            fit = (m for m in self._spare if len(m.bytes) >= nbytes and m.lock())
            memory = next(fit, None)
            if memory is None:
                memory = Memory(nbytes)
                memory.lock()
            else:
                self._spare.remove(memory)
            taken.append(memory)
            return memory

        try:
            yield take
        except BaseException:
            self._spare += taken
            raise
        self._spare, self._last = self._last, taken  # what had readers all the time is freed when they go


def fill(
    take: Callable[[int], Memory], weights: Iterable[tuple[str, Tensor]], most: int = BUCKET_BYTES
) -> list[Bucket]:
    """Copies named tensors, as the iterator yields them, into buckets of at most `most` bytes.

    Raises:
        ValueError: there are none, or two of the same name.
    """
    names: set[str] = set()
    done: list[_Filling] = []
    for name, tensor in weights:
        if name in names:
            raise ValueError(f"the weights hold {name!r} twice")
        names.add(name)
        if not done or not done[-1].fits(tensor):
            if done:
                done[-1].seal()
            done.append(_Filling(take(max(most, tensor.nbytes))))
        done[-1].add(name, tensor)
    if not done:
        raise ValueError("there are no weights to publish")
    done[-1].seal()
    return [filling.bucket() for filling in done]


class _Filling:
    """A bucket while tensors are added. Gaps are zero, so that equal weights have equal checksums."""

    def __init__(self, memory: Memory) -> None:
        self._memory, self._end, self._checksum = memory, 0, 0
        self._pieces: list[Piece] = []

    def fits(self, tensor: Tensor) -> bool:
        return self._start() + tensor.nbytes <= len(self._memory.bytes)

    def add(self, name: str, tensor: Tensor) -> None:
        start, source = self._start(), tensor.detach().contiguous().view(-1).view(torch.uint8)
        self._memory.bytes[self._end : start] = 0
        self._sum_up(start)
        step = _HOT if source.device.type == "cpu" else len(source)  # many small copies from a device are slow
        for part in source.split(max(step, 1)):
            self._memory.bytes[self._end : self._end + len(part)].copy_(part)
            self._sum_up(self._end + len(part))
        self._pieces.append(Piece(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), start))

    def seal(self) -> None:
        """Let readers in."""
        self._memory.unlock()

    def bucket(self) -> Bucket:
        return Bucket(self._memory.path, self._end, self._checksum, tuple(self._pieces))

    def _start(self) -> int:
        return -(-self._end // _ALIGNED) * _ALIGNED

    def _sum_up(self, end: int) -> None:
        self._checksum = crc32(self._memory.bytes[self._end : end].numpy(), self._checksum)
        self._end = end


class Reader:
    """Maps buckets, and remembers the maps of two turns: a writer uses the same memory every other time."""

    def __init__(self) -> None:
        self._maps: list[dict[tuple[int, int], Tensor]] = [{}, {}]

    def map(self, paths: Iterable[str]) -> list[Tensor]:
        """Read-only bytes of each file, whole.

        Raises:
            BucketGone: one of them is no bucket any more.
        """
        found = [self._map(path) for path in paths]
        self._maps = [self._maps[1], dict(found)]
        return [content for _, content in found]

    def _map(self, path: str) -> tuple[tuple[int, int], Tensor]:
        with _opened(path) as fd:
            stat = os.fstat(fd)
            key = (stat.st_dev, stat.st_ino)
            for known in self._maps:
                if key in known:
                    return key, known[key]
            content = mmap.mmap(fd, stat.st_size, prot=mmap.PROT_READ)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The given buffer is not writable")
                return key, torch.frombuffer(content, dtype=torch.uint8)


def tensors(content: Tensor, pieces: Iterable[Piece]) -> Iterator[tuple[str, Tensor]]:
    """Named tensors over a bucket's bytes."""
    for piece in pieces:
        dtype = getattr(torch, piece.dtype)
        size = dtype.itemsize
        for n in piece.shape:
            size *= n
        yield piece.name, content[piece.offset : piece.offset + size].view(dtype).view(piece.shape)


@contextmanager
def locked(buckets: Sequence[Bucket]) -> Iterator[list[Bucket]]:
    """Keeps buckets from being written over.

    Yields them under paths of this process, so that they can be mapped even if the writer has ended.

    Raises:
        BucketGone: one is being written over, or it is gone.
    """
    with ExitStack() as stack:
        own = []
        for bucket in buckets:
            fd = stack.enter_context(_opened(bucket.path))
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BucketGone(f"{bucket.path} is being written over") from None
            own.append(replace(bucket, path=f"/proc/{os.getpid()}/fd/{fd}"))
        yield own


@contextmanager
def held(reader: Reader, buckets: Sequence[Bucket]) -> Iterator[list[Bucket]]:
    """`locked`, for buckets that hold what they were said to hold. Raises BucketGone if one does not."""
    with locked(buckets) as own:
        contents = [whole[: b.nbytes].numpy() for b, whole in zip(own, reader.map(b.path for b in own), strict=True)]
        with ThreadPoolExecutor(_THREADS) as threads:
            for bucket, checksum in zip(own, threads.map(crc32, contents), strict=True):
                if checksum != bucket.checksum:
                    raise BucketGone(f"{bucket.path} was written over")
        yield own


@contextmanager
def _opened(path: str) -> Iterator[int]:
    """A descriptor of a bucket's file; the process that made it may have ended, and another have its number."""
    try:
        if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
            raise BucketGone(f"{path} belongs to another process by now")
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise BucketGone(f"{path} cannot be opened any more ({error.strerror})") from error
    try:
        yield fd
    finally:
        os.close(fd)
