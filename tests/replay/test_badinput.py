"""Full disks, folders that cannot be written, damaged files: an error in one clear sentence, and nothing is lost."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import replay.log
from replay.record import Blob
from replay.store import Retention, Store, StoreError
from replay.view import View
from tests.replay.rows import Clock, claim, killed, pending, reopen, row, to_scored, train


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay.log, "SEGMENT_BYTES", 4000)


# ---- full disks ----------------------------------------------------------------------------------------------------


class Disk:
    """Every call that needs space fails while it is full; a write may get half of its bytes through."""

    full = False

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr("builtins.open", self._opens(open))
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, self._fails(getattr(os, name)))

    def _fails(self, call: Any) -> Any:
        def failing(*args: Any, **options: Any) -> Any:
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return call(*args, **options)

        return failing

    def _opens(self, call: Any) -> Any:
        def opening(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            if self.full and mode in ("ab", "wb", "w"):
                raise OSError(errno.ENOSPC, "No space left on device")
            return call(file, mode, *args, **options)

        return opening


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_a_full_disk_refuses_puts_and_loses_none(
    local: Store, disk: Disk, small_segments: None, tmp_path: Path
) -> None:
    rng, kept = random.Random(1), []
    for k in range(120):
        disk.full = rng.random() < 0.4
        try:
            assert local.put("pending", pending(f"g{k}", 1)) == ["ok"]
            kept.append(f"g{k}/0")
        except StoreError as error:
            assert "No space left" in str(error)
            disk.full = False
        assert local.find("train") == kept
        if k % 10 == 0:
            disk.full = False
            left = Store(killed(local, tmp_path / f"left{k}"))
            assert left.find("train") == kept
            left.close()
    disk.full = False
    local.put("pending", pending("last", 1))
    assert local.get(kept, ["question"])["question"].to_pylist() == ["q"] * len(kept)
    assert local.follow("watcher", "pending", 1000)[0] == [*kept, "last/0"]
    assert reopen(local).find("train") == [*kept, "last/0"]


def test_a_put_that_fails_in_the_background_says_so_and_leaves_the_others_alone(local: Store, disk: Disk) -> None:
    local.put("pending", pending("a", 3))
    rows = [row("generated", f"a/{k}", versions=[1]) for k in range(3)]
    disk.full = True
    failing = local.put_soon("generated", rows[0])
    with pytest.raises(StoreError, match="No space left"):
        local.put("generated", rows[1])
    disk.full = False
    assert local.put("generated", rows[2]) == ["ok"]
    with pytest.raises(StoreError, match="No space left"):
        failing.answers()
    assert local.put("generated", rows[0]) == local.put("generated", rows[1]) == ["ok"]
    assert reopen(local).counts() == {"generated": 3}


def test_what_other_logs_commit_does_not_pass_over_an_open_segment(
    local: Store, small_segments: None, tmp_path: Path
) -> None:
    local.put("pending", pending("a", 200))
    for k in range(100):
        local.put("generated", row("generated", f"a/{k}", versions=[1]))
    local.put("rendered", row("rendered", "a/0"))
    left = Store(killed(local, tmp_path / "left"))
    assert left.counts() == local.counts() == {"pending": 100, "generated": 99, "rendered": 1}


def test_a_store_whose_disk_fills_up_while_it_closes_comes_back(local: Store, disk: Disk, tmp_path: Path) -> None:
    local.put("pending", pending())
    disk.full = True
    with pytest.raises(StoreError, match="No space left"):
        local.close()
    disk.full = False
    assert Store(killed(local, tmp_path / "left")).counts() == {"pending": 2}


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", folder]).returncode:
        pytest.skip("leave: mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_real_disk_that_is_full_works_again_when_there_is_space(tiny_disk: Path) -> None:
    ballast = tiny_disk / "ballast"
    ballast.write_bytes(bytes(200_000))
    store, kept = Store(tiny_disk / "replay"), []
    with pytest.raises(StoreError, match=r"free some space, then resume"):
        for k in range(1000):
            store.put("pending", pending(f"g{k}", 10), [Blob(bytes([k % 256]) * 5000)])
            kept.append(f"g{k}")
    assert kept
    with pytest.raises(StoreError, match="No space left"):
        store.put("pending", pending("big", 1), [Blob(bytes(500_000))])
    ballast.unlink()
    assert store.put("pending", pending("after", 1)) == ["ok"]
    names = [f"{g}/{k}" for g in kept for k in range(10)]
    assert store.find("train") == [*names, "after/0"]
    store = reopen(store)
    assert store.find("train") == [*names, "after/0"] and store.lost("train") == 0


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="file"):
        Store(tmp_path / "file" / "replay")


def test_a_read_only_disk_can_be_read_and_not_written(tiny_disk: Path) -> None:
    store = Store(tiny_disk / "replay")
    store.put("pending", pending())
    store.close()
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    with pytest.raises(StoreError, match="Read-only file system"):
        Store(tiny_disk / "replay")
    assert View(tiny_disk / "replay").find("train") == ["g0/0", "g0/1"]


# ---- damage --------------------------------------------------------------------------------------------------------


def filled(store: Store) -> Path:
    """A closed store with something in every log."""
    picture = Blob(b"picture" * 99)
    train(store, "a", given=[picture.sha256])
    store.put("pending", pending("b", given=[picture.sha256]), [picture])
    to_scored(store, "b/0")
    store.advance("watcher", "scored", 1)
    store.close()
    return Path(str(store.root))


def read_all(store: Store | View) -> None:
    names = store.find("train")
    store.get(names, ["question", "text", "versions", "reward", "calls", "components"]).to_pylist()
    store.ends("train")
    store.lost("train")


LOGS = ["pending", "generated", "rendered", "scored", "ended", "cursors", "blobs"]


@pytest.mark.parametrize("log", LOGS)
def test_a_segment_that_is_missing_or_cut_short_is_named(local: Store, log: str) -> None:
    folder = filled(local)
    [segment] = (folder / log).glob("*.arrow")
    os.truncate(segment, segment.stat().st_size - 1)
    with pytest.raises(StoreError, match=rf"{log}/{segment.name} has \d+ bytes, .*; restore it from a copy"):
        Store(folder)
    segment.unlink()
    with pytest.raises(StoreError, match=rf"{log}/{segment.name} is missing, .*; restore it from a copy"):
        Store(folder)
    with pytest.raises(StoreError, match="is missing"):
        View(folder)


def test_a_flipped_bit_in_a_manifest_is_an_error(local: Store) -> None:
    folder = filled(local)
    newest = sorted((folder / "manifest").iterdir())[-1]
    sound, rng = newest.read_bytes(), random.Random(1)
    for _ in range(200):
        data = bytearray(sound)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        newest.write_bytes(data)
        with pytest.raises(StoreError, match=r"manifest|format"):
            View(folder)
    for cut in (0, 1, len(sound) // 2, len(sound) - 1):
        newest.write_bytes(sound[:cut])
        with pytest.raises(StoreError, match="damaged"):
            Store(folder)
    newest.write_bytes(sound)
    assert Store(folder).counts() == {"trained": 2, "scored": 1, "pending": 1}


FLIPS = """
import random, sys
from pathlib import Path
from replay.store import Store, StoreError
from tests.replay.test_badinput import LOGS, read_all

folder, rng, found = Path(sys.argv[1]), random.Random(1), 0
for n in range(int(sys.argv[2])):
    [segment] = (folder / LOGS[n % len(LOGS)]).glob("*.arrow")
    sound = segment.read_bytes()
    data = bytearray(sound)
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    segment.write_bytes(data)
    try:
        read_all(Store(folder, read_only=True))
        assert segment.parent.name == "blobs", segment  # in the bytes of a picture, which are its name
    except StoreError as error:
        assert str(segment) in str(error) and "restore it from a copy" in str(error)
        found += 1
    segment.write_bytes(sound)
print(found)
"""


def test_a_flipped_bit_in_a_sealed_segment_is_an_error_that_names_it(local: Store) -> None:
    command = [sys.executable, "-c", FLIPS, str(filled(local)), "140"]  # apart, because bad offsets may kill a process
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 120


@pytest.mark.parametrize("log", ["pending", "generated"])
def test_a_flipped_bit_in_an_open_segment_is_an_error_that_names_it(local: Store, tmp_path: Path, log: str) -> None:
    for group in "abc":
        local.put("pending", pending(group))
        local.put("generated", row("generated", f"{group}/0", versions=[1]))
    left = killed(local, tmp_path / "left")
    [segment] = (left / log).glob("*.arrows")
    sound, rng = segment.read_bytes(), random.Random(1)
    end = int((left / log / f"{segment.name[:8]}.crc").read_text().split()[-2])
    for _ in range(30):
        data = bytearray(sound)
        data[rng.randrange(end)] ^= 1 << rng.randrange(8)
        segment.write_bytes(data)
        with pytest.raises(StoreError, match=rf"{log}/{segment.name} is damaged"):
            View(left)


def test_checksums_that_a_power_loss_took_cost_nothing(local: Store, tmp_path: Path) -> None:
    for group in "abc":
        local.put("pending", pending(group))
    whole = (Path(str(local.root)) / "pending" / "00000000.crc").read_bytes()
    for n, sums in enumerate([b"", whole[:5], whole[:-1], whole[: len(whole) // 2], bytes(len(whole))]):
        left = killed(local, tmp_path / f"left{n}")
        (left / "pending" / "00000000.crc").write_bytes(sums)
        assert len(Store(left).find("train")) == 6
    left = killed(local, tmp_path / "gone")
    (left / "pending" / "00000000.crc").unlink()
    assert len(Store(left).find("train")) == 6


# ---- odd sizes, odd times ------------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_a_picture_of_200_mb_is_kept(local: Store) -> None:
    big = Blob(random.Random(1).randbytes(1 << 20) * 200)
    local.put("pending", pending(given=[big.sha256]), [big])
    assert local.blobs([big.sha256])[big.sha256].data == big.data
    local = reopen(local)
    assert local.blobs([big.sha256])[big.sha256].data == big.data


def test_leases_do_not_care_for_the_wall_clock(local: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    local.put("pending", pending())
    assert claim(local, "pending") is not None
    for now in (0.0, 1e12):
        monkeypatch.setattr("time.time", lambda now=now: now)
        monkeypatch.setattr("time.time_ns", lambda now=now: int(now * 1e9))
        assert claim(local, "pending") is None
    clock.now = 11
    assert claim(local, "pending") is not None


def test_a_reader_that_comes_while_the_store_is_written_finds_it_whole(local: Store, small_segments: None) -> None:
    for k in range(30):
        train(local, f"g{k}", samples=1)
        if k % 7 == 6:
            local.collect(Retention(max_bytes=local.bytes() // 2), committed_step=1)
        view = View(local.root)
        assert view.groups("train") == {"accepted": k + 1, "ended": k + 1, "trained": k + 1}
        assert view.lost("train") == 0
        read_all(view)


def test_what_a_killed_process_was_writing_is_cleared_away(local: Store) -> None:
    folder = filled(local)
    left = folder / "pending" / "tmpabc.tmp"
    left.write_bytes(b"half a segment")
    shutil.copy(left, folder / "manifest" / "tmpdef.tmp")
    Store(folder)
    assert not list(folder.glob("*/*.tmp"))
