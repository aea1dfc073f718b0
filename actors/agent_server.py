"""The deployed agent: an engine that writes documents with the tools of a pool, and the gateway before it.

The agents use the tool servers that training uses. A call starts as soon as its tag closes, while the text is still
being written. A tool that is down costs the document a picture, never its text.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve

from actors.engine import Engine, Piece, PromptRefused
from actors.serving import JudgeClient, Outage, ToolClient, last_line
from actors.writer import EngineWriter
from agent.answer import News, Sampled, Usage, events_of, write
from agent.render import Made
from agent.scaling import scaled
from agent.service.api import build
from agent.service.core import Options, Service
from agent.service.edge import audit
from agent.service.files import Files
from agent.service.jobs import AgentLost, Question, Refused
from agent.service.keys import Keys, Limits
from agent.spec import ToolSpec
from agent.workshop import CannotWrite, Workshop
from replay.record import Blob
from replay.storage import in_bucket
from rewards.base import JudgeFailed, Rendered, Verdict
from rewards.expected import Ask, Expected
from tools.base import CallFailed
from tools.download import Downloader, clean
from tools.fetch import Refused as NoPicture

JOIN_S = 0.05  # what happens within it travels together: a message costs more than a token
READY_S = 5.0
SWEEP_S = 3600.0
AUDIT_BYTES, AUDIT_FILES = 64 << 20, 8


@serve.deployment
class Agent:
    """One engine that writes documents.

    Args:
        model: folder of the policy: a path or `s3://...`.
        pool: name prefix of the tool servers.
        tools: tool name -> seconds a call may take.
        judge_s: seconds that a verdict may take.
        document_s: seconds that the calls of a document may take after its text is written.
        specs: the protocol's tools.
        system: system prompt, or "" for none.
        sampling: vLLM's SamplingParams.
        engine: vLLM's engine arguments.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        *,
        model: str,
        pool: str,
        tools: Mapping[str, float],
        judge_s: float,
        document_s: float,
        specs: Mapping[str, ToolSpec],
        system: str,
        sampling: Mapping[str, Any],
        engine: Mapping[str, Any],
    ) -> None:
        self._specs, self._document_s = specs, document_s
        self._tools = _Tools(pool, tools)
        self._judges = Expected(*(_asks(pool, name, judge_s) for name in ("text", "image")))
        self._engine = Engine(model, 0, engine)
        self._writer = EngineWriter(self._engine, system, sampling)
        await self._engine.start()

    async def check_health(self) -> None:
        """Serve replaces this replica when its engine has died."""
        self._engine.check()

    async def ready(self) -> bool:
        """Answers once the engine is up."""
        return True

    async def write(self, question: Question) -> AsyncGenerator[list[News] | str, None]:
        """The events of an answer, those of JOIN_S together; a string says why there can be none."""
        told: list[News] = []
        news = asyncio.Event()

        def tell(event: News) -> None:
            told.append(event)
            news.set()

        task = asyncio.create_task(self._write(question, tell))
        task.add_done_callback(lambda _: news.set())
        try:
            while not task.done() or told:
                await news.wait()
                news.clear()
                if told:
                    batch = told[:]
                    told.clear()
                    yield batch
                    await asyncio.wait({task}, timeout=JOIN_S)
            task.result()
        except (PromptRefused, CannotWrite) as error:
            yield f"prompt: {error}"
        finally:
            task.cancel()
            with suppress(BaseException):
                await task

    async def _write(self, question: Question, tell: Callable[[News], None]) -> None:
        if question.scale > 1 and not question.written:  # where another agent was lost, what it wrote is whole
            await self._scale(question, tell)
            return
        told: list[Piece] = []

        async def pieces() -> AsyncIterator[str]:
            writer = self._writer.asked(question.sampling)
            stream = writer.stream(question.messages, question.written, logprobs=question.learn)
            async with aclosing(stream):
                async for piece in stream:
                    told.append(piece)
                    yield piece.text

        await write(question.text, pieces(), question.given, self._tools.run, self._specs, self._document_s, tell)
        tell(self._usage(question, told))

    def _usage(self, question: Question, told: Sequence[Piece]) -> Usage:
        prompt = self._writer.prompt_ids(question.messages)
        ids = [token for piece in told for token in piece.token_ids]
        sampled = None
        if question.learn and not question.written:  # what another agent began is no sample of this one's
            sampled = Sampled(prompt, ids, [odds for piece in told for odds in piece.logprobs])
        return Usage(len(prompt), len(ids), told[-1].finish or "stop", sampled)

    async def _scale(self, question: Question, tell: Callable[[News], None]) -> None:
        seed = question.sampling.get("seed")
        shop = Workshop(
            question.messages,
            question.given,
            self._writer.asked(question.sampling),
            self._tools,
            self._judges,
            self._specs,
            self._document_s,
            random.getrandbits(31) if seed is None else seed,
        )
        document = await scaled(shop, question.scale, tell=tell)
        for event in events_of(document):
            tell(event)
        prompt = len(self._writer.prompt_ids(question.messages))
        tell(Usage(prompt, shop.spent.tokens, "stop" if document.finished else "length"))


class _Tools:
    """The tools of a pool (`agent.workshop.Tools`); one that is down has failed, for nobody tries it again later."""

    def __init__(self, pool: str, timeouts: Mapping[str, float]) -> None:
        self._clients = {name: ToolClient(pool, name, timeout_s) for name, timeout_s in timeouts.items()}

    async def run(self, tool: str, params: Mapping[str, Any], images: Sequence[Blob]) -> Made:
        try:
            return await self._clients[tool].run(params, images)
        except Outage as outage:
            return Made(failure=str(outage))


def _asks(pool: str, name: str, timeout_s: float) -> Ask:
    """A judge of a pool, as `rewards.expected` asks it."""
    client = JudgeClient(pool, name, timeout_s)

    async def ask(doc: Rendered) -> Verdict:
        try:
            (verdict,) = await client.judge([doc])
        except Outage as outage:
            raise JudgeFailed(str(outage)) from outage
        if isinstance(verdict, str):
            raise JudgeFailed(verdict)
        return verdict

    return ask


class _Agents:
    """The agents behind a gateway (`agent.service.jobs.Agents`)."""

    def __init__(self, handles: Mapping[str, Any]) -> None:
        self._handles = dict(handles)
        self.shares: dict[str, float] = {}

    def weights(self) -> Mapping[str, float]:
        return self.shares

    async def ready(self) -> bool:
        """Whether one of them answers."""
        asked = [asyncio.ensure_future(_answers(self._handles[name])) for name in self.shares]
        return any(await asyncio.gather(*asked))

    async def write(self, policy: str, question: Question) -> AsyncGenerator[Sequence[News], None]:
        response = self._handles[policy].options(stream=True).write.remote(question)
        try:
            async for batch in response:
                if isinstance(batch, str):
                    raise Refused(batch)
                yield batch
        except (Refused, asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as error:  # of Ray, of Serve, or of the agent: all the same from here
            raise AgentLost(last_line(error)) from error
        finally:
            response.cancel()


async def _answers(handle: Any) -> bool:
    try:
        return bool(await asyncio.wait_for(handle.ready.remote(), READY_S))
    except Exception:
        return False


@serve.deployment
@serve.ingress()
class Gateway:
    """The HTTP API.

    Args:
        agents: policy -> handle of its deployment; `reconfigure` gives their shares.
        keys: SHA-256 of each API key -> its name.
        limits: of a key.
        folder: where documents, pictures and the audit log are kept.
        keep_s: seconds for which.
        deadline_s: seconds that a document may take.
        body_bytes: most of a request.
        learn: whether documents are kept to be trained on, of those who allow it.
    """

    def __init__(
        self,
        agents: Mapping[str, Any],
        keys: Mapping[str, str],
        limits: Limits,
        folder: str,
        keep_s: float,
        deadline_s: float,
        body_bytes: int,
        learn: bool,
    ) -> None:
        self._agents = _Agents(agents)
        self._files = Files(folder, keep_s)
        options = Options(deadline_s, body_bytes, read_picture, _fetcher(), learn)
        self._service = Service(self._agents, Keys(keys, limits), self._files, options)
        self._sweeping: asyncio.Task[None] | None = None
        if not in_bucket(folder):
            _log_to(Path(folder) / "audit.jsonl")

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build(self._service)

    async def reconfigure(self, shares: Mapping[str, float]) -> None:
        """Take the policies' shares; documents under way stay where they are."""
        self._agents.shares = dict(shares)
        if self._sweeping is None:
            self._sweeping = asyncio.create_task(self._sweep())

    async def _sweep(self) -> None:
        while True:
            await asyncio.to_thread(self._files.sweep)
            await asyncio.sleep(SWEEP_S)


def read_picture(data: bytes) -> Blob:
    """A user's picture, of which only the pixels are kept. Raises ValueError if it is none that can be read."""
    try:
        return clean(data)
    except NoPicture as refused:
        raise ValueError(str(refused)) from refused


def _fetcher() -> Any:
    downloader = Downloader()

    def fetch(url: str) -> Blob:
        try:
            return downloader.picture(url)
        except CallFailed as error:
            raise ValueError(str(error)) from error
        except Exception as error:
            raise ValueError(f"the picture could not be fetched: {error}") from error

    return fetch


def _log_to(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = RotatingFileHandler(path, maxBytes=AUDIT_BYTES, backupCount=AUDIT_FILES, delay=True)
    handler.setFormatter(logging.Formatter("%(message)s"))
    audit.addHandler(handler)
    audit.setLevel(logging.INFO)
    audit.propagate = False
