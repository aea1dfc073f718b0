"""Tools in this process, without servers: for one document at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

from agent.render import Made
from replay.record import Blob
from tools.base import CallFailed, load


class LocalTools:
    """Runs calls in threads; a context, which gives back what the tools hold.

    Args:
        tools: name in the protocol -> (implementation, its options, seconds that a call may take).
    """

    def __init__(self, tools: Mapping[str, tuple[str, Mapping[str, Any], float]]) -> None:
        self._ways, self._tools = dict(tools), dict[str, Any]()
        # A thread a tool, since a tool need not be safe to call from several.
        self._threads = {name: ThreadPoolExecutor(1, f"tool-{name}") for name in tools}

    async def run(self, tool: str, params: Mapping[str, Any], images: Sequence[Blob]) -> Made:
        """What a call made. Whatever goes wrong is its failure: nobody tries it again."""
        timeout_s = self._ways[tool][2]
        try:
            work = asyncio.get_running_loop().run_in_executor(self._threads[tool], self._run, tool, params, images)
            result = await asyncio.wait_for(work, timeout_s)
        except TimeoutError:
            return Made(failure=f"tool {tool!r} did not answer in {timeout_s:g} s")
        except CallFailed as failed:
            return Made(failure=str(failed) or "the tool gave no reason")
        except Exception as error:
            return Made(failure=f"tool {tool!r} broke: {error}")
        return Made(result.images, result.provenance)

    def _run(self, name: str, params: Mapping[str, Any], images: Sequence[Blob]) -> Any:
        if name not in self._tools:  # only what a document asks for is loaded
            use, options, _ = self._ways[name]
            self._tools[name] = load(use)(**options)
        return self._tools[name].run(params, images)

    def __enter__(self) -> LocalTools:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None) -> None:
        for threads in self._threads.values():
            threads.shutdown(wait=False, cancel_futures=True)
        for tool in self._tools.values():
            getattr(tool, "close", lambda: None)()
