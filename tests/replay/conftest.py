"""Stores in a folder and in a bucket; the bucket is moto's, behind a real HTTP port on loopback."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from replay.store import Store
from tests.replay.rows import Clock

_numbers = itertools.count()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """URL of an S3 service."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """An empty place in a bucket, `s3://BUCKET/PATH`, that this process can reach."""
    import s3fs

    set_up_s3(monkeypatch, s3_server)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # the cache of what was read
    fs = s3fs.S3FileSystem(endpoint_url=s3_server)
    if not fs.exists("runs"):
        fs.mkdir("runs")
    return f"s3://runs/{next(_numbers)}/replay"


def set_up_s3(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(params=["file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a store to be made, in a folder and in a bucket."""
    return f"file://{tmp_path / 'replay'}" if request.param == "file" else request.getfixturevalue("s3")


@pytest.fixture
def store(url: str, clock: Clock) -> Store:
    return Store(url, clock)


@pytest.fixture
def local(tmp_path: Path, clock: Clock) -> Store:
    """A store whose files a test looks into."""
    return Store(tmp_path / "replay", clock)
