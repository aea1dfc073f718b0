from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from actors.buckets import Bucket, BucketGone, Pool, Reader, fill, held, tensors


def some(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {
        "embed": torch.randn(50, 7, dtype=torch.bfloat16),
        "norm": torch.randn(5),
        "scale": torch.randn(()),
        "turned": torch.randn(6, 4).t(),
        "none": torch.empty(0, 3),
        "large": torch.randn(300, 10),
        "ids": torch.arange(9),
    }


def written(pool: Pool, weights: dict[str, Tensor], most: int = 2048) -> list[Bucket]:
    with pool.turn() as take:
        return fill(take, weights.items(), most)


def read(buckets: list[Bucket], reader: Reader) -> dict[str, Tensor]:
    contents = reader.map(b.path for b in buckets)
    return {n: t for b, c in zip(buckets, contents, strict=True) for n, t in tensors(c, b.pieces)}


def test_a_reader_sees_what_was_written_bit_for_bit_without_a_copy() -> None:
    pool, reader, weights = Pool(), Reader(), some()
    buckets = written(pool, weights)
    with held(reader, buckets) as own:
        seen = read(own, reader)
    assert list(seen) == list(weights)
    for name, tensor in weights.items():
        assert seen[name].dtype == tensor.dtype and torch.equal(seen[name], tensor), name
    assert seen["norm"].untyped_storage().data_ptr() == reader.map([buckets[0].path])[0].data_ptr()


def test_buckets_are_capped_and_only_a_larger_tensor_exceeds_the_cap_alone() -> None:
    buckets = written(Pool(), some())
    assert [[p.name for p in b.pieces] for b in buckets] == [
        ["embed", "norm", "scale", "turned", "none"],
        ["large"],
        ["ids"],
    ]
    assert all(b.nbytes <= 2048 or len(b.pieces) == 1 for b in buckets)


def test_weights_are_copied_as_they_are_yielded_and_never_held_together() -> None:
    alive: list[int] = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        import weakref

        refs = []
        for i in range(8):
            tensor = torch.full((256,), float(i))
            refs.append(weakref.ref(tensor))
            yield str(i), tensor
            del tensor
            alive.append(sum(r() is not None for r in refs))

    with Pool().turn() as take:
        fill(take, stream(), 2048)
    assert max(alive) <= 1


def test_equal_weights_have_equal_checksums_whatever_the_memory_held_before() -> None:
    pool = Pool()
    first = written(pool, some(1))
    written(pool, some(2))
    again = written(pool, some(1))
    assert [b.checksum for b in first] == [b.checksum for b in again]
    assert [b.path for b in first] == [b.path for b in again], "memory is used again"
    assert [b.checksum for b in written(Pool(), some(2))] != [b.checksum for b in first]


def test_what_is_read_is_not_written_over_and_memory_is_bounded() -> None:
    pool, reader, weights = Pool(), Reader(), some(0)
    buckets = written(pool, weights)
    with held(reader, buckets) as own:
        for seed in range(1, 6):
            written(pool, some(seed))
        assert torch.equal(read(own, Reader())["large"], weights["large"])
    paths = {b.path for seed in range(6) for b in written(pool, some(seed))}
    assert len(paths) == 2 * len(buckets)


def test_a_reader_that_comes_too_late_is_told() -> None:
    pool, reader = Pool(), Reader()
    buckets = written(pool, some(0))
    written(pool, some(1))
    written(pool, some(2))
    with pytest.raises(BucketGone, match="was written over"), held(reader, buckets):
        pass


def test_a_reader_that_comes_in_the_middle_is_told() -> None:
    pool = Pool()
    buckets = written(pool, some(0))
    written(pool, some(1))

    def stream() -> Iterator[tuple[str, Tensor]]:
        yield "embed", torch.zeros(3)
        with pytest.raises(BucketGone, match="is being written over"), held(Reader(), buckets):
            pass

    with pool.turn() as take:
        fill(take, stream(), 2048)


def test_a_turn_that_fails_leaves_the_last_one_as_it_was() -> None:
    pool, reader, weights = Pool(), Reader(), some(1)
    buckets = written(pool, weights)

    def stream() -> Iterator[tuple[str, Tensor]]:
        yield "embed", torch.zeros(3)
        raise ZeroDivisionError

    for _ in range(3):
        with pytest.raises(ZeroDivisionError), pool.turn() as take:
            fill(take, stream(), 2048)
    with held(reader, buckets) as own:
        assert torch.equal(read(own, reader)["embed"], weights["embed"])


@pytest.mark.parametrize(
    ("weights", "message"), [([], "no weights"), ([("a", torch.ones(1)), ("a", torch.ones(2))], "'a' twice")]
)
def test_no_weights_and_names_that_come_twice_are_refused(weights: list[tuple[str, Tensor]], message: str) -> None:
    with pytest.raises(ValueError, match=message), Pool().turn() as take:
        fill(take, weights)


WRITER = """
import sys, time, torch
from actors.buckets import Pool, fill
with Pool().turn() as take:
    [bucket] = fill(take, [("w", torch.ones(1 << 20))], 4 << 20)
print(bucket.path, bucket.nbytes, bucket.checksum, flush=True)
time.sleep(60)
"""


def test_a_writers_death_frees_what_nobody_reads_and_the_readers_memory_stays() -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    path, nbytes, checksum = writer.stdout.readline().split()
    bucket, reader = Bucket(path, int(nbytes), int(checksum), ()), Reader()
    with held(reader, [bucket]) as own:
        writer.send_signal(signal.SIGKILL)
        writer.wait(10)
        [content] = Reader().map(b.path for b in own)
        assert bool((content.view(torch.float32) == 1).all())
    with pytest.raises(BucketGone, match="cannot be opened any more"), held(reader, [bucket]):
        pass


def test_a_file_that_is_no_bucket_is_never_opened() -> None:
    ours, _ = os.pipe()
    with pytest.raises(BucketGone, match="belongs to another process"):
        Reader().map([f"/proc/self/fd/{ours}"])
