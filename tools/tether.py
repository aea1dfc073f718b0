"""A vLLM engine ends with the process that started it, however that died: vLLM's own processes would stay behind.

vLLM imports `WorkerExtension` in each process that holds a part of the model. A thread there waits for the owner's end.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Sequence

import psutil

_OWNER = "LLMI_ENGINE_OWNER"


class WorkerExtension:
    """Handed to vLLM as `worker_extension_cls`, by `tie` or as the base of another one: its import is what counts."""


def tie() -> str:
    """Engines that this process starts from now on end with it; returns their `worker_extension_cls`."""
    os.environ[_OWNER] = str(os.getpid())
    return "tools.tether.WorkerExtension"


def _watch() -> None:
    owner, above = int(os.environ.get(_OWNER, "0")), psutil.Process().parents()  # the nearest first
    pids = [process.pid for process in above]
    if owner in pids:
        at = pids.index(owner)
        threading.Thread(target=_end_with, args=(above[at], above[:at]), name="tether", daemon=True).start()
    elif owner and multiprocessing.parent_process() and not psutil.pid_exists(owner):
        os._exit(1)  # it was gone before we came here


def _end_with(owner: psutil.Process, between: Sequence[psutil.Process]) -> None:
    """Wait for the owner's end, then end those that it started on the way to this process, and this one."""
    owner.wait()
    for process in between:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(1)


_watch()
