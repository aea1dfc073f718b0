"""The `search` tool: finds pictures of real things by words, and takes the best one that can be had."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from agent.spec import PUBLISHED
from replay.record import Blob
from tools.base import CallFailed, ToolResult
from tools.collection import Folder, collection
from tools.fetch import FetchFailed, Unreachable
from tools.hits import Hit, Provider
from tools.remote import ServiceFailed
from tools.search_engines import Brave, Commons, SearXNG, SerpApi

QUOTED = 60  # characters of a query that a reason repeats
SPARE = 9  # hits beyond those wanted, for those that cannot be taken
PICTURE_S = 8.0  # for one picture of several

#: By name in the config.
PROVIDERS: dict[str, Callable[..., Provider]] = {
    "collection": collection,
    "folder": Folder,
    "commons": Commons,
    "searxng": SearXNG,
    "brave": Brave,
    "serpapi": SerpApi,
}


class SearchTool:
    """Looks for pictures. `run` may be called from several threads at once.

    Args:
        provider: where to look: a name of `PROVIDERS`, or one at hand.
        top: pictures a call returns, at most; at least 1.
        timeout_s: of a whole call, downloads included; the pool's `timeout_s` should be above it.
        dollars: what a call costs.
        options: of the provider.
    """

    spec = PUBLISHED["search"]

    def __init__(
        self,
        provider: str | Provider = "collection",
        top: int = 1,
        timeout_s: float = 25.0,
        dollars: float = 0.0,
        **options: Any,
    ) -> None:
        if top < 1:
            raise ValueError(f"search: top must be at least 1, not {top}")
        if isinstance(provider, str) and provider not in PROVIDERS:
            raise ValueError(f"search: there is no provider {provider!r}; there are {', '.join(PROVIDERS)}")
        self._provider = PROVIDERS[provider](**options) if isinstance(provider, str) else provider
        self._top, self._timeout_s, self._dollars = top, timeout_s, dollars

    def run(self, params: Mapping[str, Any], images: Sequence[Blob] = ()) -> ToolResult:
        """The best pictures for `params["query"]` that can be had; the provenance is the first one's, further ones are
        in `others`.

        `params["rank"]`, which test-time scaling may add, leaves out so many better ones.

        Raises:
            CallFailed: the query is empty, nothing is relevant to it, or none of what was found is a picture.
            ServiceFailed: the provider failed, or no server with a picture answered.
        """
        query = str(params["query"]).strip()
        if not query:
            raise CallFailed("the search query is empty: say what the picture shows")
        quoted = repr(query if len(query) <= QUOTED else query[:QUOTED] + "...")
        end = time.monotonic() + self._timeout_s
        rank = int(params.get("rank", 0))
        hits = self._provider.search(query, rank + self._top + SPARE, self._timeout_s)[rank:]
        if not hits:
            raise CallFailed(f"no picture found for {quoted}: {self._provider.hint}")
        taken, failures = self._take(hits, end)
        if taken:
            (best, *others), pictures = zip(*taken, strict=True)
            return ToolResult(pictures, best | {"others": others} if others else best)
        why = f"none of the {len(hits)} pictures found for {quoted} could be taken; of the last: {failures[-1]}"
        if all(isinstance(failure, Unreachable) for failure in failures):
            raise ServiceFailed(f"search: {why}")
        raise CallFailed(f"{why}: {self._provider.hint}")

    def cost(self, params: Mapping[str, Any]) -> float:
        """US dollars of a call."""
        return self._dollars

    def _take(self, hits: Sequence[Hit], end: float) -> tuple[list[tuple[dict[str, Any], Blob]], list[FetchFailed]]:
        """Provenance and picture of the first hits that can be had, and why others could not."""
        taken: dict[str, tuple[dict[str, Any], Blob]] = {}
        failures: list[FetchFailed] = []
        for hit in hits:
            left = end - time.monotonic()
            if len(taken) == self._top or left <= 0:
                break
            try:
                picture = hit.fetch(min(PICTURE_S, left))
            except FetchFailed as failure:
                failures.append(failure)
                continue
            when = {"fetched": datetime.now(UTC).isoformat(timespec="seconds")} if hit.url else {}
            about = {"maker": self._provider.name} | hit.provenance() | when | {"sha256": picture.sha256}
            taken.setdefault(picture.sha256, (about, picture))
        return list(taken.values()), failures or [Unreachable("there was no time left")]
