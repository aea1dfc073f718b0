"""Folders of models and checkpoints, at a path and in a bucket: whole or not at all, and never stale."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from replay.folders import added, copy, exists, fetched, is_model, move, remove, subfolders, written
from replay.storage import StoreError
from tests.replay.proxy import Proxy


@pytest.fixture(params=["path", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where folders can be made."""
    return str(tmp_path / "run") if request.param == "path" else request.getfixturevalue("bucket")


def write(folder: str | Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def content(folder: str | Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def model(url: str, files: Mapping[str, str]) -> None:
    with written(url) as folder:
        assert not Path(folder).exists()
        write(folder, files)


FILES = {"config.json": "{}", "deep/er/weights.safetensors": "w" * 1000, "tokenizer.json": ""}


def test_what_was_written_is_fetched(place: str) -> None:
    assert not is_model(f"{place}/policy")
    model(f"{place}/policy", FILES)
    assert is_model(f"{place}/policy")
    assert content(fetched(f"{place}/policy")) == FILES
    assert fetched(f"{place}/policy").endswith("/policy")


def test_a_model_takes_the_place_of_the_one_before(place: str) -> None:
    model(f"{place}/policy", FILES | {"old.safetensors": "old"})
    assert "old.safetensors" in content(fetched(f"{place}/policy"))
    model(f"{place}/policy", FILES | {"deep/er/weights.safetensors": "W" * 1000})
    assert content(fetched(f"{place}/policy")) == FILES | {"deep/er/weights.safetensors": "W" * 1000}


def test_writing_that_breaks_off_leaves_what_was_there(place: str) -> None:
    model(f"{place}/policy", FILES)
    with pytest.raises(ZeroDivisionError), written(f"{place}/policy") as folder:
        write(folder, {"config.json": "new"})
        raise ZeroDivisionError
    assert content(fetched(f"{place}/policy")) == FILES


def test_a_copy_takes_the_place_of_the_model_that_was_there(place: str) -> None:
    model(f"{place}/checkpoints/1/policy", FILES)
    model(f"{place}/policy", {"config.json": "old", "old.safetensors": "old"})
    copy(f"{place}/checkpoints/1/policy", f"{place}/policy")
    assert content(fetched(f"{place}/policy")) == content(fetched(f"{place}/checkpoints/1/policy")) == FILES


@pytest.mark.parametrize("atomic", [True, False])
def test_a_model_at_a_path_is_there_at_every_moment_while_another_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, atomic: bool
) -> None:
    if not atomic:  # as on a file system that cannot swap names
        monkeypatch.setattr("replay.folders._swapped", lambda a, b: False)
    model(f"{tmp_path}/1", FILES)
    model(f"{tmp_path}/policy", FILES)
    seen: list[bool] = []
    with ThreadPoolExecutor(1) as pool:
        writing = [pool.submit(copy, f"{tmp_path}/1", f"{tmp_path}/policy") for _ in range(100)]
        while not writing[-1].done():
            seen.append((tmp_path / "policy" / "config.json").exists())
    for each in writing:
        each.result()
    assert seen and (all(seen) or not atomic)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "policy"]


def test_several_processes_add_to_a_folder(place: str) -> None:
    for rank in range(2):
        with added(f"{place}/checkpoints/step1.0") as folder:
            assert folder.endswith("/step1.0")
            write(folder, {f"rank{rank}.pt": str(rank), f"zero/{rank}.pt": ""})
    assert content(fetched(f"{place}/checkpoints/step1.0")) == {
        "rank0.pt": "0",
        "rank1.pt": "1",
        "zero/0.pt": "",
        "zero/1.pt": "",
    }
    assert subfolders(f"{place}/checkpoints") == ["step1.0"]


def test_a_folder_is_removed_with_all_that_is_in_it(place: str) -> None:
    for name in ("a", "ab"):
        model(f"{place}/{name}", FILES)
    remove(f"{place}/a")
    assert subfolders(place) == ["ab"] and not exists(f"{place}/a") and exists(f"{place}/ab")
    remove(f"{place}/a")
    assert subfolders(f"{place}/nowhere") == []


def test_a_folder_is_moved_whole(place: str) -> None:
    model(f"{place}/run", FILES)
    move(f"{place}/run", f"{place}/run.old", "config.json")
    assert not exists(f"{place}/run") and content(fetched(f"{place}/run.old")) == FILES


def test_a_name_of_the_hub_and_a_path_stay_as_they_are() -> None:
    assert fetched("Qwen/Qwen3-4B") == "Qwen/Qwen3-4B" and fetched("/models/a") == "/models/a"


def test_an_empty_place_in_a_bucket_and_a_bucket_that_is_missing_are_errors(bucket: str) -> None:
    with pytest.raises(StoreError, match=f"there is nothing in {bucket}/policy"):
        fetched(f"{bucket}/policy")
    with pytest.raises(StoreError, match=r"writing s3://nowhere/policy failed: .*bucket does not exist"):
        model("s3://nowhere/policy", FILES)


def test_a_folder_is_fetched_once_by_all_on_a_machine(proxy: Proxy, bucket: str) -> None:
    model(f"{bucket}/policy", FILES)
    proxy.seen.clear()
    with ThreadPoolExecutor() as pool:
        [folder] = set(pool.map(fetched, [f"{bucket}/policy"] * 4))
    gets = [path for method, path in proxy.seen if method == "GET" and "/policy/" in path]
    assert len(gets) == len(FILES) and content(folder) == FILES


def test_local_copies_and_what_the_dead_left_go_when_nobody_asked_for_them_for_a_day(
    bucket: str, tmp_path: Path
) -> None:
    scratch, late = tmp_path / f"llmi-folders-{os.getuid()}", time.time() - 25 * 3600
    for name in "ab":
        model(f"{bucket}/{name}", FILES)
    assert list(scratch.iterdir()) == [], "nothing is left of an upload"
    a, b = (fetched(f"{bucket}/{name}") for name in "ab")
    (scratch / "left").mkdir()
    for old in scratch.iterdir():
        os.utime(old, (late, late))
    Path(a, "mark").touch()
    assert fetched(f"{bucket}/a") == a
    assert Path(a, "mark").exists() and not Path(b).exists() and len(list(scratch.iterdir())) == 1


def test_a_model_in_a_bucket_has_its_config_only_while_it_is_whole(proxy: Proxy, bucket: str) -> None:
    model(f"{bucket}/policy", FILES | {"old": ""})
    proxy.misbehave(*["InternalError"] * 30, path="weights")
    with pytest.raises(StoreError, match=rf"writing {bucket}/policy failed: .+"):
        model(f"{bucket}/policy", FILES)
    assert not is_model(f"{bucket}/policy")
    proxy.misbehave()
    model(f"{bucket}/policy", FILES)
    assert is_model(f"{bucket}/policy") and content(fetched(f"{bucket}/policy")) == FILES


@pytest.mark.parametrize("method", ["PUT", "POST"], ids=["copying", "deleting"])
def test_a_move_in_a_bucket_that_broke_off_is_whole_on_one_side(proxy: Proxy, bucket: str, method: str) -> None:
    model(f"{bucket}/run", FILES)
    proxy.misbehave("forward", *["InternalError"] * 30, only=(method,), path="")
    with pytest.raises(StoreError, match=rf"moving {bucket}/run to {bucket}/aside failed"):
        move(f"{bucket}/run", f"{bucket}/aside", "config.json")
    proxy.misbehave()
    sides = [content(fetched(f"{bucket}/{side}")) for side in ("run", "aside") if is_model(f"{bucket}/{side}")]
    assert sides == [FILES]


def test_files_that_stay_although_they_were_deleted_are_an_error(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model(f"{bucket}/a", FILES)
    monkeypatch.setattr("s3fs.S3FileSystem._bulk_delete", _refused)
    with pytest.raises(StoreError, match=r"failed: .+3 files cannot be deleted, such as config.json; look"):
        remove(f"{bucket}/a")


async def _refused(*args: object, **kwargs: object) -> list[str]:
    """What s3fs makes of a service that refuses to delete."""
    return []
