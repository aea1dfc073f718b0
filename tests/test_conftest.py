"""The hooks of tests/conftest.py, in a pytest session of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CONFTEST = Path(__file__).with_name("conftest.py")

WITHOUT_LEAVE = """
import pytest

@pytest.mark.skip
def test_mark(): pass

@pytest.mark.skipif(True, reason="no GPU")
def test_condition(): pass

@pytest.fixture
def gpu(): pytest.skip("no GPU")

def test_fixture(gpu): pass

def test_call(): pytest.skip("no GPU")
"""

WITH_LEAVE = """
import pytest

def test_leave(): pytest.skip("leave: needs a GPU")

@pytest.mark.xfail
def test_known(): assert 0

def test_plain(): pass
"""


def run_pytest(folder: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text(CONFTEST.read_text())
    for i, test in enumerate(tests):
        (folder / f"test_{i}.py").write_text(test)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=90, check=False)


def test_skips_without_leave_fail(tmp_path: Path) -> None:
    result = run_pytest(tmp_path, WITHOUT_LEAVE)
    assert result.returncode == 1
    assert "1 failed, 3 errors" in result.stdout, result.stdout
    assert "skipped without leave: no GPU" in result.stdout


def test_a_module_skipped_without_leave_fails(tmp_path: Path) -> None:
    result = run_pytest(tmp_path, "import pytest\npytest.importorskip('no_such_module')\ndef test_it(): pass\n")
    assert result.returncode != 0
    assert "skipped without leave: could not import" in result.stdout


def test_skips_with_leave_and_expected_failures_pass(tmp_path: Path) -> None:
    result = run_pytest(tmp_path, WITH_LEAVE)
    assert result.returncode == 0, result.stdout
    assert "1 passed, 1 skipped, 1 xfailed" in result.stdout
