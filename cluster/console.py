"""What a run says: progress with rate and time left; one moving line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time

QUIET_S = 15.0  # between plain lines


def say(text: str) -> None:
    """One line."""
    print(text, flush=True)


class Progress:
    """Progress of one long job.

    Args:
        what: its name.
        total: units of work.
    """

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total = what, total
        self._started = time.monotonic()
        self._first: int | None = None
        self._last = 0.0
        self._ended = False
        self._moving = sys.stdout.isatty()

    def show(self, done: int, note: str = "") -> None:
        """Show how far it is; finishes the line when all is done, and says nothing after that."""
        now = time.monotonic()
        if self._first is None:
            self._first = done
        end = done >= self._total
        if self._ended:
            return
        self._ended = end
        if not end and now - self._last < (0.2 if self._moving else QUIET_S):
            return
        self._last = now
        rate = (done - self._first) / max(now - self._started, 1e-9)
        left = f", {_clock((self._total - done) / rate)} left" if rate and not end else ""
        line = f"{self._what} {done}/{self._total}{left}{'  ' + note if note else ''}"
        if self._moving:
            print(f"\r\x1b[K{line}", end="\n" if end else "", flush=True)
        else:
            say(line)

    def show_of(self, done: int, total: int, note: str = "") -> None:
        """`show` for a job whose total is known only now."""
        self._total = total
        self.show(done, note)


def _clock(seconds: float) -> str:
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"
