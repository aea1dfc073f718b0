"""Asking a service no more often than it wants to be asked: its quota, and what it says when it has had enough."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

from limits import parse_many
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

FIRST_S, LONGEST_S = 1.0, 60.0  # pauses after refusals that do not say for how long; doubled each time
MOST_ASKED_S = 3600.0  # of a pause that is asked for: it is then tried again


class Busy(Exception):
    """The service may not be asked in time. `after_s` seconds later it may."""

    def __init__(self, after_s: float) -> None:
        super().__init__(f"may not be asked for another {after_s:.0f} s")
        self.after_s = after_s


class Throttle:
    """One service's quota; thread-safe. It counts the requests of this process alone.

    Args:
        quota: as "1/second; 2000/month".

    Raises:
        ValueError: another form.
    """

    def __init__(self, quota: str) -> None:
        try:
            self._quotas = parse_many(quota)
        except ValueError as error:
            raise ValueError(f"a quota must read as '1/second; 2000/month', not {quota!r}") from error
        self._window = MovingWindowRateLimiter(MemoryStorage())
        self._lock = threading.Lock()
        self._until, self._refusals = 0.0, 0

    def wait(self, end: float) -> None:
        """Return when a request may be sent, which is counted.

        Args:
            end: when it must have been, on the monotonic clock.

        Raises:
            Busy: that is too late.
        """
        while (pause := self._pause()) > 0:
            if time.monotonic() + pause >= end:
                raise Busy(pause)
            time.sleep(pause)

    def answered(self) -> None:
        """The service has answered as it should."""
        with self._lock:
            self._refusals = 0

    def refused(self, headers: Mapping[str, str]) -> None:
        """The service has had enough: it is left alone for as long as it says, or a while."""
        with self._lock:
            pause = min(asked_pause(headers), MOST_ASKED_S) or min(FIRST_S * 2**self._refusals, LONGEST_S)
            self._refusals = min(self._refusals + 1, 16)
            self._until = max(self._until, time.monotonic() + pause)

    def _pause(self) -> float:
        """Seconds until a request may be sent; 0 if it may now, and is counted."""
        with self._lock:
            if (left := self._until - time.monotonic()) > 0:
                return left
            spent = [quota for quota in self._quotas if not self._window.test(quota)]
            if not spent:
                for quota in self._quotas:
                    self._window.hit(quota)
                return 0.0
            return max(0.01, *(self._window.get_window_stats(q).reset_time - time.time() for q in spent))


def asked_pause(headers: Mapping[str, str]) -> float:
    """Seconds that an answer asks to wait, by `Retry-After` (seconds or a date), or by `X-RateLimit-Reset` of the
    windows of which nothing remains (Brave's, one number a window); 0 where it does not say.
    """
    said = headers.get("Retry-After") or ""
    if re.fullmatch(r"\d{1,9}(\.\d+)?", said):
        return float(said)
    try:
        return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
    except (ValueError, OverflowError):
        pass
    remaining, resets = (re.findall(r"\d{1,9}", headers.get(f"X-RateLimit-{k}") or "") for k in ("Remaining", "Reset"))
    return float(max((int(r) for left, r in zip(remaining, resets, strict=False) if int(left) == 0), default=0))
