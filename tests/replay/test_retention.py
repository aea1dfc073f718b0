"""What retention may take, and that nobody notices beyond what is gone."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path

import pytest

from replay.record import Blob
from replay.store import Retention, Store
from replay.view import View
from tests.replay.rows import Clock, claim, pending, reopen, row, table, to_scored, train

ALL = Retention(max_bytes=0)
TEXT = "some words that repeat, some words that repeat. " * 40


def test_without_a_limit_nothing_goes(store: Store) -> None:
    train(store, "a")
    assert store.collect(Retention(), committed_step=9) == 0
    assert store.counts() == {"trained": 2} and store.find("train") == ["a/0", "a/1"]


def test_finished_groups_go_and_are_still_counted(store: Store) -> None:
    for group in "abc":
        train(store, group)
    assert store.collect(ALL, committed_step=1) == 3
    for again in (store, reopen(store)):
        assert again.find("train") == []
        assert again.counts() == again.counts("train") == {"trained": 6}
        assert again.groups("train") == {"accepted": 3, "ended": 3, "trained": 3}
        assert again.cursor("train") == 3 and again.lost("train") == 0
        assert again.purposes() == ["train"]


def test_the_oldest_groups_go_first_and_only_as_many_as_must(local: Store) -> None:
    for k in range(10):
        train(local, f"g{k}")
    local.collect(Retention(), 1)
    assert 0 < (n := local.collect(Retention(max_bytes=local.bytes() * 6 // 10), committed_step=1)) < 10
    assert local.find("train") == [f"g{k}/{i}" for k in range(n, 10) for i in (0, 1)]


def test_age_counts_from_the_end_of_a_group(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.time", lambda: now)
    train(local, "old")
    now = 1600.0
    train(local, "new")
    now = 1700.0
    assert local.collect(Retention(max_age_s=200), committed_step=1) == 1
    assert local.find("train") == ["new/0", "new/1"]


def test_a_clock_that_jumps_back_takes_nothing_too_early(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10_000.0
    monkeypatch.setattr("time.time", lambda: now)
    train(local, "a")
    now = 5.0
    assert local.collect(Retention(max_age_s=60), committed_step=1) == 0
    got = claim(local, "pending")
    assert got is None and local.counts() == {"trained": 2}


def test_unfinished_uncommitted_and_evaluated_groups_stay(store: Store) -> None:
    train(store, "gone", step=1)
    train(store, "uncommitted", step=2)
    store.put("pending", pending("fresh"))
    store.put("pending", pending("half"))
    to_scored(store, "half/0")
    store.put("pending", pending("scored", samples=1))
    to_scored(store, "scored/0")
    store.put("pending", pending("measured", purpose="before"))
    for k in (0, 1):
        to_scored(store, f"measured/{k}")
    got = claim(store, "scored", by_group=True, purpose="before")
    store.ack(got.token, {t: ("trained", "") for t in got.trajectories}, step=1)
    left = set(store.find("train")) | set(store.find("before"))
    assert store.collect(ALL, committed_step=1) == 1
    assert set(store.find("train")) | set(store.find("before")) == left - {"gone/0", "gone/1"}
    store = reopen(store)
    assert store.rewind(1) == 2, "what is not committed can still come back"
    assert store.counts("before") == {"trained": 2}
    assert store.lost("train") == store.lost("before") == 0


def test_pictures_that_a_row_names_stay(store: Store) -> None:
    shared, own, made = Blob(b"shared" * 999), Blob(b"own" * 9999), Blob(b"made" * 999)
    for group, given in {"a": [shared.sha256, own.sha256], "b": [shared.sha256]}.items():
        store.put("pending", pending(group, 1, given=given), [shared, own] if group == "a" else [])
        store.put("generated", row("generated", f"{group}/0", versions=[1]))
        call = {"source": "code", "status": "ok", "images": [made.sha256]}
        store.put("rendered", row("rendered", f"{group}/0", calls=[call] if group == "b" else []), [made])
    store.put("scored", row("scored", "a/0"))
    got = claim(store, "scored", by_group=True)
    store.ack(got.token, {"a/0": ("trained", "")}, step=1)
    assert store.collect(ALL, committed_step=1) == 1
    for again in (store, reopen(store)):
        assert set(again.blobs([shared.sha256, made.sha256])) == {shared.sha256, made.sha256}
        with pytest.raises(KeyError):
            again.blobs([own.sha256])


def test_a_reader_that_has_the_store_open_still_reads_what_went(store: Store) -> None:
    picture = Blob(b"x" * 999)
    train(store, "a", given=[picture.sha256])
    store.put("pending", pending("b", given=[picture.sha256]), [picture])
    view = View(store.root)
    for _ in range(3):  # files are deleted one collection later
        store.collect(ALL, committed_step=1)
        train(store, f"more{_}")
    gc.collect()
    assert view.find("train") == ["a/0", "a/1", "b/0", "b/1"]
    assert view.get(["a/1"], ["text", "reward"]).to_pylist()[0]["text"] == "t"
    assert view.blobs([picture.sha256]) == {picture.sha256: picture}
    later = View(store.root)
    assert later.groups("train")["accepted"] == 5 and "a/0" not in later.find("train")


def test_leases_outlive_a_collection(store: Store, clock: Clock) -> None:
    train(store, "a")
    store.put("pending", pending("b"))
    held = claim(store, "pending", limit=1)
    assert store.collect(ALL, committed_step=1) == 1
    assert claim(store, "pending").trajectories == ["b/1"]
    assert store.extend(held.token, 10)
    assert store.ack(held.token, {"b/0": ("dropped_data", "why")}) == ["ok"]


def test_cold_segments_are_compressed_and_read_back_equal(local: Store) -> None:
    for k in range(20):
        local.put("pending", pending(f"g{k}", 1, purpose="before"))
        local.put("generated", row("generated", f"g{k}/0", text=f"{k} {TEXT}", versions=[1, 2], logprobs=[0.5, 0.25]))
        local.put("rendered", row("rendered", f"g{k}/0"))
        local.put("scored", row("scored", f"g{k}/0", reward=k / 20, components=[("a", 1.0)]))
    columns = ["question", "text", "logprobs", "versions", "reward", "components"]
    names = local.find("before")
    before = local.get(names, columns)
    while got := claim(local, "scored", by_group=True):
        local.ack(got.token, {t: ("dropped_filtered", "no signal") for t in got.trajectories})
    local = reopen(local)
    plain = local.bytes()
    local.collect(Retention(), 0)
    folder = Path(str(local.root)) / "generated"
    assert [f.name for f in folder.glob("z-*")], "nobody can claim these rows any more"
    assert local.bytes() < plain
    again = reopen(local)
    assert again.get(names, columns).equals(before)
    again.collect(Retention(), 0)
    assert again.get(names, columns).equals(before)
    assert [f.name for f in folder.iterdir()] == [f.name for f in folder.glob("z-*")], "what was replaced is gone"


def test_collections_one_after_the_other_survive_a_crash_after_each(local: Store, tmp_path: Path) -> None:
    import shutil

    for k in range(12):
        train(local, f"g{k}", step=k)
        local.put("generated", row("generated", f"g{k}/0"))
        local.collect(Retention(max_bytes=local.bytes() * 2 // 3), committed_step=k)
        left = Store(shutil.copytree(local.root, tmp_path / f"left{k}"))
        assert left.groups("train") == {"accepted": k + 1, "ended": k + 1, "trained": k + 1}
        assert left.find("train") == local.find("train") and left.lost("train") == 0
        left.close()


def test_a_collection_that_fails_half_way_changes_nothing(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from replay.storage import LocalStorage, StoreError

    for group in "abc":
        train(local, group)
    create, left = LocalStorage.create, [0]

    def failing(self: LocalStorage, name: str, data: bytes) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise StoreError("the disk is full")
        create(self, name, data)

    monkeypatch.setattr(LocalStorage, "create", failing)
    failures = 0
    for n in range(1, 40):
        left[0] = n
        try:
            local.collect(Retention(max_bytes=local.bytes() - 1), committed_step=1)
        except StoreError:
            failures += 1
        left[0] = 0
        names = local.find("train")
        assert local.get(names, ["text"])["text"].to_pylist() == ["t"] * len(names)
        assert local.counts() == {"trained": 6} and local.lost("train") == 0
    assert failures
    again = reopen(local)
    assert again.counts() == {"trained": 6} and again.lost("train") == 0


def interleaved(store: Store, groups: int) -> None:
    """Rows of `scored` in which what will go and what will stay take turns."""
    for k in range(groups):
        purpose = "train" if k % 3 else "before"
        store.put("pending", pending(f"g{k}", 1, purpose=purpose))
    names = [f"g{k}/0" for k in range(groups)]
    for stage in ("generated", "rendered", "scored"):
        store.put(stage, table(stage, [{"trajectory": n, "group": n[:-2], "versions": [1]} for n in names]))
    while got := claim(store, "scored", by_group=True, purpose="train"):
        store.ack(got.token, {t: ("trained", "") for t in got.trajectories}, step=1)


@pytest.mark.parametrize("seen", [0, 1, 4, 7, 11])
@pytest.mark.parametrize("limit", [1, 2, 5, 100])
def test_a_follower_passes_over_nothing_and_comes_to_an_end(local: Store, seen: int, limit: int) -> None:
    interleaved(local, 12)
    before, position = local.follow("watcher", "scored", seen)
    local.advance("watcher", "scored", position)
    assert len(before) == seen
    local.collect(ALL, committed_step=1)
    after: list[str] = []
    for _ in range(100):
        names, position = local.follow("watcher", "scored", limit)
        local.advance("watcher", "scored", position)
        if not names:
            break
        after += names
    else:
        pytest.fail("the follower reads the same rows for ever")
    left = local.find("before")
    assert set(left) - set(before) <= set(after) <= set(left)
    assert max(Counter(after).values(), default=1) == 1
    local.put("pending", pending("late", 1))
    to_scored(local, "late/0")
    assert local.follow("watcher", "scored", limit)[0] == ["late/0"]
