"""Tool and judge servers: Ray Serve deployments around `tools.base.Tool` and `rewards.base.Judge`, and their clients.

A pool is a set of Serve applications that share a name prefix: `POOL-tool-NAME` and `POOL-judge-NAME`. Training and
the deployed agent call the same ones. What crosses the wire is data: a call's own failure is a value, so that an
exception always means infrastructure.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from ray import serve
from ray.serve.exceptions import BackPressureError

from actors import metrics
from agent.render import Made
from replay.record import Blob
from rewards.base import JudgeFailed, Rendered, Verdict
from tools.base import CallFailed, ToolResult, imported, load

T = TypeVar("T")

CACHE_SIZE, CACHE_BYTES = 4096, 256 << 20  # results kept by a replica, and bytes of their pictures
TRIES = 3  # of a call, for infrastructure failures only
LONGEST_PAUSE_S = 2.0  # before a call that was refused is tried again
HUNG = 2.0  # times as long as anybody waits for a call: then its thread has hung
CHECK_S = 30.0  # a tool's own check
IN_TIME = 0.9  # share of a caller's time after which a judge answers with what it has


class Outage(Exception):
    """A server gave no usable answer, in time, several times. Says which one."""


class _Waiting(NamedTuple):
    """A call that waits for a worker, and where its answer goes."""

    params: Mapping[str, Any]
    images: Sequence[Blob]
    answer: asyncio.Future[Made]


@serve.deployment
class ToolServer:
    """One tool. Calls run in threads; equal calls run once, also when they come at the same time.

    A tool that takes several calls at once (`batch`) has one thread, which takes all that wait as soon as it is free.

    Args:
        name: of the tool in the protocol.
        use: its implementation (`tools.base.load`).
        options: its keyword options.
        concurrency: calls that run at once.
        timeout_s: seconds that a caller waits for a call.
    """

    def __init__(self, name: str, use: str, options: Mapping[str, Any], concurrency: int, timeout_s: float) -> None:
        self._name, self._stage = name, tool_stage(name)
        self._tool: Any = load(use)(**options)
        self._batch = getattr(self._tool, "batch", 1)
        self._workers = 1 if self._batch > 1 else concurrency
        self._hung_s = HUNG * timeout_s
        self._threads = ThreadPoolExecutor(self._workers + 1)  # one is for `check`
        self._waiting: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._busy_since: dict[int, float] = {}
        self._under_way = 0
        self._cache: OrderedDict[str, asyncio.Future[Made]] = OrderedDict()
        self._cached_bytes = 0

    async def run(self, params: dict[str, Any], images: list[Blob]) -> Made:
        started = time.monotonic()
        self._count_under_way(+1)
        try:
            return await asyncio.shield(self._answer(params, images))
        finally:
            self._count_under_way(-1)
            metrics.observe("seconds", time.monotonic() - started, stage=self._stage)

    async def check_health(self) -> None:
        """Serve replaces this replica when it raises: the tool is broken, or has hung in all of its threads."""
        busy = self._busy_since.values()
        if len(busy) == self._workers and time.monotonic() - max(busy) > self._hung_s:
            raise RuntimeError(f"all calls of tool {self._name!r} have hung for {self._hung_s:g} s")
        if hasattr(self._tool, "check"):
            await asyncio.wait_for(_in_thread(self._threads, self._tool.check), CHECK_S)

    def __del__(self) -> None:
        """Serve calls it when the replica is stopped, and Python again later."""
        close = getattr(self.__dict__.pop("_tool", None), "close", None)
        if close is not None:
            close()

    def _answer(self, params: Mapping[str, Any], images: Sequence[Blob]) -> asyncio.Future[Made]:
        """The answer of a call that ran, runs or will run."""
        while len(self._tasks) < self._workers:
            self._tasks.append(asyncio.create_task(self._work(len(self._tasks))))
        key = _content(params, images)
        answer = self._cache.get(key)
        if answer is None:
            answer = self._cache[key] = asyncio.get_running_loop().create_future()
            answer.add_done_callback(lambda done: self._keep(key, done))
            self._waiting.put_nowait(_Waiting(params, images, answer))
        else:
            metrics.count("cache_hits", stage=self._stage)
        self._cache.move_to_end(key)
        return answer

    async def _work(self, worker: int) -> None:
        while True:
            calls = [await self._waiting.get()]
            while len(calls) < self._batch and not self._waiting.empty():
                calls.append(self._waiting.get_nowait())
            self._busy_since[worker] = time.monotonic()
            results = await _in_thread(self._threads, self._call, calls)
            del self._busy_since[worker]
            for call, result in zip(calls, results, strict=True):
                if isinstance(result, Made):
                    call.answer.set_result(result)
                else:
                    call.answer.set_exception(result)

    def _call(self, calls: Sequence[_Waiting]) -> list[Made | Exception]:
        """What became of each call; an exception is infrastructure."""
        try:
            if self._batch > 1:
                results = list(self._tool.run_many([(c.params, c.images) for c in calls]))
            else:
                results = [self._tool.run(calls[0].params, calls[0].images)]
            if len(results) != len(calls):
                raise TypeError(f"{type(self._tool).__name__} gave {len(results)} results for {len(calls)} calls")
        except (Exception, SystemExit) as error:
            if len(calls) > 1:  # whatever is wrong with one must not cost the others
                return [result for call in calls for result in self._call([call])]
            results = [RuntimeError(f"the tool ended its thread: {error}") if isinstance(error, SystemExit) else error]
        return [self._made(call, result) for call, result in zip(calls, results, strict=True)]

    def _made(self, call: _Waiting, result: Any) -> Made | Exception:
        if isinstance(result, CallFailed):
            metrics.count("failures", stage=self._stage, kind="call")
            return Made(failure=str(result) or "the tool gave no reason")
        if isinstance(result, ToolResult) and result.images:
            if hasattr(self._tool, "cost"):
                metrics.count("cost_dollars", self._tool.cost(call.params), stage=self._stage)
            return Made(result.images, result.provenance)
        metrics.count("failures", stage=self._stage, kind="infrastructure")
        if isinstance(result, Exception):
            return result
        return TypeError(f"{type(self._tool).__name__} answered {type(result).__name__} without a picture")

    def _keep(self, key: str, done: asyncio.Future[Made]) -> None:
        """Results stay in the cache, failures of ours do not; the oldest make room."""
        if done.cancelled() or done.exception() is not None:
            self._cache.pop(key, None)
        elif key in self._cache:
            self._cached_bytes += _size(done)
        while self._cached_bytes > CACHE_BYTES or len(self._cache) > CACHE_SIZE:
            self._cached_bytes -= _size(self._cache.popitem(last=False)[1])

    def _count_under_way(self, change: int) -> None:
        self._under_way += change
        metrics.gauge("under_way", self._under_way, stage=self._stage)


@serve.deployment
class JudgeServer:
    """One judge; a request is a batch of documents.

    Args:
        judge: `module:class`.
        options: its keyword options.
        concurrency: documents that are judged at once, of whatever batch.
        timeout_s: seconds that a caller waits for a batch.
    """

    def __init__(self, judge: str, options: Mapping[str, Any], concurrency: int, timeout_s: float) -> None:
        self._judge = imported(judge)(**options)
        self._concurrency, self._timeout_s = concurrency, timeout_s
        self._threads = ThreadPoolExecutor(concurrency)
        self._busy_since: dict[int, float] = {}

    async def judge(self, docs: list[Rendered]) -> list[Verdict | str]:
        """A verdict a document, or why there is none; a slow one does not keep the others of its batch back."""
        found = [asyncio.create_task(_in_thread(self._threads, self._one, doc)) for doc in docs]
        patience = IN_TIME * self._timeout_s
        if found:
            await asyncio.wait(found, timeout=patience)
        late = [task for task in found if not task.done()]
        for task in late:
            task.cancel()
        return [f"the judge did not answer in {patience:g} s" if task in late else task.result() for task in found]

    async def check_health(self) -> None:
        """Serve replaces this replica when it raises: the judge's engine is dead, or all of its threads hang."""
        busy = self._busy_since.values()
        if len(busy) == self._concurrency and time.monotonic() - max(busy) > HUNG * self._timeout_s:
            raise RuntimeError(f"all verdicts of the judge have hung for {HUNG * self._timeout_s:g} s")
        if hasattr(self._judge, "check"):
            self._judge.check()

    def __del__(self) -> None:
        """Serve calls it when the replica is stopped, and Python again later."""
        close = getattr(self.__dict__.pop("_judge", None), "close", None)
        if close is not None:
            close()

    def _one(self, doc: Rendered) -> Verdict | str:
        self._busy_since[threading.get_ident()] = time.monotonic()
        try:
            return self._judge.judge(doc)
        except JudgeFailed as failed:
            return str(failed) or "the judge gave no reason"
        except Exception as error:  # one document must not take the others of its batch with it
            return f"the judge broke: {type(error).__name__}: {error}"
        finally:
            del self._busy_since[threading.get_ident()]


class _Client:
    """Calls one server with a deadline, and again if it fails."""

    def __init__(self, app: str, what: str, timeout_s: float) -> None:
        self._app, self._what, self._timeout_s = app, what, timeout_s
        self._handle: Any = None

    async def _ask(self, method: str, expected: type, *args: Any) -> Any:
        tries, refusals, patience = 0, 0, time.monotonic() + self._timeout_s
        while tries < TRIES and time.monotonic() < patience + tries * self._timeout_s:
            try:
                if self._handle is None:
                    # Straight to the replica, and not through Ray's object store: a third of the time, and of the CPU's
                    self._handle = serve.get_app_handle(self._app).options(_by_reference=False)
                answer = await asyncio.wait_for(getattr(self._handle, method).remote(*args), self._timeout_s)
                if isinstance(answer, expected):
                    return answer
                problem = f"answered {type(answer).__name__} instead of {expected.__name__}"
            except BackPressureError:
                refusals += 1
                problem = f"refused the call {refusals} times: too many wait already"
                metrics.count("failures", stage=self._what, kind="refused")
                await asyncio.sleep(random.uniform(0.5, 1.0) * min(0.1 * 2**refusals, LONGEST_PAUSE_S))
                continue
            except TimeoutError:
                problem = f"did not answer in {self._timeout_s:g} s"
            except Exception as error:  # of the tool, of Serve or of gRPC: all the same from here
                problem = f"failed: {last_line(error)}"
            tries += 1
            await asyncio.sleep(0.2 * tries)
        raise Outage(f"{self._what} {problem}")


class ToolClient(_Client):
    """One tool of a pool."""

    def __init__(self, pool: str, name: str, timeout_s: float) -> None:
        super().__init__(tool_app(pool, name), tool_stage(name), timeout_s)

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


def tool_stage(name: str) -> str:
    """A tool's name in metrics and errors."""
    return f"tool {name!r}"


def tool_app(pool: str, name: str) -> str:
    return f"{pool}-tool-{name}"


def judge_app(pool: str, name: str) -> str:
    return f"{pool}-judge-{name}"


def _content(params: Mapping[str, Any], images: Sequence[Blob]) -> str:
    text = json.dumps([params, [b.sha256 for b in images]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _size(answer: asyncio.Future[Made]) -> int:
    """Bytes of the pictures of an answer, if it is there."""
    kept = answer.done() and not answer.cancelled() and answer.exception() is None
    return sum(len(blob.data) for blob in answer.result().images) if kept else 0


def last_line(error: BaseException) -> str:
    """What an error says at its end; those of Ray begin with a page of where it was."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
