"""The service's HTTP API: documents, OpenAI's chat completions, pictures, health and the page."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from agent.answer import News, Stage, Usage
from agent.document import CSS
from agent.export import outcome_json, to_page
from agent.render import Began, Ended, Wrote
from agent.service import chat
from agent.service.core import Service
from agent.service.edge import Edge
from agent.service.jobs import DONE, WRITING, Job, Question
from agent.service.keys import Forbidden, TooMuch
from agent.service.live import Live
from agent.service.problem import Problem
from agent.service.shapes import Ask, Feedback, Made, ModelList, ModelRow
from replay.record import Blob

DRAW_S = 0.1  # between two states of a document that is told of as HTML
PAGE = Path(__file__).parent / "page"
PAGE_FILES = {"page.css": "text/css", "page.js": "text/javascript"}
_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "frame-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


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
    api.add_middleware(Edge, body_bytes=service.options.body_bytes)

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
        messages = ({"role": "user", "content": ask.prompt},)
        job = service.begin(owner, ask.model, Question(messages, given, sampling, ask.scale, ask.learn))
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
        job = service.begin(owner, ask.model, Question(messages, given, ask.sampling(), ask.scale, bool(ask.store)))
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
        return {"status": "ok", "models": list(service.agents.weights()), "learns": service.options.learn}

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


def _row(service: Service, event: News) -> tuple[str, dict[str, Any]]:
    if isinstance(event, Wrote):
        return "text", {"text": event.text}
    if isinstance(event, Began):
        return "call", vars(event)
    if isinstance(event, Ended):
        links = [service.link(blob) for blob in event.images]
        return "made", {"index": event.index, **outcome_json(event.outcome), "urls": links}
    if isinstance(event, Stage):
        return "stage", vars(event)
    return "usage", {"prompt_tokens": event.prompt_tokens, "tokens": event.tokens, "finish": event.finish}


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
