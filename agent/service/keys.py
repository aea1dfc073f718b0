"""Who may ask, and how much: API keys, requests a minute and documents at once of each."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

ANYBODY = "anybody"  # who asks where no keys are set


class Forbidden(Exception):
    """No key, or one that does not exist."""


class TooMuch(Exception):
    """A limit of the key is reached. `after_s` seconds later it may not be."""

    def __init__(self, message: str, after_s: float) -> None:
        super().__init__(message)
        self.after_s = after_s


@dataclass(frozen=True)
class Limits:
    """Of each key."""

    requests_per_minute: int
    documents_at_once: int


def parse_keys(text: str) -> dict[str, str]:
    """`NAME:KEY,NAME:KEY` as SHA-256 of the key -> name, so that the keys themselves are kept nowhere.

    Raises:
        ValueError: another form, or a name or key twice.
    """
    hashes: dict[str, str] = {}
    for pair in filter(None, (p.strip() for p in text.split(","))):
        name, _, key = pair.partition(":")
        if not name or len(key) < 16 or name in hashes.values() or _hash(key) in hashes:
            raise ValueError(
                "the keys must read NAME:KEY,NAME:KEY, each name and key once, and a key has at least 16 characters"
            )
        hashes[_hash(key)] = name
    return hashes


class Keys:
    """The keys and what each has spent.

    Args:
        hashes: SHA-256 of a key -> its name; without any, everybody is `ANYBODY`.
        limits: of each.
    """

    def __init__(self, hashes: Mapping[str, str], limits: Limits) -> None:
        self._hashes, self._limits = dict(hashes), limits
        self._window = MovingWindowRateLimiter(MemoryStorage())
        self._rate = RateLimitItemPerMinute(limits.requests_per_minute)
        self._at_once: Counter[str] = Counter()

    @property
    def open(self) -> bool:
        """Whether nobody needs a key."""
        return not self._hashes

    def owner(self, authorization: str) -> str:
        """The name behind an `Authorization` header. Raises Forbidden."""
        if self.open:
            return ANYBODY
        scheme, _, key = authorization.partition(" ")
        name = self._hashes.get(_hash(key.strip()))  # by hash, so that its time tells nothing of the key
        if scheme.lower() != "bearer" or name is None:
            raise Forbidden("this needs `Authorization: Bearer KEY` with a key of this service")
        return name

    def spend(self, owner: str) -> None:
        """Count a request. Raises TooMuch."""
        if not self._window.hit(self._rate, owner):
            raise TooMuch(f"more than {self._limits.requests_per_minute} requests in a minute", self._wait(owner))

    def take(self, owner: str) -> None:
        """Take a place for a document, until `give`. Raises TooMuch."""
        if self._at_once[owner] >= self._limits.documents_at_once:
            raise TooMuch(f"{self._limits.documents_at_once} documents of this key are being written", 5.0)
        self._at_once[owner] += 1

    def give(self, owner: str) -> None:
        """Give a place back."""
        self._at_once[owner] -= 1

    def _wait(self, owner: str) -> float:
        return max(1.0, self._window.get_window_stats(self._rate, owner).reset_time - time.time())


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode(errors="replace")).hexdigest()
