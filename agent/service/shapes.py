"""What the API takes and gives, as JSON; its description is made of these."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from agent.answer import Stage
from agent.scaling import MOST
from agent.service import chat


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
    scale: int = Field(1, ge=1, le=MOST, description="tries of everything: more is slower and better")
    learn: bool = Field(False, description="question, document and feedback may be trained on")
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
    scaling: list[Stage]
    images: dict[str, str]
    finished: bool = Field(description="false where the text was cut off at the token limit")
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
