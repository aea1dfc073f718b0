"""Stores in a folder and in a bucket; the bucket is moto's, behind a real HTTP port on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import pytest

from replay.storage import S3Storage
from replay.store import Store
from tests.conftest import set_up_s3
from tests.replay.proxy import Proxy, handler
from tests.replay.rows import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


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


@pytest.fixture(scope="session")
def proxy_server(s3_server: str) -> Iterator[Proxy]:
    proxy = Proxy()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(proxy, urlsplit(s3_server).netloc))
    server.daemon_threads = True
    Thread(target=server.serve_forever, daemon=True).start()
    proxy.url = f"http://127.0.0.1:{server.server_port}"
    yield proxy
    server.shutdown()


@pytest.fixture
def proxy(proxy_server: Proxy, s3: str, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    set_up_s3(monkeypatch, proxy_server.url)
    calls = {"connect_timeout": 2, "read_timeout": 5, "retries": {"mode": "standard", "max_attempts": 2}}
    monkeypatch.setattr(S3Storage, "_CALLS", calls)
    monkeypatch.setattr(S3Storage, "_TRIES", 1)
    proxy_server.misbehave()
    proxy_server.seen.clear()
    return proxy_server
