"""The store's promises, in a folder and in a bucket."""

import os
from pathlib import Path

import pyarrow as pa
import pytest

from replay.record import SCHEMAS, Blob, Status, version
from replay.store import MAX_CLAIMS, Store, StoreError
from tests.replay.rows import Clock, claim, killed, pending, reopen, row, table, to_scored


def test_a_trajectory_walks_through_all_stages(store: Store) -> None:
    store.put("pending", pending())
    for name in ("g0/0", "g0/1"):
        to_scored(store, name)
    got = claim(store, "scored", by_group=True, columns=["question", "text", "reward"])
    assert got.rows.to_pylist()[0] == {
        "trajectory": "g0/0",
        "group": "g0",
        "attempt": 0,
        "question": "q",
        "text": "t",
        "reward": 1.0,
    }
    assert store.ack(got.token, {t: ("trained", "") for t in got.trajectories}, step=1) == ["ok", "ok"]
    assert store.counts() == {"trained": 2}
    assert store.groups("train") == {"accepted": 1, "ended": 1, "trained": 1}


def test_the_first_put_wins_and_a_later_one_is_stale(store: Store) -> None:
    store.put("pending", pending())
    assert store.put("generated", row("generated", "g0/0", versions=[0], text="first")) == ["ok"]
    assert store.put("generated", row("generated", "g0/0", versions=[0], text="second")) == ["stale"]
    assert store.get(["g0/0"], ["text"])["text"].to_pylist() == ["first"]
    assert store.put("pending", pending()) == ["stale", "stale"]


def test_two_rows_of_one_trajectory_in_one_put_are_one(store: Store) -> None:
    store.put("pending", pending())
    twice = pa.concat_tables([row("generated", "g0/0", versions=[0])] * 2)
    assert store.put("generated", twice) == ["ok", "stale"]


def test_a_row_of_an_unknown_trajectory_is_stale(store: Store) -> None:
    assert store.put("generated", row("generated", "nobody/0", versions=[0])) == ["stale"]


def test_a_stage_cannot_be_skipped(store: Store) -> None:
    store.put("pending", pending())
    assert store.put("scored", row("scored", "g0/0", reward=1.0)) == ["stale"]


def test_a_claimed_row_is_free_again_when_its_lease_runs_out(store: Store, clock: Clock) -> None:
    store.put("pending", pending())
    first = claim(store, "pending")
    assert claim(store, "pending") is None
    clock.now = 5
    assert store.extend(first.token, 10)
    clock.now = 14
    assert claim(store, "pending") is None
    clock.now = 16
    assert claim(store, "pending").trajectories == first.trajectories
    assert not store.extend(first.token, 10)
    assert store.ack(first.token, {"g0/0": ("dropped_data", "late")}) == ["stale"]


def test_a_released_row_can_be_claimed_at_once_and_for_ever(store: Store) -> None:
    store.put("pending", pending())
    for _ in range(3 * MAX_CLAIMS):
        store.release(claim(store, "pending").token)
    assert store.counts() == {"pending": 2}


def test_a_row_that_takes_its_workers_down_is_dropped_with_a_reason(store: Store, clock: Clock) -> None:
    store.put("pending", pending(samples=1))
    for _ in range(MAX_CLAIMS):
        assert claim(store, "pending") is not None
        clock.now += 11
    assert claim(store, "pending") is None
    assert store.counts() == {"dropped_data": 1}


def test_a_group_is_claimed_whole_and_only_when_complete(store: Store) -> None:
    store.put("pending", pending(samples=3))
    to_scored(store, "g0/0")
    to_scored(store, "g0/1")
    assert claim(store, "scored", by_group=True) is None
    third = claim(store, "pending", limit=1)
    store.ack(third.token, {"g0/2": ("dropped_data", "broken")})
    assert claim(store, "scored", by_group=True).trajectories == ["g0/0", "g0/1"]


def test_groups_older_than_the_bound_are_generated_anew(store: Store, clock: Clock) -> None:
    store.put("pending", pending())
    to_scored(store, "g0/0", at=3)
    to_scored(store, "g0/1", at=4)
    assert claim(store, "scored", by_group=True, version=5, max_staleness=2) is not None
    clock.now += 11
    assert claim(store, "scored", by_group=True, version=6, max_staleness=2) is None
    assert store.counts() == {"pending": 2}
    late = row("rendered", "g0/0")
    assert store.put("rendered", late) == ["stale"], "a row of the first attempt must not count for the second"
    again = table("generated", [{"trajectory": "g0/0", "group": "g0", "attempt": 1, "versions": [6]}])
    assert store.put("generated", again) == ["ok"]
    store = reopen(store)
    assert store.counts() == {"pending": 1, "generated": 1}
    assert store.get(["g0/0"], ["versions"])["versions"].to_pylist() == [[6]]


def test_versions_of_an_abandoned_life_count_as_fresh(store: Store) -> None:
    store.put("pending", pending(samples=1))
    to_scored(store, "g0/0", at=version(0, 9))
    assert claim(store, "scored", by_group=True, version=version(1, 5), max_staleness=0) is not None


def test_an_answer_without_tokens_is_never_too_old(local: Store) -> None:
    local.put("pending", pending())
    local.put("generated", row("generated", "g0/0", versions=[], text=""))
    local.put("generated", row("generated", "g0/1", versions=[7]))
    assert local.running("train") == 1
    for stage in ("rendered", "scored"):
        for name in ("g0/0", "g0/1"):
            local.put(stage, row(stage, name, reward=0.0) if stage == "scored" else row(stage, name))
    assert local.running("train") == 0
    assert claim(local, "scored", by_group=True, version=9, max_staleness=2) is not None


def test_a_purpose_is_claimed_by_itself(store: Store) -> None:
    store.put("pending", pending("a"))
    store.put("pending", pending("b", purpose="before"))
    assert claim(store, "pending", purpose="before").trajectories == ["b/0", "b/1"]


def test_everything_is_there_when_the_store_comes_back(store: Store) -> None:
    store.put("pending", pending("a"))
    store.put("pending", pending("b"))
    to_scored(store, "a/0")
    to_scored(store, "a/1")
    got = claim(store, "scored", by_group=True)
    store.ack(got.token, {t: ("trained", "") for t in got.trajectories}, step=4)
    picture = Blob(b"png")
    store.put("generated", row("generated", "b/0", versions=[1], text="x"), [picture])
    claim(store, "generated")
    before = store.counts()
    store = reopen(store)
    assert store.counts() == before == {"trained": 2, "generated": 1, "pending": 1}
    assert claim(store, "generated").trajectories == ["b/0"]
    assert store.blobs([picture.sha256]) == {picture.sha256: picture}
    assert store.cursor("train") == 2


def test_what_was_trained_after_the_committed_step_comes_back_once(store: Store) -> None:
    for name in ("a", "b"):
        store.put("pending", pending(name, samples=1))
        to_scored(store, f"{name}/0")
    for step in (1, 2):
        got = claim(store, "scored", by_group=True, limit=1)
        store.ack(got.token, {t: ("trained", "") for t in got.trajectories}, step=step)
    store = reopen(store)
    assert store.rewind(step=1) == 1
    store = reopen(store)
    assert store.counts() == {"trained": 1, "scored": 1}
    got = claim(store, "scored", by_group=True)
    assert got.trajectories == ["b/0"]
    store.ack(got.token, {"b/0": ("trained", "")}, step=2)
    assert reopen(store).counts() == {"trained": 2}


def test_a_torn_tail_costs_only_the_put_that_never_returned(local: Store, tmp_path: Path) -> None:
    local.put("pending", pending("a"))
    local.put("pending", pending("b"))
    left = killed(local, tmp_path / "left")
    [segment] = (left / "pending").glob("*.arrows")
    os.truncate(segment, segment.stat().st_size - 7)
    again = Store(left)
    assert again.find("train") == ["a/0", "a/1"]
    assert again.put("pending", pending("b")) == ["ok", "ok"]


def test_damage_before_the_tail_is_an_error_that_names_the_file(local: Store, tmp_path: Path) -> None:
    local.put("pending", pending("a"))
    local.put("pending", pending("b"))
    left = killed(local, tmp_path / "left")
    [segment] = (left / "pending").glob("*.arrows")
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
    with pytest.raises(StoreError, match=r"00000000\.arrows is damaged after byte \d+; restore it from a copy"):
        Store(left)


def test_a_picture_is_stored_once(store: Store) -> None:
    store.put("pending", pending("a"), [Blob(b"x"), Blob(b"x")])
    store.put("pending", pending("b"), [Blob(b"x")])
    assert sum(b.num_rows for _, b in store._logs["blobs"]) == 1


def test_pictures_that_lie_anywhere_come_back_whole_and_their_memory_is_let_go(store: Store) -> None:
    """They are written from where they lie; the segment's footer, and the next put, must not be taken for them."""
    datas = [bytearray(os.urandom(size)) for size in (1, 3 << 20, 7, 200_000)]
    blobs = [Blob.named(Blob(bytes(d)).sha256, memoryview(d), "image/webp") for d in datas]
    wanted = {b.sha256: bytes(d) for b, d in zip(blobs, datas, strict=True)}
    store.put("pending", pending("g0"), blobs)
    store.put("pending", pending("g1"), [Blob(b"one more")])
    del blobs
    for data in datas:
        data.append(0)  # an error while anybody looks at it
    for known in (store, reopen(store)):
        assert {name: blob.data for name, blob in known.blobs(wanted).items()} == wanted
        assert {blob.mime for blob in known.blobs(wanted).values()} == {"image/webp"}


def test_an_open_store_refuses_a_second_owner_by_name(store: Store) -> None:
    with pytest.raises(StoreError, match="is open in process"):
        Store(store.root)


def test_a_store_of_a_newer_format_is_refused(local: Store) -> None:
    local.close()
    newest = sorted((Path(local.root) / "manifest").iterdir())[-1]
    newest.write_text('{"format": 99}')
    with pytest.raises(StoreError, match="format 99"):
        Store(local.root)


def test_clear_forgets_everything(store: Store) -> None:
    store.put("pending", pending(), [Blob(b"x")])
    store.clear()
    assert store.counts() == {}
    store.put("pending", pending())
    assert reopen(store).counts() == {"pending": 2}


def test_a_column_of_any_log_can_be_asked_for_by_its_full_name(store: Store) -> None:
    store.put("pending", pending())
    store.put("generated", row("generated", "g0/0", seconds=1.0))
    store.put("rendered", row("rendered", "g0/0", seconds=2.0))
    store.put("scored", row("scored", "g0/0", seconds=3.0))
    got = claim(store, "scored", columns=["seconds"])
    store.ack(got.token, {"g0/0": ("trained", "")}, step=7, advantages={"g0/0": -0.5})
    asked = ["seconds", "rendered.seconds", "scored.seconds", "step", "ended.advantage"]
    for each in (store, reopen(store)):
        rows = each.get(["g0/0", "g0/1"], asked).to_pylist()
        assert [rows[0][c] for c in asked] == [1.0, 2.0, 3.0, 7, -0.5]
        assert [rows[1][c] for c in asked] == [None] * 5


def test_an_unknown_column_is_refused_by_name(store: Store) -> None:
    store.put("pending", pending())
    with pytest.raises(StoreError, match="colour"):
        store.get(["g0/0"], ["colour"])


def test_all_statuses_are_in_the_table_of_moves() -> None:
    from replay.record import MOVES

    assert set(MOVES) == set(Status)


def test_of_two_puts_under_way_the_first_wins_and_rows_count_once_they_are_durable(store: Store) -> None:
    store.put("pending", pending())
    first = store.put_soon("generated", row("generated", "g0/0", text="first"))
    second = store.put_soon("generated", row("generated", "g0/0", text="second"))
    assert store.counts() == {"pending": 2}
    assert (second.answers(), first.answers()) == (["stale"], ["ok"])
    assert store.get(["g0/0"], ["text"])["text"].to_pylist() == ["first"]


def test_other_verbs_wait_for_puts_under_way_where_they_must(store: Store) -> None:
    store.put_soon("pending", pending("a"))
    assert store.follow("watcher", "pending", 9) == (["a/0", "a/1"], 2)
    store.put_soon("pending", pending("b"))
    assert store.version()["pending"] == 4
    store.put_soon("pending", pending("c"))
    assert reopen(store).counts() == {"pending": 6}


def test_a_picture_of_two_puts_under_way_is_stored_once(store: Store) -> None:
    blob = Blob(b"x" * 100)
    puts = [store.put_soon("pending", pending(g, 1, given=[blob.sha256]), [blob]) for g in "ab"]
    assert [put.answers() for put in puts] == [["ok"], ["ok"]]
    assert store.version()["blobs"] == 1 and store.blobs([blob.sha256]) == {blob.sha256: blob}


def test_a_column_that_came_later_is_null_in_older_rows(tmp_path: Path) -> None:
    scored = SCHEMAS["scored"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCHEMAS, "scored", scored.remove(scored.get_field_index("reasons")))
        store = Store(tmp_path)
        store.put("pending", pending())
        to_scored(store, "g0/0")
        store.close()
    store = Store(tmp_path)
    to_scored(store, "g0/1")
    rows = store.get(["g0/0", "g0/1"], ["reward", "reasons"]).to_pylist()
    assert [(row["reward"], row["reasons"]) for row in rows] == [(1.0, None)] * 2
    store.close()
