"""Lives of a run and the checkpoints they commit, at a path and in a bucket."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from replay.checkpoints import Checkpoints
from replay.storage import StoreError


@pytest.fixture(params=["path", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "checkpoints") if request.param == "path" else f"{request.getfixturevalue('bucket')}/c"


def save(checkpoints: Checkpoints, tag: str) -> None:
    with checkpoints.writing(tag) as (folder, name):
        assert name == tag
        Path(folder, name, "weights").write_text(tag)


def test_no_two_lives_have_a_number_however_they_begin(url: str) -> None:
    with ThreadPoolExecutor() as pool:
        numbers = list(pool.map(lambda _: Checkpoints(url).begin(), range(8)))
    assert sorted(numbers) == list(range(8))


def test_what_was_committed_last_counts(url: str) -> None:
    checkpoints = Checkpoints(url)
    assert checkpoints.begin() == 0 and checkpoints.committed() is None and checkpoints.tags() == []
    for step in (2, 4):
        save(checkpoints, f"step{step:06d}.0")
        checkpoints.commit({"step": step}, 0)
    save(checkpoints, "step000006.0")
    again = Checkpoints(url)
    assert again.committed() == {"step": 4}
    assert again.tags() == ["step000002.0", "step000004.0", "step000006.0"]
    again.keep(1, best="step000004.0")
    folder, name = again.fetched("step000004.0")
    assert Path(folder, name, "weights").read_text() == "step000004.0"
    assert again.tags() == ["step000004.0", "step000006.0"]


def test_a_life_that_was_taken_for_dead_commits_nothing(url: str) -> None:
    zombie, heir = Checkpoints(url), Checkpoints(url)
    assert zombie.begin() == 0
    zombie.commit({"step": 2}, 0)
    assert heir.begin() == 1
    with pytest.raises(StoreError, match=r"life 1 has taken up the run of .+; this one, 0, stops"):
        zombie.commit({"step": 4}, 0)
    heir.commit({"step": 3}, 1)
    assert zombie.committed() == {"step": 3}
