"""Peak memory of a run: the sum of PSS (shared pages counted once) over this process, Ray's, and all their children."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import psutil

INTERVAL_S = 5.0


class PeakMemory:
    """Samples in a thread while it is entered; `peak_mib` is the largest sum seen, in MiB.

    Args:
        session: a string in the command lines of the Ray processes that count (its session folder).
    """

    def __init__(self, session: str) -> None:
        self._session, self.peak_mib = session, 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.peak_mib = max(self.peak_mib, total_mib(self._session))
            self._stop.wait(INTERVAL_S)


def total_mib(session: str) -> float:
    """Sum of PSS now, in MiB."""
    processes: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid == psutil.Process().pid or session in " ".join(process.cmdline()):
                processes |= {p.pid: p for p in [process, *process.children(recursive=True)]}
    return sum(_pss_kib(pid) for pid in processes) / 1024


def _pss_kib(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    except OSError:  # it ended meanwhile
        pass
    return 0
