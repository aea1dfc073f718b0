"""`verify` finds any flipped bit, missing or doubled row and picture, and only those."""

import random
import shutil
from pathlib import Path

import pytest

from replay.record import Blob
from replay.store import Store
from replay.verify import verify
from replay.view import make_shards, shard_of
from tests.replay.rows import killed, pending, row, to_scored, train


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    store = Store(tmp_path / "sound")
    for k in range(4):
        blob = Blob(bytes([k]) * 300)
        store.put("pending", pending(f"g{k}", given=[blob.sha256]), [blob])
        to_scored(store, f"g{k}/0")
    train(store, "done")
    store.rewind(0)
    killed(store, tmp_path / "open")
    store.close()
    return tmp_path / "sound"


def test_a_sound_store_has_no_problems_whether_closed_or_left_by_a_dead_writer(sound: Path) -> None:
    for folder in (sound, sound.with_name("open")):
        found = verify(folder)
        assert found.problems == [] and found.pictures == 4 and found.rows > 20


@pytest.mark.parametrize("which", ["sound", "open"])
def test_any_flipped_bit_of_a_segment_or_the_manifest_is_found(sound: Path, which: str, tmp_path: Path) -> None:
    rng, folder, broken = random.Random(0), sound.with_name(which), tmp_path / "broken"
    files = [p.relative_to(folder) for p in folder.glob("*/*.arrow*")]
    files.append(max(p.relative_to(folder) for p in folder.glob("manifest/*.json")))
    for _ in range(60):
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(folder, broken)
        path = broken / rng.choice(files)
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        assert verify(broken).problems, f"{path} has a flipped bit"


def test_a_torn_tail_is_a_note_and_a_missing_segment_a_problem(sound: Path) -> None:
    left = sound.with_name("open")
    [path] = (left / "pending").glob("*.arrows")
    path.write_bytes(path.read_bytes()[:-3])
    found = verify(left)
    # the last append of a log is no more than a put that never returned: only what hangs on it is missed
    assert any("ends in an append that never returned" in note for note in found.notes)
    assert all("was never accepted" in p for p in found.problems)
    next((sound / "scored").glob("*.arrow")).unlink()
    assert any("is missing" in p for p in verify(sound).problems)


def test_a_missing_picture_and_one_under_a_wrong_name_are_found(sound: Path) -> None:
    store = Store(sound)
    store.put("pending", pending("x", given=["0" * 64]))
    store.put("pending", pending("y", given=["f" * 64]), [Blob.named("f" * 64, b"right", "image/png")])
    store.close()
    problems = "\n".join(verify(sound).problems)
    assert f"picture {'0' * 64} is named by a row, but is not there" in problems
    assert f"picture {'f' * 64} has other bytes than its name says" in problems


def test_double_commits_are_found(sound: Path) -> None:
    store = Store(sound)
    store._logs["pending"].append(pending("g0"))
    store._logs["scored"].append(row("scored", "g1/0"))
    store._logs["ended"].append(row("ended", "g2/0", status="trained"))
    store._logs["ended"].append(row("ended", "g2/0", status="trained"))
    store._logs["ended"].append(row("ended", "nobody/0", status="trained"))
    store.close()
    problems = "\n".join(verify(sound).problems)
    for sentence in ("g0/0 is 2 times in pending", "g1/0 (attempt 0) is 2 times in scored", "g2/0 ended 2 times"):
        assert sentence in problems
    assert "nobody/0 ended, but was never accepted" in problems


def test_shards_are_checked_together_and_a_group_in_the_wrong_one_is_found(tmp_path: Path) -> None:
    urls = make_shards(str(tmp_path / "replay"), 2)
    stores = [Store(url) for url in urls]
    for k in range(6):
        stores[shard_of(f"g{k}/0", 2)].put("pending", pending(f"g{k}"))
    for store in stores:
        store.close()
    assert verify(tmp_path / "replay").problems == []
    lost = Store(urls[1 - shard_of("g9/0", 2)])
    lost.put("pending", pending("g9"))
    lost.close()
    assert any("g9/0 lies in shard" in p for p in verify(tmp_path / "replay").problems)
