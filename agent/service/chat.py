"""The chat completions of OpenAI's API: their requests as questions, and documents as their answers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from agent.answer import Usage
from agent.scaling import MOST

MAX_IMAGES = 16  # of the user's, in one question
MAX_CHARACTERS = 200_000  # of one message
MAX_MESSAGES = 200


def words(text: str) -> str:
    """The text, if it can be encoded."""
    text.encode()  # JSON can hold halves of characters; they end in a ValueError here
    return text


Text = Annotated[str, Field(max_length=MAX_CHARACTERS), AfterValidator(words)]


class TextPart(BaseModel):
    type: Literal["text"]
    text: Text


class ImageUrl(BaseModel):
    url: str


class ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(min_length=1, max_length=100)]

    def text(self) -> str:
        """Its words; pictures go beside them."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart))

    def images(self) -> list[str]:
        """Addresses of its pictures: data URLs or http(s)."""
        parts = () if isinstance(self.content, str) else self.content
        return [part.image_url.url for part in parts if isinstance(part, ImagePart)]


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """The fields that mean something here; others are ignored, but for those that would change the answer."""

    model_config = ConfigDict(extra="ignore")

    model: str = ""
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    seed: int | None = Field(None, ge=0, lt=2**63)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, gt=0)
    max_completion_tokens: int | None = Field(None, gt=0)
    store: bool | None = None  # may be trained on
    scale: int = Field(1, ge=1, le=MOST)  # ours: tries of everything
    n: Literal[1] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    response_format: Literal[None] = None
    logprobs: Literal[False] | None = None

    def conversation(self) -> tuple[dict[str, str], ...]:
        """Its messages with their words alone. Raises ValueError if the last is not a user's with words."""
        told = tuple({"role": _ROLES.get(m.role, m.role), "content": m.text()} for m in self.messages)
        if told[-1]["role"] != "user" or not told[-1]["content"].strip():
            raise ValueError("messages: the last one must be the user's, with words")
        return told

    def images(self) -> list[str]:
        """Addresses of all pictures in order. Raises ValueError for too many."""
        urls = [url for m in self.messages for url in m.images()]
        if len(urls) > MAX_IMAGES:
            raise ValueError(f"messages: {len(urls)} pictures, at most {MAX_IMAGES} are taken")
        return urls

    def sampling(self) -> dict[str, Any]:
        """What differs from the service's sampling."""
        tokens = self.max_completion_tokens or self.max_tokens
        asked = {"seed": self.seed, "temperature": self.temperature, "top_p": self.top_p, "max_tokens": tokens}
        return {name: value for name, value in asked.items() if value is not None}


_ROLES = {"developer": "system"}


def completion(
    identity: str, created: int, model: str, content: str, usage: Usage, images: Sequence[str]
) -> dict[str, Any]:
    """A whole answer. `images` are the addresses of the document's pictures, as parts beside its Markdown."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    message = {"role": "assistant", "content": content, "refusal": None, "images": parts}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": usage.finish or "stop"}
    return {
        **_frame(identity, created, model, "chat.completion"),
        "choices": [choice],
        "usage": _usage(usage),
    }


async def chunks(
    identity: str, created: int, model: str, pieces: AsyncIterable[str | Sequence[str] | Usage], with_usage: bool
) -> AsyncIterator[str]:
    """A streamed answer as server-sent events.

    Args:
        pieces: Markdown as it comes (str), addresses of the pictures in it (list), and at last the usage.
    """
    frame = _frame(identity, created, model, "chat.completion.chunk")
    yield _event(frame | {"choices": [_delta({"role": "assistant", "content": ""})]})
    usage = Usage(0, 0, "stop")
    async for piece in pieces:
        if isinstance(piece, Usage):
            usage = piece
        elif isinstance(piece, str):
            yield _event(frame | {"choices": [_delta({"content": piece})]})
        else:
            parts = [{"type": "image_url", "image_url": {"url": url}} for url in piece]
            yield _event(frame | {"choices": [_delta({"images": parts})]})
    yield _event(frame | {"choices": [_delta({}, usage.finish or "stop")]})
    if with_usage:
        yield _event(frame | {"choices": [], "usage": _usage(usage)})
    yield "data: [DONE]\n\n"


def _frame(identity: str, created: int, model: str, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{identity}", "object": kind, "created": created, "model": model}


def _delta(delta: Mapping[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": dict(delta), "logprobs": None, "finish_reason": finish}


def _usage(usage: Usage) -> dict[str, int]:
    total = usage.prompt_tokens + usage.tokens
    return {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.tokens, "total_tokens": total}


def _event(row: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(row, ensure_ascii=False)}\n\n"
