"""The deployed agent: an engine that writes documents with the tools of a pool, and the gateway before it.

The agents use the tool servers that training uses. A call starts as soon as its tag closes, while the text is still
being written. A tool that is down costs the document a picture, never its text.
"""

from __future__ import annotations

import asyncio
import io
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from PIL import Image
from ray import serve

from actors.engine import Engine
from actors.serving import Outage, ToolClient, last_line
from agent.answer import Usage, write
from agent.render import Event, Made
from agent.service.api import Options, Service, audit, build
from agent.service.files import Files
from agent.service.jobs import AgentLost, Question, Refused
from agent.service.keys import Keys, Limits
from agent.spec import ToolSpec
from replay.record import Blob
from replay.storage import in_bucket
from tools.base import CallFailed
from tools.download import Downloader

FORMATS = ("PNG", "JPEG", "WEBP")  # of the user's pictures
MAX_PIXELS = 50_000_000  # of one
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
        document_s: float,
        specs: Mapping[str, ToolSpec],
        system: str,
        sampling: Mapping[str, Any],
        engine: Mapping[str, Any],
    ) -> None:
        self._specs, self._system, self._sampling = specs, system, dict(sampling)
        self._document_s = document_s
        self._tools = {name: ToolClient(pool, name, timeout_s) for name, timeout_s in tools.items()}
        self._engine = Engine(model, 0, engine)
        await self._engine.start()

    async def check_health(self) -> None:
        """Serve replaces this replica when its engine has died."""
        self._engine.check()

    async def ready(self) -> bool:
        """Answers once the engine is up."""
        return True

    async def write(self, question: Question) -> AsyncGenerator[list[Event | Usage] | str, None]:
        """The events of an answer, those of JOIN_S together; a string says why there can be none."""
        from vllm.exceptions import VLLMClientError  # not above: the driver has no need of vLLM

        told: list[Event | Usage] = []
        news = asyncio.Event()

        def tell(event: Event | Usage) -> None:
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
        except VLLMClientError as error:  # too long for the model
            yield f"prompt: {error}"
        finally:
            task.cancel()
            with suppress(BaseException):
                await task

    async def _write(self, question: Question, tell: Any) -> None:
        ids = self._engine.chat_ids(self._framed(question.messages))
        before = self._engine.tokenizer.encode(question.written, add_special_tokens=False)
        tokens, finish = len(before), "stop"

        async def pieces() -> AsyncIterator[str]:
            nonlocal tokens, finish
            yield question.written
            sampling = self._sampling | dict(question.sampling)
            sampling["max_tokens"] = min(sampling["max_tokens"], self._sampling["max_tokens"]) - len(before)
            if sampling["max_tokens"] <= 0:
                return
            async with aclosing(self._engine.stream(uuid.uuid4().hex, [*ids, *before], sampling)) as stream:
                async for piece in stream:
                    tokens, finish = tokens + piece.tokens, piece.finish or finish
                    yield piece.text

        await write(question.text, pieces(), question.given, self._run, self._specs, self._document_s, tell)
        tell(Usage(len(ids), tokens, finish))

    def _framed(self, messages: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
        """The conversation under the agent's own system prompt, and the user's after it."""
        theirs = [m["content"] for m in messages if m["role"] == "system"]
        system = "\n\n".join(filter(None, [self._system, *theirs]))
        rest = [m for m in messages if m["role"] != "system"]
        return [{"role": "system", "content": system}, *rest] if system else rest

    async def _run(self, tool: str, params: Mapping[str, Any], images: Sequence[Blob]) -> Made:
        try:
            return await self._tools[tool].run(params, images)
        except Outage as outage:  # nobody tries it again later
            return Made(failure=str(outage))


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

    async def write(self, policy: str, question: Question) -> AsyncGenerator[Sequence[Event | Usage], None]:
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
    ) -> None:
        self._agents = _Agents(agents)
        self._files = Files(folder, keep_s)
        options = Options(deadline_s, body_bytes, read_picture, _fetcher())
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
    """A user's picture. Raises ValueError if it is none that can be read."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels, at most {MAX_PIXELS:,} are taken")
            image.load()
            return Blob(data, Image.MIME[str(image.format)])
    except ValueError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds for damaged data; each means the same here
        raise ValueError(f"this is no {', '.join(FORMATS)} picture that can be read") from error


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
