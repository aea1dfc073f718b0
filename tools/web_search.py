"""Searching for pictures by a remote engine's API: asked within its quota, answered from a cache, never trusted.

An engine is its question and how its answer is read (`tools/search_engines.py`). What it answers is data of strangers:
its links are followed by `tools.download` alone, its texts are cut short and stripped of markup.
"""

from __future__ import annotations

import html
import json
import os
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple
from urllib.parse import urlencode, urljoin, urlsplit

from cachetools import TTLCache

from replay.record import Blob
from tools.download import Downloader
from tools.fetch import Fetcher, FetchFailed, Reply, Unreachable
from tools.hits import Hit, ranked
from tools.remote import ServiceFailed, is_here
from tools.throttle import Busy, Throttle

WANTED = 30  # answers that an engine is asked for
LONGEST_QUERY = 300  # characters of a query that are sent; Brave takes 400
MOST_BYTES = 4 * 2**20  # of an engine's answer
CACHED = 4096  # queries whose answers are kept
SMALLEST = 64  # pixels of the shorter side; what is smaller is no picture to show
LONGEST_TEXT = 300  # characters of a title, a caption or a name


class Found(NamedTuple):
    """One answer of an engine, as it is written there: HTML and all. `urls` are tried in order."""

    urls: Sequence[object]
    page: object = ""
    title: object = ""
    caption: object = ""
    author: object = ""
    licence: object = "unknown"
    source: object = ""
    size: tuple[object, object] = (0, 0)


class Engine(ABC):
    """A search engine (`tools.hits.Provider`); thread-safe.

    Args:
        url: of its API, up to the paths; the engine's own by default.
        quota: how often it is asked at most by this replica, as "1/second; 2000/month".
        cache_s: seconds for which its answers are kept.
        contact: a mail address or page of who runs this, for its `User-Agent`.
        downloader: takes the pictures.

    Raises:
        ValueError: the URL is none, or the key is missing or would be sent in the clear.
    """

    name: str
    hint = "ask in other words, or for something else"
    home: ClassVar[str | None] = None
    key_variable: ClassVar[str | None] = None
    quota: ClassVar[str] = "2/second"

    def __init__(
        self,
        url: str | None = None,
        quota: str | None = None,
        cache_s: float = 3600.0,
        contact: str = "",
        downloader: Downloader | None = None,
    ) -> None:
        if (place := url or self.home) is None:
            raise ValueError(f"search: {self.name} needs its `url`")
        parts = urlsplit(place)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise ValueError(f"search: the url of {self.name} must read https://HOST/PATH, with no user or query")
        self._url, self._host = place.rstrip("/"), parts.hostname
        self._key = self._read_key(parts.scheme == "https" or is_here(parts.hostname))
        agent = f"llmi/0.1 ({contact})" if contact else "llmi/0.1"
        # The address is the config's own, so that it may be a private one; a redirect is not, and is not followed.
        self._fetcher = Fetcher(
            allowed=lambda address: True, ports=range(1, 1 << 16), redirects=0, max_bytes=MOST_BYTES, agent=agent
        )
        self._downloader = downloader or Downloader(Fetcher(agent=agent))
        self._throttle = Throttle(quota or self.quota)
        self._lock = threading.Lock()
        self._answers: TTLCache[str, list[Hit]] = TTLCache(CACHED, cache_s)

    def _read_key(self, safe: bool) -> str:
        if self.key_variable is None:
            return ""
        key = os.environ.get(self.key_variable, "").strip()
        if not re.fullmatch(r"[!-~]+", key):
            raise ValueError(f"search: {self.name} needs a key: set the environment variable {self.key_variable}")
        if not safe:
            raise ValueError(f"search: the url of {self.name} must be https, as its key is sent there")
        return key

    def search(self, query: str, limit: int, timeout_s: float) -> list[Hit]:
        """What the engine knows, by relevance. Raises ServiceFailed."""
        query = " ".join(query.split())[:LONGEST_QUERY]
        with self._lock:
            hits = self._answers.get(query)
        if hits is None:
            answer = self._ask(query, time.monotonic() + timeout_s)
            hits = ranked(query, list(self._read(answer)))
            with self._lock:
                self._answers[query] = hits
        return hits[:limit]

    @abstractmethod
    def _question(self, query: str) -> tuple[str, Mapping[str, object], Mapping[str, str]]:
        """Path, query parameters and headers that ask for `WANTED` pictures."""

    @abstractmethod
    def _found(self, answer: Any) -> Iterable[Found]:
        """What an answer holds, in its order. Whatever it raises means that the answer is not as it should be.

        Raises:
            ServiceFailed: the answer says that the engine failed.
            Overloaded: it says that it has had enough.
        """

    def _ask(self, query: str, end: float) -> list[Found]:
        path, parameters, headers = self._question(query)
        url = f"{self._url}{path}?{urlencode(parameters)}"
        while True:
            try:
                self._throttle.wait(end)
                reply = self._fetcher.get(url, {"Accept": "application/json", **headers}, end - time.monotonic())
            except Busy as busy:
                raise self._failed(f"{busy}: its quota is used up, or it has asked to wait") from None
            except FetchFailed as failure:
                raise self._failed(f"did not answer: {failure}") from None
            try:
                if reply.status in (429, 503):
                    raise Overloaded
                found = list(self._found(self._answer(reply)))
            except Overloaded:
                self._throttle.refused(reply.headers)  # type: ignore[arg-type]
                continue
            except ServiceFailed:
                raise
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise self._failed(f"answered something else than its API says: {type(error).__name__}") from None
            self._throttle.answered()
            return found

    def _answer(self, reply: Reply) -> Any:
        if reply.status == 200:
            return json.loads(reply.body)
        if reply.status in (401, 403):
            what = f"see the key in {self.key_variable}" if self.key_variable else "it may not offer JSON to everyone"
            raise self._failed(f"refused the request ({reply.status}): {what}")
        raise self._failed(f"answered {reply.status}")

    def _read(self, found: Sequence[Found]) -> Iterator[Hit]:
        """Hits of what can be a picture, each once."""
        seen: set[str] = set()
        for one in found:
            urls = [urljoin(self._url, url) for url in one.urls if isinstance(url, str) and url]
            urls = [url for url in urls if url.startswith(("http://", "https://"))]
            side = min(_number(one.size[0]), _number(one.size[1]))
            if not urls or urls[0] in seen or 0 < side < SMALLEST:
                continue
            seen.add(urls[0])
            page = one.page if isinstance(one.page, str) and one.page.startswith(("http://", "https://")) else ""
            texts: dict[str, Any] = {key: text(getattr(one, key)) for key in ("title", "caption", "author", "licence")}
            source = text(one.source) or urlsplit(page or urls[0]).hostname or self.name
            yield Hit(source=source, url=urls[0], page=page, side=side, **texts, fetch=partial(self._fetch, urls))

    def _fetch(self, urls: Sequence[str], timeout_s: float) -> Blob:
        """The picture itself, or its smaller copy where that cannot be had."""
        end = time.monotonic() + timeout_s
        *first, last = urls
        for url in first:
            try:
                return self._downloader.picture(url, (end - time.monotonic()) / 2)
            except FetchFailed:
                continue
        if (left := end - time.monotonic()) <= 0:
            raise Unreachable("no complete answer in time")
        return self._downloader.picture(last, left)

    def _failed(self, what: str) -> ServiceFailed:
        return ServiceFailed(f"search: {self.name} at {self._host} {what}")


class Overloaded(Exception):
    """The engine has had enough of questions."""


def text(markup: object) -> str:
    """A stranger's HTML as one short line without markup."""
    if not isinstance(markup, str):
        return ""
    line = " ".join(html.unescape(re.sub(r"<[^<>]*>", " ", markup[: 20 * LONGEST_TEXT])).split())
    return line if len(line) <= LONGEST_TEXT else line[: LONGEST_TEXT - 3] + "..."


def _number(said: object) -> int:
    """Pixels; 0 where they are not told."""
    if isinstance(said, str) and said.isdecimal():
        return int(said[:9])
    return int(said) if isinstance(said, int | float) and 0 < said < 1e9 else 0
