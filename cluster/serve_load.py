"""Clients of a running service, and what they see: the load of `llmi bench serve`."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Sequence
from itertools import count
from typing import Any, NamedTuple

import httpx

from replay.record import Prompt

ANSWER_S = 120.0  # no document of a benchmark takes longer
_LIMITS = httpx.Limits(max_connections=None)


class Seen(NamedTuple):
    """One document as its client saw it: seconds to the first words and to the end, and what went wrong."""

    first_s: float
    whole_s: float
    problem: str


def documents(url: str, prompts: Sequence[Prompt], clients: int, *, each: int = 0, seconds: float = 0.0) -> list[Seen]:
    """Clients that ask for one document after the other, each streamed.

    Args:
        each: documents of a client, or
        seconds: for which they ask.
    """
    return asyncio.run(_documents(url, prompts, clients, each, seconds))


def tokens_per_s(url: str, rows: Sequence[dict[str, Any]], tokens: int) -> float:
    """All rows (`question`, `seed`) at once through the chat completions, streamed."""
    return asyncio.run(_tokens_per_s(url, rows, tokens))


async def _documents(url: str, prompts: Sequence[Prompt], clients: int, each: int, seconds: float) -> list[Seen]:
    seen: list[Seen] = []
    number, began = count(), time.monotonic()

    async def client(http: httpx.AsyncClient) -> None:
        done = 0
        while done < each or time.monotonic() - began < seconds:
            at = next(number)
            seen.append(await _document(http, prompts[at % len(prompts)], at))
            done += 1

    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_S, limits=_LIMITS, trust_env=False) as http:
        await asyncio.gather(*(client(http) for _ in range(clients)))
    return seen


async def _document(http: httpx.AsyncClient, prompt: Prompt, seed: int) -> Seen:
    images = [base64.b64encode(data).decode() for data in prompt.images]
    body = {"prompt": prompt.question, "images": images, "seed": seed, "stream": True}
    began, first, name = time.monotonic(), 0.0, ""
    try:
        async with http.stream("POST", "/v1/documents", json=body) as response:
            if response.status_code != 200:
                return Seen(0.0, 0.0, f"{response.status_code}: {(await response.aread()).decode()[:200]}")
            async for line in response.aiter_lines():
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                    first = first or (time.monotonic() - began if name == "text" else 0.0)
    except httpx.HTTPError as error:
        return Seen(0.0, 0.0, repr(error))
    whole = time.monotonic() - began
    return Seen(first or whole, whole, "" if name == "done" else f"it ended with {name!r}")


async def _tokens_per_s(url: str, rows: Sequence[dict[str, Any]], tokens: int) -> float:
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_S, limits=_LIMITS, trust_env=False) as http:
        began = time.monotonic()
        written = await asyncio.gather(*(_chat(http, row, tokens) for row in rows))
        return sum(written) / (time.monotonic() - began)


async def _chat(http: httpx.AsyncClient, row: dict[str, Any], tokens: int) -> int:
    """Tokens of one answer."""
    messages = [{"role": "user", "content": row["question"]}]
    body = {"messages": messages, "seed": row["seed"], "max_tokens": tokens}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    usage: dict[str, int] = {}
    async with http.stream(
        "POST", "/v1/chat/completions", json=body | {"stream_options": {"include_usage": True}}
    ) as r:
        r.raise_for_status()
        async for line in r.aiter_lines():
            if line.startswith("data: {"):
                usage = json.loads(line[6:]).get("usage") or usage
    return usage["completion_tokens"]
