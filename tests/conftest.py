"""For all tests: one thread a process, no telemetry, no hub; and a test that is skipped without leave fails.

A skip has leave if its reason begins with "leave:", as in `pytest.skip("leave: needs a GPU")`; so a test that cannot
run is either reported red, or its author has said why that is right.
"""

from __future__ import annotations

import os
from collections.abc import Generator

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
