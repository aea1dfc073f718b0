"""A bucket that misbehaves: throttles, fails, cuts connections, loses answers. A proxy in front of a real S3 service
does so on command; the tests of `test_store.py` and `test_retention.py` run on the service itself.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from replay.record import Blob
from replay.storage import Locked, S3Storage
from replay.store import Retention, Store, StoreError
from replay.view import View
from tests.replay.proxy import Proxy
from tests.replay.rows import claim, pending, reopen, row, to_scored, train

FAILURES = ("SlowDown", "InternalError", "cut", "lose")


@pytest.mark.parametrize("failure", FAILURES)
def test_a_call_that_fails_once_is_made_again_and_nothing_is_doubled(proxy: Proxy, s3: str, failure: str) -> None:
    store = Store(s3)
    picture = Blob(b"picture" * 9999)
    for k in range(3):
        proxy.misbehave(failure, path="replay/")
        assert store.put("pending", pending(f"g{k}", given=[picture.sha256]), [picture]) == ["ok", "ok"]
        proxy.misbehave(failure, only=("GET", "HEAD"))
        assert store.get([f"g{k}/0"], ["question"])["question"].to_pylist() == ["q"]
    proxy.misbehave(failure, path="manifest/")
    store = reopen(store)
    assert store.find("train") == [f"g{k}/{i}" for k in range(3) for i in (0, 1)]
    assert sum(b.num_rows for _, b in store._logs["pending"]) == 6
    assert store.blobs([picture.sha256]) == {picture.sha256: picture}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_service_that_keeps_failing_is_an_error_and_the_put_can_be_made_again(
    proxy: Proxy, s3: str, failure: str
) -> None:
    store = Store(s3)
    store.put("pending", pending("a"))
    proxy.misbehave(*[failure] * 30, path="pending/")
    with pytest.raises(StoreError, match=rf"writing {s3}/pending/00000001.arrow failed: .+"):
        store.put("pending", pending("b", question="first try"))
    assert store.find("train") == ["a/0", "a/1"]
    proxy.misbehave()
    assert store.put("pending", pending("b", question="second try")) == ["ok", "ok"]
    for again in (store, reopen(store)):
        assert again.find("train") == ["a/0", "a/1", "b/0", "b/1"]
        assert again.get(["b/0"], ["question"])["question"].to_pylist() == ["second try"]
        assert again.lost("train") == 0


def test_an_end_whose_answer_was_lost_counts_once(proxy: Proxy, s3: str) -> None:
    store = Store(s3)
    store.put("pending", pending("a", 1))
    to_scored(store, "a/0")
    got = claim(store, "scored", by_group=True)
    proxy.misbehave(*["lose"] * 30, path="ended/")
    with pytest.raises(StoreError):
        store.ack(got.token, {"a/0": ("trained", "")}, step=1)
    proxy.misbehave()
    assert store.ack(got.token, {"a/0": ("trained", "")}, step=1) == ["ok"]
    store = reopen(store)
    assert store.lost("train") == 0 and store.counts() == {"trained": 1}


def test_a_put_that_failed_and_a_process_that_died_leave_it_wholly_or_not_at_all(proxy: Proxy, s3: str) -> None:
    store = Store(s3)
    proxy.misbehave(*["lose"] * 30, path="pending/")
    with pytest.raises(StoreError):
        store.put("pending", pending("a"))
    proxy.misbehave()
    store._storage.unlock()  # as if it had died, and its lock had run out
    assert Store(s3).find("train") == ["a/0", "a/1"]


def test_a_commit_that_fails_costs_no_rows_and_is_made_later(proxy: Proxy, s3: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("replay.log.SMALL_SEGMENTS", 3)
    store, kept = Store(s3), []
    for k in range(12):
        proxy.misbehave(*["lose"] * 30 if k % 4 == 3 else [], path="manifest/")
        try:
            assert store.put("pending", pending(f"g{k}", 1)) == ["ok"]
            kept.append(f"g{k}/0")
        except StoreError:
            proxy.misbehave()
            assert store.put("pending", pending(f"g{k}", 1)) == ["ok"], "nothing of it was kept"
            kept.append(f"g{k}/0")
    proxy.misbehave()
    assert store.find("train") == kept
    assert reopen(store).find("train") == kept


def test_a_collection_that_fails_can_be_made_again(proxy: Proxy, s3: str) -> None:
    store = Store(s3)
    for group in "ab":
        train(store, group, samples=1)
    store.put("pending", pending("c", 1))
    for part in ("pending/c", "z-", "manifest/"):
        proxy.misbehave(*["InternalError"] * 30, path=part)
        with suppress(StoreError):
            store.collect(Retention(max_bytes=0), committed_step=1)
        proxy.misbehave()
        assert store.counts() == {"trained": 2, "pending": 1} and store.lost("train") == 0
    store.collect(Retention(max_bytes=0), committed_step=1)
    store = reopen(store)
    assert store.counts() == {"trained": 2, "pending": 1} and store.find("train") == ["c/0"]


# ---- two writers ---------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_by_name(s3: str) -> None:
    Store(s3)
    with pytest.raises(StoreError, match=r"is open in process \d+ on .+ \(renewed \d+ s ago\); stop it first"):
        Store(s3)


def test_a_stale_lock_is_taken_over_and_its_owner_can_do_no_harm(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    zombie = Store(s3)
    zombie.put("pending", pending("a"))
    with monkeypatch.context() as late:
        late.setattr(S3Storage, "LOCK_S", 0.0)
        store = Store(s3)
        with pytest.raises(StoreError, match="is open in process"):
            zombie.put("pending", pending("b"))
    assert store.put("pending", pending("c")) == ["ok", "ok"]
    with pytest.raises(StoreError, match="taken over by another writer"):
        zombie.put("pending", pending("d"))  # it has not looked at the lock again
    with suppress(StoreError):
        zombie.close()
    assert store.put("generated", row("generated", "c/0", versions=[1])) == ["ok"]
    with pytest.raises(StoreError, match="is open in process"):
        Store(s3)  # the zombie has not let go of a lock that is not its own
    store = reopen(store)
    assert store.find("train") == ["a/0", "a/1", "c/0", "c/1"] and store.lost("train") == 0


def test_the_lock_of_a_process_that_is_gone_is_taken_at_once(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as other:
        other.setattr("os.getpid", lambda: 2**22 + 1)  # no process has it
        Store(s3).put("pending", pending())
    assert Store(s3).find("train") == ["g0/0", "g0/1"]


def test_the_lock_of_a_machine_that_is_gone_is_waited_for(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("socket.gethostname", lambda: "elsewhere")
        Store(s3).put("pending", pending())
    monkeypatch.setattr(S3Storage, "LOCK_S", 3.0)
    with pytest.raises(Locked, match="on elsewhere"):
        Store(s3)
    assert Store(s3, patient=True).find("train") == ["g0/0", "g0/1"]


def test_a_bucket_that_is_missing_is_an_error(s3: str) -> None:
    with pytest.raises(StoreError, match="there is no bucket nowhere; make it first"):
        Store("s3://nowhere/replay")
    with pytest.raises(StoreError, match="there is no replay store in s3://nowhere/replay"):
        View("s3://nowhere/replay")


# ---- what is read --------------------------------------------------------------------------------------------------


def test_what_was_read_once_is_not_fetched_again(proxy: Proxy, s3: str) -> None:
    store = Store(s3)
    train(store, "a")
    store.close()
    View(s3).get(["a/0"], ["text"])
    proxy.seen.clear()
    View(s3).get(["a/0"], ["text"])
    assert not [path for method, path in proxy.seen if method == "GET" and ".arrow" in path]


def test_a_store_that_was_written_anew_under_the_same_names_is_not_read_from_the_cache(s3: str) -> None:
    import s3fs

    for word in ("old", "new"):
        store = Store(s3)
        store.put("pending", pending("a", 1, question=word))
        store.close()
        assert View(s3).get(["a/0"], ["question"])["question"].to_pylist() == [word]
        s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"]).rm(s3, recursive=True)


def test_small_segments_are_merged_in_order_also_around_big_ones(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replay.log.SEGMENT_BYTES", 20_000)
    monkeypatch.setattr("replay.log.SMALL_SEGMENTS", 4)
    store = Store(s3)
    names = []
    for k in range(14):
        store.put("pending", pending(f"g{k}", 300 if k in (2, 7) else 1))
        names += [f"g{k}/{i}" for i in range(300 if k in (2, 7) else 1)]
    assert store.follow("watcher", "pending", 10_000)[0] == names
    store = reopen(store)
    assert store.find("train") == names
    assert store.follow("watcher", "pending", 10_000)[0] == names


def test_a_store_in_a_bucket_that_was_cut_off_is_read_after_its_cache_is_gone(s3: str, tmp_path: Path) -> None:
    store = Store(s3)
    store.put("pending", pending())
    for cached in tmp_path.glob("llmi-cache-*/*"):
        cached.unlink()
    assert store.get(["g0/0"], ["question"])["question"].to_pylist() == ["q"]
    assert reopen(store).find("train") == ["g0/0", "g0/1"]
