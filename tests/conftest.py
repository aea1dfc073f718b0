"""For all tests: one thread a process, no telemetry, no hub; and a test that is skipped without leave fails.

A skip has leave if its reason begins with "leave:", as in `pytest.skip("leave: needs a GPU")`; so a test that cannot
run is either reported red, or its author has said why that is right.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(
    DO_NOT_TRACK="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_OFFLINE="1",
    RAY_USAGE_STATS_ENABLED="0",
    VLLM_NO_USAGE_STATS="1",
)

LEAVE = "leave:"
_numbers = itertools.count()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _fail_if_skipped_without_leave(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _fail_if_skipped_without_leave(report)
    return report


def _fail_if_skipped_without_leave(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip without leave into a failure. A skipped report's `longrepr` is (file, line, reason)."""
    if report.outcome != "skipped" or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    if not reason.startswith(LEAVE):
        report.outcome = "failed"
        report.longrepr = f"skipped without leave: {reason} (begin the reason with {LEAVE!r} if it may be skipped)"


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
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """An empty place in a bucket, `s3://BUCKET/PATH`, that this process can reach; moto's, behind a real HTTP port."""
    import s3fs

    set_up_s3(monkeypatch, s3_server)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # the cache of what was read
    fs = s3fs.S3FileSystem(endpoint_url=s3_server)
    if not fs.exists("runs"):
        fs.mkdir("runs")
    return f"s3://runs/{next(_numbers)}"


@pytest.fixture
def s3(bucket: str) -> str:
    """Of a store to be made in a bucket."""
    return f"{bucket}/replay"


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
