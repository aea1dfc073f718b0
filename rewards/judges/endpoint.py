"""A judge's model behind an OpenAI-compatible endpoint: OpenAI, `vllm serve`, and others that speak their protocol."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

from replay.record import Blob
from rewards.base import JudgeFailed
from rewards.judges.answers import Answer, Token, Unreadable, refused
from rewards.judges.model import Asked, Message
from tools.base import CallFailed
from tools.remote import Service, ServiceFailed

LIKELY = 20  # tokens in the place of each that the endpoint tells log-probs of


class Endpoint:
    """Chat completions of a remote model. The key is OPENAI_API_KEY, if it is set.

    Args:
        model: its name there.
        url: up to the paths, as "http://127.0.0.1:8000/v1".
        timeout_s: of an answer, with the waits that an overloaded endpoint asks for.
        logprobs: whether the endpoint gives log-probs; without them scores are whole numbers.
        extra: fields of the request, which win over ours; one that is null is left out.
    """

    def __init__(
        self,
        model: str,
        url: str = "https://api.openai.com/v1",
        timeout_s: float = 25.0,
        logprobs: bool = True,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self._service = Service("the judge's endpoint", url, "OPENAI_API_KEY", False, timeout_s)
        self._model, self._logprobs, self._extra = model, logprobs, dict(extra or {})

    def complete(self, asked: Asked) -> Answer:
        """Raises JudgeFailed."""
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [_message(m) for m in asked.messages],
            "max_tokens": asked.max_tokens,
            "temperature": asked.temperature,
            "seed": asked.seed,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "verdict", "strict": True, "schema": _strict(asked.schema)},
            },
        }
        if self._logprobs:
            body |= {"logprobs": True, "top_logprobs": LIKELY}
        body = {key: value for key, value in (body | self._extra).items() if value is not None}
        try:
            return _answer(self._service.post("chat/completions", json=body))
        except (CallFailed, ServiceFailed) as error:
            raise refused(str(error)) from None

    def check(self) -> None:
        """An endpoint that is down may come back."""

    def close(self) -> None:
        self._service.close()


def _message(message: Message) -> dict[str, Any]:
    words = [part for part in message.parts if isinstance(part, str)]
    if len(words) == len(message.parts):
        return {"role": message.role, "content": "".join(words)}
    return {"role": message.role, "content": [_part(part) for part in message.parts]}


def _part(part: str | Blob) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    data = base64.b64encode(part.data).decode()
    return {"type": "image_url", "image_url": {"url": f"data:{part.mime};base64,{data}"}}


def _strict(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Without the lengths, which OpenAI's strict schemas do not take."""
    properties = {
        name: {key: value for key, value in one.items() if key != "maxLength"}
        for name, one in schema["properties"].items()
    }
    return {**schema, "properties": properties}


def _answer(body: bytes) -> Answer:
    try:
        choice = json.loads(body)["choices"][0]
        message = choice["message"]
        if message.get("refusal"):
            raise JudgeFailed(f"the judge refused: {message['refusal']!s:.200}")
        if choice.get("finish_reason") == "content_filter":
            raise JudgeFailed("the endpoint's filter withheld the judge's answer")
        text = message["content"]
        if not isinstance(text, str):
            raise TypeError("no text")
        tokens = _tokens((choice.get("logprobs") or {}).get("content") or [])
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise Unreadable(f"the judge's endpoint answered without a chat completion: {type(error).__name__}") from None
    return Answer(text, tokens)


def _tokens(content: Sequence[Any]) -> list[Token]:
    return [Token(t["token"], {one["token"]: float(one["logprob"]) for one in t["top_logprobs"]}) for t in content]
