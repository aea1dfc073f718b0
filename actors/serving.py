"""Tool and judge servers: Ray Serve deployments around `tools.base.Tool` and `rewards.base.Judge`, and their clients.

A pool is a set of Serve applications that share a name prefix: `POOL-tool-NAME` and `POOL-judge-NAME`. Training and
the deployed agent call the same ones. What crosses the wire is data: a call's own failure is a value, so that an
exception always means infrastructure.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from agent.render import Made
from replay.record import Blob
from rewards.base import JudgeFailed, Rendered, Verdict
from tools.base import CallFailed, ToolResult, load

T = TypeVar("T")

CACHE_SIZE = 2048  # results kept by a replica
TRIES = 3  # of a call, for infrastructure failures only


class Outage(Exception):
    """A server gave no usable answer, in time, several times. Says which one."""


@serve.deployment
class ToolServer:
    """One tool. Calls run in threads; equal calls run once, also when they come at the same time.

    Args:
        name: of the tool, built in or from an entry point.
        options: its keyword options.
        concurrency: calls that run at once.
    """

    def __init__(self, name: str, options: Mapping[str, Any], concurrency: int) -> None:
        self._tool = load(name)(**options)
        self._threads = ThreadPoolExecutor(concurrency)
        self._cache: OrderedDict[str, asyncio.Task[Made]] = OrderedDict()

    async def run(self, params: dict[str, Any], images: list[Blob]) -> Made:
        key = _content(params, images)
        task = self._cache.get(key)
        if task is None:
            task = self._cache[key] = asyncio.create_task(_in_thread(self._threads, self._call, params, images))
            task.add_done_callback(lambda done: self._forget_failure(key, done))
            while len(self._cache) > CACHE_SIZE:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return await asyncio.shield(task)

    def _call(self, params: dict[str, Any], images: list[Blob]) -> Made:
        try:
            result = self._tool.run(params, images)
        except CallFailed as failed:
            return Made(failure=str(failed) or "the tool gave no reason")
        if not isinstance(result, ToolResult) or not result.images:
            raise TypeError(f"{type(self._tool).__name__} answered {type(result).__name__} without a picture")
        return Made(result.images, result.provenance)

    def _forget_failure(self, key: str, done: asyncio.Task[Made]) -> None:
        if done.cancelled() or done.exception() is not None:
            self._cache.pop(key, None)


@serve.deployment
class JudgeServer:
    """One judge; a request is a batch of documents.

    Args:
        judge: `module:class`.
        options: its keyword options.
        concurrency: documents that are judged at once, of whatever batch.
    """

    def __init__(self, judge: str, options: Mapping[str, Any], concurrency: int) -> None:
        module, _, cls = judge.partition(":")
        self._judge = getattr(__import__(module, fromlist=[cls]), cls)(**options)
        self._threads = ThreadPoolExecutor(concurrency)

    async def judge(self, docs: list[Rendered]) -> list[Verdict | str]:
        """A verdict a document, or why there is none."""
        return list(await asyncio.gather(*(_in_thread(self._threads, self._one, doc) for doc in docs)))

    def _one(self, doc: Rendered) -> Verdict | str:
        try:
            return self._judge.judge(doc)
        except JudgeFailed as failed:
            return str(failed) or "the judge gave no reason"
        except Exception as error:  # one document must not take the others of its batch with it
            return f"the judge broke: {type(error).__name__}: {error}"


class _Client:
    """Calls one server with a deadline, and again if it fails."""

    def __init__(self, app: str, what: str, timeout_s: float) -> None:
        self._app, self._what, self._timeout_s = app, what, timeout_s
        self._handle: Any = None

    async def _ask(self, method: str, expected: type, *args: Any) -> Any:
        for attempt in range(1, TRIES + 1):
            try:
                if self._handle is None:
                    self._handle = serve.get_app_handle(self._app)
                answer = await asyncio.wait_for(getattr(self._handle, method).remote(*args), self._timeout_s)
                if isinstance(answer, expected):
                    return answer
                problem = f"answered {type(answer).__name__} instead of {expected.__name__}"
            except TimeoutError:
                problem = f"did not answer in {self._timeout_s:g} s"
            except (RayError, RayServeException) as error:
                problem = f"failed: {_last_line(error)}"
            await asyncio.sleep(0.2 * attempt)
        raise Outage(f"{self._what} {problem}")


class ToolClient(_Client):
    """One tool of a pool."""

    def __init__(self, pool: str, name: str, timeout_s: float) -> None:
        super().__init__(tool_app(pool, name), f"tool {name!r}", timeout_s)

    async def run(self, params: Mapping[str, Any], images: Sequence[Blob]) -> Made:
        """Run a call. Raises Outage."""
        return await self._ask("run", Made, dict(params), list(images))


class JudgeClient(_Client):
    """One judge of a pool."""

    def __init__(self, pool: str, name: str, timeout_s: float) -> None:
        super().__init__(judge_app(pool, name), f"judge {name!r}", timeout_s)

    async def judge(self, docs: list[Rendered]) -> list[Verdict | str]:
        """A verdict a document, or why there is none. Raises Outage."""
        verdicts = await self._ask("judge", list, docs)
        return [v if isinstance(v, Verdict | str) else f"{self._what} answered {type(v).__name__}" for v in verdicts]


async def _in_thread(threads: ThreadPoolExecutor, func: Callable[..., T], *args: Any) -> T:
    """Run a function in a pool of our own: Serve gives a replica that asks for a part of a core five threads."""
    return await asyncio.get_running_loop().run_in_executor(threads, func, *args)


def tool_app(pool: str, name: str) -> str:
    return f"{pool}-tool-{name}"


def judge_app(pool: str, name: str) -> str:
    return f"{pool}-judge-{name}"


def _content(params: Mapping[str, Any], images: Sequence[Blob]) -> str:
    text = json.dumps([params, [b.sha256 for b in images]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
