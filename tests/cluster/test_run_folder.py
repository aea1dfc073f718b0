"""The run folder, at a path and in a bucket: made, taken up again, moved aside; and one sentence where it cannot be."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster import cli
from cluster.config import Config, ConfigError, Policy, load
from cluster.generate import config_of
from cluster.run_folder import CONFIG, METRICS, SUMMARY, RunFolder
from cluster.serve import policy_folder
from replay.folders import exists, is_model, subfolders, written
from replay.storage import LocalStorage, Locked, StoreError
from replay.store import Store
from replay.view import View, copy, is_store, make_shards

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny.yaml"


@pytest.fixture(params=["path", "s3"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Config:
    where = tmp_path / "runs" if request.param == "path" else request.getfixturevalue("bucket")
    return load(TINY, [f"run_dir={where}"])


def opened(config: Config, resume: bool = False) -> RunFolder:
    folder = RunFolder(config.folder)
    folder.check()
    folder.open(config, resume)
    return folder


def test_a_run_is_taken_up_where_it_stands(config: Config) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing to resume in .+/tiny; start without --resume"):
        opened(config, resume=True)
    folder = opened(config)
    for step in (1, 2, 3):
        folder.log({"step": step, "reward": 0.5, "norm": float("inf")})
    folder.summarise({"steps": 3})
    again = opened(config, resume=True)
    again.rewind(2)
    again.log({"step": 3, "reward": 0.75})
    for seen in (again, RunFolder(config.folder)):
        assert [row["reward"] for row in seen.steps()] == [0.5, 0.5, 0.75]
    assert json.loads(again.read(METRICS).splitlines()[0]) == {"step": 1, "reward": 0.5, "norm": None}
    assert json.loads(again.read(SUMMARY)) == {"steps": 3}
    assert again.read(CONFIG) == config.dump()


def test_an_earlier_run_is_moved_aside_whole(config: Config) -> None:
    folder = opened(config)
    folder.log({"step": 1})
    with written(folder.policy) as policy:
        Path(policy).mkdir()
        Path(policy, "config.json").touch()
    Store(make_shards(folder.replay, 1)[0]).close()
    folder.checkpoints.begin()
    fresh = opened(config)
    assert fresh.steps() == [] and fresh.checkpoints.begin() == 0
    assert not exists(fresh.policy) and not is_store(fresh.replay)
    [old] = [name for name in subfolders(config.run_dir) if name.startswith("tiny.old-")]
    kept = RunFolder(f"{config.run_dir}/{old}")
    assert [row["step"] for row in kept.steps()] == [1] and kept.read(CONFIG) == config.dump()
    assert is_store(kept.replay) and policy_folder(config, kept.policy) == kept.policy


def test_a_cold_start_alone_is_kept_and_no_policy_or_store_is_moved_away_from_its_run(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(config.folder)
    with written(folder.start) as start:
        Path(start).mkdir()
        Path(start, "config.json").touch()
    folder.check_begin(config.model_copy(update={"policy": Policy(path=folder.start)}))
    opened(config)
    assert is_model(folder.start) and subfolders(config.run_dir) == ["tiny"]
    monkeypatch.setattr("cluster.train.init_ray", lambda: pytest.fail("Ray was started"))
    for key, place in (("policy.path", folder.start), ("train.store", folder.replay)):
        Store(make_shards(folder.replay, 1)[0]).close()
        given = [f"run_dir={config.run_dir}", f"{key}={place}", *["policy.tiny=null"] * (key == "policy.path")]
        assert said(monkeypatch, capsys, "train", str(TINY), *given) == (
            f"llmi: {key} {place} lies in {folder.url}, which a new run of that name moves aside: give it another name="
        )


def test_a_run_that_is_under_way_is_neither_moved_nor_taken_up(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    for storage in ("LocalStorage", "S3Storage"):
        monkeypatch.setattr(f"replay.storage.{storage}.PATIENCE_S", 1.0)
    folder = opened(config)
    with _another_process_writes(make_shards(folder.replay, 2)[1]) as writer:
        for resume in (False, True):
            with pytest.raises(Locked, match=rf"is open in process {writer.pid} on .+; stop it first"):
                opened(config, resume)
        writer.kill()
        writer.wait()
        opened(config, resume=True)


@contextmanager
def _another_process_writes(url: str) -> Iterator[subprocess.Popen[bytes]]:
    code = f"from replay.store import Store; import time; s = Store({url!r}); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=TINY.parents[1]) as process:
        try:
            assert process.stdout is not None and process.stdout.readline()
            yield process
        finally:
            process.kill()


def test_half_a_copy_of_a_store_is_none_and_is_made_whole(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, replay = f"{config.folder}/saved", f"{config.folder}/replay"
    for shard in make_shards(saved, 2):
        Store(shard).close()
    with monkeypatch.context() as broken:
        for storage in ("LocalStorage", "S3Storage"):
            broken.setattr(f"replay.storage.{storage}.create", _only_the_first_shard)
        with pytest.raises(StoreError, match="enough"):
            copy(saved, replay)
    assert not is_store(replay)
    copy(saved, replay)
    assert is_store(replay) and len(make_shards(replay, 2)) == 2 and View(replay).purposes() == []
    with pytest.raises(StoreError, match=r"there is no replay store in .+/nothing"):
        copy(f"{config.folder}/nothing", replay)


def _only_the_first_shard(self: LocalStorage, name: str, data: bytes) -> None:
    if "shard-1" in self.url:
        raise StoreError("enough")
    self.replace(name, data)


def test_a_document_is_written_with_the_tools_of_the_run_that_the_policy_comes_from(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = opened(config.model_copy(update={"tools": {}}))
    with written(folder.policy) as policy:
        Path(policy).mkdir()
        Path(policy, "config.json").touch()
    monkeypatch.setattr("cluster.generate._generate", lambda run, *_: pytest.fail(f"tools: {[*run.tools]}"))
    monkeypatch.setattr(sys, "argv", ["llmi", "generate", "Fish", "--model", folder.policy, "-o", "x.html"])
    with pytest.raises(pytest.fail.Exception, match=r"tools: \[\]"):
        cli.main()
    assert capsys.readouterr().err == f"with the tools of {folder.url}/config.yaml\n"
    assert config_of(f"{folder.url}/elsewhere/policy") == TINY


# ---- what cannot be reached ----------------------------------------------------------------------------------------


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `llmi` says on stderr when it fails, in one line."""
    monkeypatch.setattr(sys, "argv", ["llmi", *arguments])
    with pytest.raises(SystemExit):
        cli.main()
    [line] = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture
def first_connection() -> Iterator[None]:
    """The process knows no credentials of tests before, and none after has this one's."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.usefixtures("first_connection")
@pytest.mark.parametrize(
    ("changed", "run_dir", "line"),
    [
        ({}, "s3://nowhere/runs", "llmi: there is no bucket nowhere; make it first"),
        pytest.param(
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
            "s3://runs",
            "llmi: reaching s3://runs/tiny failed: EndpointConnectionError: Could not connect to the endpoint URL:",
            marks=pytest.mark.slow,  # it is tried for a while
        ),
        (
            {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
            "s3://runs",
            "llmi: reaching s3://runs/tiny failed: NoCredentialsError: Unable to locate credentials; give credentials",
        ),
    ],
    ids=["no bucket", "no service", "no credentials"],
)
def test_a_bucket_that_cannot_be_used_is_said_in_one_line_before_anything_starts(
    bucket: str,
    changed: dict[str, str | None],
    run_dir: str,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", "/nonexistent")  # no credentials of this machine's user
    monkeypatch.setattr("cluster.train.init_ray", lambda: pytest.fail("Ray was started"))
    for name, value in changed.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    assert line in said(monkeypatch, capsys, "train", str(TINY), f"run_dir={run_dir}")


def test_a_run_folder_below_a_file_is_said_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    line = said(monkeypatch, capsys, "train", str(TINY), f"run_dir={tmp_path}/file")
    assert f"{tmp_path}/file/tiny cannot be written: {tmp_path}/file is no folder that takes files" in line


def test_a_saved_store_that_is_not_there_is_said_before_anything_starts(
    bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = said(monkeypatch, capsys, "train", str(TINY), f"run_dir={bucket}", f"train.store={bucket}/none")
    assert line == f"llmi: there is no replay store in {bucket}/none, which train.store names"


@pytest.mark.parametrize(
    "place", ["gs://bucket/runs", "s3://key:secret@bucket/runs", "s3:///runs", "s3://b/?key=secret"]
)
@pytest.mark.parametrize("key", ["run_dir", "train.store", "policy.path"])
def test_a_url_that_is_no_place_is_refused_and_not_printed(place: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key} must be a path or s3://BUCKET/PATH; credentials come from") as error:
        load(TINY, [f"{key}={place}", *(["policy.tiny=null"] if key == "policy.path" else [])])
    assert "secret" not in str(error.value)


def test_a_run_in_a_bucket_and_a_file_url_have_a_folder() -> None:
    assert load(TINY, ["run_dir=s3://bucket/some/runs/"]).folder == "s3://bucket/some/runs/tiny"
    assert load(TINY, ["run_dir=file:///some/runs"]).folder == "/some/runs/tiny"
