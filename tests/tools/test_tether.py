"""Whatever an engine's owner started, down to the process that holds the model, ends with it."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

#: Starts a chain of processes that ends in one which holds a model, and says who they are.
OWNER = """
import multiprocessing, os, sys, time

def link(left, say):
    if left:
        child = multiprocessing.get_context("spawn").Process(target=link, args=(left - 1, say))
        child.start()
    else:
        import tools.tether
    say.put(os.getpid())
    time.sleep(60)

if __name__ == "__main__":
    from tools.tether import tie
    tie()
    say = multiprocessing.get_context("spawn").Queue()
    child = multiprocessing.get_context("spawn").Process(target=link, args=(int(sys.argv[1]), say))
    child.start()
    print(*(say.get(timeout=30) for _ in range(int(sys.argv[1]) + 1)), flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("between", [0, 1])
def test_an_engine_whose_owner_is_killed_leaves_no_process_behind(between: int, tmp_path, monkeypatch) -> None:
    (tmp_path / "owner.py").write_text(OWNER)
    monkeypatch.setenv("PYTHONPATH", ".")
    command = [sys.executable, str(tmp_path / "owner.py"), str(between)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        started = [psutil.Process(int(pid)) for pid in owner.stdout.readline().split()]
        assert len(started) == between + 1
        owner.kill()
    _, alive = psutil.wait_procs(started, timeout=10)
    for process in alive:
        process.kill()
    assert not alive


def test_an_engine_that_comes_after_its_owners_end_goes_at_once(monkeypatch) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    monkeypatch.setenv("LLMI_ENGINE_OWNER", str(gone.pid))
    script = (
        "import importlib, multiprocessing\n"
        "spawn = multiprocessing.get_context('spawn')\n"
        "p = spawn.Process(target=importlib.import_module, args=('tools.tether',))\n"
        "if __name__ == '__main__':\n    p.start(); p.join(20); print(p.exitcode)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "1\n", done.stderr
