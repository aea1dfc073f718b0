"""The deployed agent: a Serve deployment with an HTTP ingress, which answers a prompt with a document and its pictures.

It writes with the engine, and calls the tool servers, that training uses. A tool that is down costs the document a
picture, never its text.
"""

from __future__ import annotations

import base64
import io
import json
import textwrap
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator
from ray import serve

from actors.engine import Engine
from actors.serving import Outage, ToolClient
from agent.document import render_html, render_page
from agent.render import Made, Run, render
from agent.spec import ToolSpec
from replay.record import Blob

FORMATS = ("PNG", "JPEG", "WEBP")  # of the user's pictures
MAX_IMAGES = 16
MAX_TITLE = 120  # characters of the question that head the page

api = FastAPI(title="llmi", docs_url=None, redoc_url=None)  # FastAPI's pages would fetch scripts from elsewhere


def _words(text: str) -> str:
    text.encode()  # JSON can hold halves of characters; they end in a ValueError here
    if not text.strip():
        raise ValueError("there is nothing to answer: it is blank")
    return text


def _picture(value: object) -> Blob:
    if not isinstance(value, str):
        raise ValueError("a picture is a data URL, or the file in Base64")
    try:
        data = base64.b64decode(value.partition(",")[2] if value.startswith("data:") else value, validate=True)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
            return Blob(data, Image.MIME[str(image.format)])
    except Exception as error:  # Pillow's decoders raise many kinds for damaged data; each means the same here
        raise ValueError(f"this is no {', '.join(FORMATS)} picture in Base64 that can be read") from error


class Ask(BaseModel):
    """Body of a request: what is asked, the user's own pictures (for the edit tool), and the seed of the sampling."""

    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[str, AfterValidator(_words)]
    images: list[Annotated[Blob, PlainValidator(_picture, json_schema_input_type=str)]] = Field(
        [], max_length=MAX_IMAGES
    )
    seed: int | None = Field(None, ge=0, lt=2**63)


class AnsweredCall(BaseModel):
    """One tag of the text: `status` is ok, failed or invalid, `images` are SHA-256 of the pictures that it made."""

    source: str
    description: str
    params: dict[str, Any]
    status: str
    reason: str
    images: list[str]
    provenance: dict[str, Any]


class Document(BaseModel):
    """The answer: its text with tags, what became of each, a page of it all, and every picture made as a data URL."""

    text: str
    calls: list[AnsweredCall]
    html: str
    images: dict[str, str]


@api.exception_handler(RequestValidationError)
async def invalid(_: Request, error: RequestValidationError) -> Response:
    """422 with one clear line, and without the body that FastAPI would send back."""
    problems = [f"{'.'.join(map(str, p['loc']))}: {p['msg'].removeprefix('Value error, ')}" for p in error.errors()]
    return Response(json.dumps({"detail": "; ".join(problems)}), 422, media_type="application/json")


async def illustrate(
    question: str, text: str, given: Sequence[Blob], run: Run, specs: Mapping[str, ToolSpec]
) -> Document:
    """Run the calls of an answer. An outage is a failed call here: nobody comes back to try it again."""

    async def attempt(tool: str, params: Mapping[str, Any], images: Sequence[Blob]) -> Made:
        try:
            return await run(tool, params, images)
        except Outage as outage:
            return Made(failure=str(outage))

    calls, made = await render(text, given, attempt, specs)
    blobs = {blob.sha256: blob for blob in made}
    section = render_html(text, calls, blobs, given)
    return Document(
        text=text,
        calls=[AnsweredCall(**{name: getattr(c, name) for name in AnsweredCall.model_fields}) for c in calls],
        html=render_page([section], textwrap.shorten(question, MAX_TITLE, placeholder=" ...")),
        images={sha: f"data:{b.mime};base64,{base64.b64encode(b.data).decode()}" for sha, b in blobs.items()},
    )


@serve.deployment
@serve.ingress(api)
class Agent:
    """One engine that answers prompts over HTTP.

    Args:
        model: folder of the policy: a path or `s3://...`.
        pool: name prefix of the tool servers.
        tools: tool name -> seconds a call may take.
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
        specs: Mapping[str, ToolSpec],
        system: str,
        sampling: Mapping[str, Any],
        engine: Mapping[str, Any],
    ) -> None:
        self._model, self._specs, self._system, self._sampling = model, specs, system, dict(sampling)
        self._tools = {name: ToolClient(pool, name, timeout_s) for name, timeout_s in tools.items()}
        self._engine = Engine(model, 0, engine)
        await self._engine.start()

    @api.get("/healthz")
    async def health(self) -> dict[str, Any]:
        return {"status": "ok", "model": self._model, "tools": sorted(self._tools)}

    @api.post("/v1/documents", response_model=Document)
    async def documents(self, ask: Ask) -> Response:
        """Answer a prompt with a document."""
        from vllm.exceptions import VLLMClientError  # not above: the driver has no need of vLLM

        ids = self._engine.prompt_ids(ask.prompt, self._system)
        seed = {} if ask.seed is None else {"seed": ask.seed}
        try:
            out = await self._engine.complete(uuid.uuid4().hex, ids, self._sampling | seed)
        except VLLMClientError as error:  # too long for the model
            raise HTTPException(422, f"prompt: {error}") from error
        document = await illustrate(ask.prompt, out.text, ask.images, self._run, self._specs)
        return Response(document.model_dump_json(fallback=str), media_type="application/json")

    async def _run(self, tool: str, params: Mapping[str, Any], images: Sequence[Blob]) -> Made:
        return await self._tools[tool].run(params, images)
