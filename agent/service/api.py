"""The service's HTTP API: documents, OpenAI's chat completions, pictures, health and the page."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import random
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from agent.answer import Document, Usage
from agent.document import CSS, render_html
from agent.export import outcome_json, to_markdown, to_page
from agent.protocol import OPEN
from agent.render import Began, CallOutcome, Ended, Event, Wrote
from agent.service import chat
from agent.service.files import Files
from agent.service.jobs import CANCELLED, DONE, WRITING, Agents, Job, Question
from agent.service.keys import Forbidden, Keys, TooMuch
from agent.service.live import Live
from replay.record import Blob

DRAW_S = 0.1  # between two states of a document that is told of as HTML
PAGE = Path(__file__).parent / "page"
PAGE_FILES = {"page.css": "text/css", "page.js": "text/javascript"}
NAMED = 1024  # finished jobs that are followed from memory; older ones come from the files
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "frame-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

audit = logging.getLogger("llmi.audit")


@dataclass(frozen=True)
class Options:
    """Of a service.

    Attributes:
        deadline_s: seconds that a document may take.
        body_bytes: most of a request.
        picture: reads a picture's bytes, or raises ValueError.
        fetch: gets a picture from the web, or raises ValueError.
    """

    deadline_s: float
    body_bytes: int
    picture: Callable[[bytes], Blob]
    fetch: Callable[[str], Blob]


class Problem(Exception):
    """What is told to the client, in the shape of OpenAI's errors."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", after_s: float = 0.0) -> None:
        super().__init__(message)
        self.status, self.kind, self.after_s = status, kind, after_s

    def response(self) -> Response:
        """As HTTP."""
        error = {"message": str(self), "type": self.kind, "param": None, "code": None}
        headers = {"Retry-After": str(int(self.after_s + 0.999))} if self.after_s else None
        return JSONResponse({"error": error}, self.status, headers)


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("there is nothing to answer: it is blank")
    return text


class Ask(BaseModel):
    """A document that is asked for: the prompt, the user's own pictures (data URLs, Base64 or http), and how.

    `stream` tells of it as server-sent events; `background` answers at once with its id, and goes on without a client.
    """

    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[chat.Text, AfterValidator(_not_blank)]
    images: list[str] = Field([], max_length=chat.MAX_IMAGES)
    model: str = ""
    seed: int | None = Field(None, ge=0, lt=2**63)
    stream: bool = False
    background: bool = False
    html: bool = Field(False, description="with `stream`: the document as HTML too, as it grows")


class Feedback(BaseModel):
    """What a reader thinks of a document."""

    model_config = ConfigDict(extra="forbid")

    thumb: Literal["up", "down"]
    comment: str = Field("", max_length=2000)


class AnsweredCall(BaseModel):
    """One tag: `status` is ok, failed or invalid; `images` are SHA-256 of the pictures that it made."""

    source: str
    description: str
    params: dict[str, Any]
    start: int
    end: int
    status: str
    reason: str
    images: list[str]
    provenance: dict[str, Any]
    seconds: float


class Made(BaseModel):
    """A document: `status` is writing, done, failed or cancelled; `images` are addresses by SHA-256."""

    id: str
    object: str = "document"
    created: int
    model: str
    status: str
    reason: str
    prompt: str
    text: str
    markdown: str
    html: str
    calls: list[AnsweredCall]
    images: dict[str, str]
    usage: dict[str, int]
    feedback: dict[str, Any] | None = None


class ModelRow(BaseModel):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "llmi"


class ModelList(BaseModel):
    object: str = "list"
    data: list[ModelRow]


class Service:
    """What the routes work with.

    Args:
        agents: the policies.
        keys: who may ask.
        files: what is kept.
    """

    def __init__(self, agents: Agents, keys: Keys, files: Files, options: Options) -> None:
        self.agents, self.keys, self.files, self.options = agents, keys, files, options
        self.started = int(time.time())
        self._jobs: dict[str, Job] = {}

    def policy(self, asked: str) -> str:
        """The policy of that name, or one by weight. Raises Problem."""
        weights = self.agents.weights()
        if asked in weights:
            return asked
        if asked not in ("", "llmi"):
            raise Problem(404, f"there is no model {asked!r}: here are llmi, {', '.join(weights)}")
        return random.choices(list(weights), list(weights.values()))[0]

    def begin(self, owner: str, model: str, question: Question) -> Job:
        """Start a document. Raises Problem."""
        self.keys.take(owner)
        try:
            job = Job(self.policy(model), question, owner)
        except BaseException:
            self.keys.give(owner)
            raise
        self._jobs[job.id] = job
        while len(self._jobs) > NAMED and (old := next(iter(self._jobs.values()))).status != WRITING:
            del self._jobs[old.id]
        job.task = asyncio.create_task(self._run(job))
        return job

    async def _run(self, job: Job) -> None:
        try:
            await job.run(self.agents, self.options.deadline_s)
            if job.status != CANCELLED:
                await asyncio.to_thread(self.files.put_document, job.id, self.row(job) | {"owner": job.owner})
        finally:
            self.keys.give(job.owner)

    def row(self, job: Job) -> dict[str, Any]:
        """A job as the API tells of it."""
        document = job.document()
        images = {sha: self.link(blob) for sha, blob in document.blobs.items()}
        usage = job.usage
        return Made(
            id=job.id,
            created=job.created,
            model=job.policy,
            status=job.status,
            reason=job.reason,
            prompt=job.question.text,
            text=document.text,
            markdown=to_markdown(replace(document, given=()), self.link),  # whoever asks has those
            html=self.html(job),
            feedback=job.feedback,
            calls=[AnsweredCall(**outcome_json(call)) for call in document.calls],
            images=images,
            usage={"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.tokens},
        ).model_dump()

    async def document(self, identity: str, owner: str) -> Document:
        """A document of this owner's with its pictures. Raises Problem."""
        if (job := self.job(identity, owner)) is not None:
            return job.document()
        row = await self.stored(identity, owner)
        calls = tuple(CallOutcome(**call | {"images": tuple(call["images"])}) for call in row["calls"])
        names = {sha: url.rpartition("/")[2] for sha, url in row["images"].items()}
        found = {sha: await asyncio.to_thread(self.files.picture, name) for sha, name in names.items()}
        blobs = {sha: blob for sha, blob in found.items() if blob is not None}
        return Document(row["prompt"], row["text"], calls, blobs)

    def html(self, job: Job) -> str:
        """The document as it is, with addresses of its pictures, and places for those that are being made."""
        document = job.document()
        opened = document.text.rfind(OPEN)  # of a tag that is being written
        whole = job.status != WRITING or opened < max((call.end for call in document.calls), default=0)
        text = document.text if whole else document.text[:opened]
        return render_html(text, document.calls, document.blobs, link=self.link)

    async def rate(self, identity: str, owner: str, feedback: Feedback) -> None:
        """Keep what a reader thinks of a document. Raises Problem."""
        row = await self.stored(identity, owner)
        if row["status"] == WRITING:
            raise Problem(409, "the document is still being written")
        row["feedback"] = {**feedback.model_dump(), "at": int(time.time())}
        if (job := self.job(identity, owner)) is not None:
            job.feedback = row["feedback"]
        await asyncio.to_thread(self.files.put_document, identity, row | {"owner": owner})

    def link(self, blob: Blob) -> str:
        """The address of a picture at this service, which keeps it from then on."""
        return f"/v1/images/{self.files.put_picture(blob)}"

    def job(self, identity: str, owner: str) -> Job | None:
        """A document of this owner's that is still in memory."""
        job = self._jobs.get(identity)
        return job if job is not None and job.owner == owner else None

    async def stored(self, identity: str, owner: str) -> dict[str, Any]:
        """A document of this owner's. Raises Problem."""
        if (job := self.job(identity, owner)) is not None:
            return self.row(job)
        row = await asyncio.to_thread(self.files.document, identity)
        if row is None or row.pop("owner") != owner:  # another's is not there either
            raise Problem(404, f"there is no document {identity!r}")
        return row

    def forget(self, identity: str) -> None:
        """Drop a document that has ended."""
        self._jobs.pop(identity, None)
        self.files.forget(identity)

    async def pictures(self, addresses: Sequence[str]) -> tuple[Blob, ...]:
        """The user's pictures. Raises Problem."""
        return tuple([await asyncio.to_thread(self._picture, i, url) for i, url in enumerate(addresses)])

    def _picture(self, index: int, address: str) -> Blob:
        try:
            if re.match(r"https?://", address):
                return self.options.fetch(address)
            data = base64.b64decode(
                address.partition(",")[2] if address.startswith("data:") else address, validate=True
            )
            return self.options.picture(data)
        except binascii.Error as error:
            raise Problem(422, f"images.{index}: neither http(s), a data URL nor Base64") from error
        except ValueError as error:
            raise Problem(422, f"images.{index}: {error}") from error


async def _caller(request: Request, authorization: Annotated[str, Header()] = "") -> str:
    """Whose key this is; the request counts among its."""
    service: Service = request.app.state.service
    owner = request.state.owner = service.keys.owner(authorization)
    service.keys.spend(owner)
    return owner


Owner = Annotated[str, Depends(_caller)]
errors: dict[int | str, dict[str, Any]] = {
    code: {"description": said}
    for code, said in {
        400: "The body is no JSON.",
        401: "No key, or an unknown one.",
        404: "There is no such thing.",
        413: "The body is too large.",
        422: "The body cannot be answered.",
        429: "A limit of the key is reached.",
        503: "No agent could answer.",
    }.items()
}


def build(service: Service) -> FastAPI:
    """The application."""
    api = FastAPI(title="llmi", version="1", docs_url=None, redoc_url=None)  # their pages fetch scripts from elsewhere
    api.state.service = service
    api.add_middleware(_Edge, body_bytes=service.options.body_bytes)

    @api.exception_handler(Problem)
    async def problem(_: Request, error: Problem) -> Response:
        return error.response()

    @api.exception_handler(TooMuch)
    async def too_much(_: Request, error: TooMuch) -> Response:
        return Problem(429, str(error), "rate_limit_error", error.after_s).response()

    @api.exception_handler(Forbidden)
    async def forbidden(_: Request, error: Forbidden) -> Response:
        return Problem(401, str(error), "authentication_error").response()

    @api.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        said = [f"{'.'.join(map(str, p['loc'][1:]))}: {p['msg'].removeprefix('Value error, ')}" for p in error.errors()]
        return Problem(422, "; ".join(said[:5])).response()

    @api.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> Response:
        return Problem(error.status_code, str(error.detail)).response()

    @api.post("/v1/documents", response_model=Made, responses={**errors, 202: {"model": Made}})
    async def documents(ask: Ask, owner: Owner, request: Request) -> Response:
        """Write a document."""
        sampling = {} if ask.seed is None else {"seed": ask.seed}
        given = await service.pictures(ask.images)
        job = service.begin(owner, ask.model, Question(({"role": "user", "content": ask.prompt},), given, sampling))
        request.state.document = job.id
        if ask.background:
            return JSONResponse(service.row(job), 202)
        if ask.stream:
            return _events(_told(service, job, ask.html), job)
        await _ended(request, job)
        return JSONResponse(service.row(job))

    @api.get("/v1/documents/{identity}", response_model=Made, responses=errors)
    async def document(identity: str, owner: Owner) -> Response:
        """A document, as far as it is."""
        return JSONResponse(await service.stored(identity, owner))

    @api.get("/v1/documents/{identity}/events", responses=errors)
    async def events(identity: str, owner: Owner) -> Response:
        """The events of a document from its beginning; while it is being written, those to come too."""
        if (job := service.job(identity, owner)) is None:
            await service.stored(identity, owner)
            raise Problem(404, f"the events of document {identity!r} are over: get the document itself")
        return _events(_told(service, job), None)

    @api.get("/v1/documents/{identity}/page", responses=errors)
    async def page_of(identity: str, owner: Owner) -> Response:
        """One HTML file that needs no network."""
        html = await asyncio.to_thread(to_page, await service.document(identity, owner))
        return Response(html, media_type="text/html", headers={"Content-Security-Policy": "sandbox"})

    @api.post(
        "/v1/documents/{identity}/feedback", status_code=204, responses={**errors, 409: {"description": "Too early."}}
    )
    async def feedback(identity: str, thought: Feedback, owner: Owner) -> Response:
        """Say what a document is worth."""
        await service.rate(identity, owner, thought)
        return Response(status_code=204)

    @api.delete("/v1/documents/{identity}", status_code=204, responses=errors)
    async def cancel(identity: str, owner: Owner) -> Response:
        """Stop a document, and forget it."""
        if (job := service.job(identity, owner)) is not None and job.task is not None:
            job.task.cancel()
            await asyncio.wait({job.task}, timeout=10)
        else:
            await service.stored(identity, owner)
        service.forget(identity)
        return Response(status_code=204)

    @api.post("/v1/chat/completions", responses=errors)
    async def completions(ask: chat.ChatRequest, owner: Owner, request: Request) -> Response:
        """OpenAI's chat completions: the document in Markdown, with its pictures as links and as parts."""
        try:
            messages, urls = ask.conversation(), ask.images()
        except ValueError as error:
            raise Problem(422, str(error)) from error
        base = f"{request.url.scheme}://{request.url.netloc}"
        given = await service.pictures(urls)
        job = service.begin(owner, ask.model, Question(messages, given, ask.sampling()))
        request.state.document = job.id
        if ask.stream:
            usage = ask.stream_options is not None and ask.stream_options.include_usage
            pieces = _pieces(job, lambda blob: base + service.link(blob))
            return _events(chat.chunks(job.id, job.created, job.policy, pieces, usage), job)
        await _ended(request, job)
        row = service.row(job)
        text = row["markdown"].replace("](/v1/images/", f"]({base}/v1/images/").strip()
        links = [base + url for url in row["images"].values()]
        return JSONResponse(chat.completion(job.id, job.created, job.policy, text, job.usage, links))

    @api.get("/v1/models", response_model=ModelList, responses=errors)
    async def models(owner: Owner) -> ModelList:
        """The policies that can be asked for by name."""
        return ModelList(data=[ModelRow(id=name, created=service.started) for name in service.agents.weights()])

    @api.get("/v1/images/{name}", responses=errors)
    async def image(name: str) -> Response:
        """A picture; whoever has its address may see it."""
        if (blob := await asyncio.to_thread(service.files.picture, name)) is None:
            raise Problem(404, "there is no such picture")
        headers = {"Cache-Control": "private, max-age=31536000, immutable", "Content-Security-Policy": "sandbox"}
        return Response(blob.data, media_type=blob.mime, headers=headers)

    @api.get("/healthz")
    async def health() -> dict[str, str]:
        """This process answers."""
        return {"status": "ok"}

    @api.get("/readyz", responses={503: {"description": "No agent is ready."}})
    async def ready() -> dict[str, Any]:
        """A question would be answered now."""
        if not await service.agents.ready():
            raise Problem(503, "no agent is ready yet", "server_error", 5)
        return {"status": "ok", "models": list(service.agents.weights())}

    @api.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", headers={"Content-Security-Policy": _CSP})

    @api.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        if name == "document.css":
            return Response(CSS, media_type="text/css")
        if name not in PAGE_FILES:
            raise Problem(404, f"the page has no file {name!r}")
        return FileResponse(PAGE / name, media_type=PAGE_FILES[name])

    return api


async def _ended(request: Request, job: Job) -> None:
    """Wait for a document; a client that leaves takes it along. Raises Problem if there is none."""
    assert job.task is not None
    try:
        while not job.task.done():
            await asyncio.wait({job.task}, timeout=1.0)
            if await request.is_disconnected():
                job.task.cancel()
    except asyncio.CancelledError:
        job.task.cancel()
        raise
    _check(job)


def _check(job: Job) -> None:
    if job.status != DONE and not job.events:
        raise Problem(422, job.reason) if job.refused else Problem(503, job.reason, "server_error", 5)


def _events(lines: AsyncIterator[str], job: Job | None) -> Response:
    """Server-sent events; the job ends with them if it is theirs alone."""

    async def stream() -> AsyncIterator[str]:
        try:
            async for line in lines:
                yield line
        finally:
            if job is not None and job.task is not None and job.status == WRITING:
                job.task.cancel()

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(stream(), media_type="text/event-stream", headers=headers)


async def _told(service: Service, job: Job, html: bool = False) -> AsyncIterator[str]:
    """A document's events, and at last the document or what went wrong."""
    yield _event("begun", {"id": job.id, "model": job.policy})
    drawn = 0.0
    async for event in job.follow():
        yield _event(*_row(service, event))
        if html and (time.monotonic() - drawn > DRAW_S or not isinstance(event, Wrote)):
            yield _event("html", {"html": service.html(job)})
            drawn = time.monotonic()
    if job.status == DONE:
        yield _event("done", service.row(job))
    else:
        yield _event("failed", {"id": job.id, "status": job.status, "reason": job.reason})


def _row(service: Service, event: Event | Usage) -> tuple[str, dict[str, Any]]:
    if isinstance(event, Wrote):
        return "text", {"text": event.text}
    if isinstance(event, Began):
        return "call", vars(event)
    if isinstance(event, Ended):
        links = [service.link(blob) for blob in event.images]
        return "made", {"index": event.index, **outcome_json(event.outcome), "urls": links}
    return "usage", vars(event)


async def _pieces(job: Job, link: Callable[[Blob], str]) -> AsyncIterator[str | list[str] | Usage]:
    """The document in Markdown as it comes; a note at its end says what went wrong."""
    live = Live(link)
    async for event in job.follow():
        if isinstance(event, Ended) and event.images:
            yield [link(blob) for blob in event.images]
        if text := live.feed(event):
            yield text
    if text := live.finish():
        yield text
    if job.status != DONE:
        yield f"\n\n> The document ends here: {job.reason}"
    yield job.usage


def _event(name: str, row: Mapping[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(row, ensure_ascii=False)}\n\n"


Message = MutableMapping[str, Any]


class _Edge:
    """ASGI middleware: the size of bodies, request ids, headers that protect, and the audit log."""

    def __init__(self, app: Any, body_bytes: int) -> None:
        self._app, self._most = app, body_bytes

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        asked = headers.get("x-request-id", "")
        request_id = asked if _REQUEST_ID.fullmatch(asked) else secrets.token_hex(8)
        state = scope.setdefault("state", {})
        began, status, got = time.monotonic(), 0, 0
        too_large = f"the body is larger than the {self._most:,} bytes that are taken"

        async def counted() -> Message:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > self._most:
                raise HTTPException(413, too_large)  # which FastAPI lets through
            return message

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                ours = {
                    "x-request-id": request_id,
                    "x-content-type-options": "nosniff",
                    "referrer-policy": "no-referrer",
                }
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in ours.items())]
            await send(message)

        length = headers.get("content-length", "0")
        try:
            if length.isdigit() and int(length) > self._most:
                await Problem(413, too_large).response()(scope, receive, told)
            else:
                await self._app(scope, counted, told)
        finally:
            self._log(scope, state, request_id, status, time.monotonic() - began)

    def _log(self, scope: Message, state: Mapping[str, Any], request_id: str, status: int, seconds: float) -> None:
        """Who asked for what and what came of it; never what was asked, nor any key."""
        row = {
            "at": round(time.time(), 3),
            "request": request_id,
            "key": state.get("owner"),
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "seconds": round(seconds, 3),
            "document": state.get("document"),
        }
        audit.info(json.dumps(row))
