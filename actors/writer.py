"""A policy that writes answers: an engine with the agent's system prompt and sampling around it."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from actors.engine import Engine, Piece, PromptRefused
from agent.workshop import CannotWrite, Draft, Messages


class EngineWriter:
    """Writes with an engine (`agent.workshop.Writer`).

    Args:
        system: the agent's own system prompt, or "" for none; the conversation's comes after it.
        sampling: vLLM's SamplingParams.
    """

    def __init__(self, engine: Engine, system: str, sampling: Mapping[str, Any]) -> None:
        self._engine, self._system, self._sampling = engine, system, dict(sampling)

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Tokens of a conversation up to where the answer begins."""
        theirs = [m["content"] for m in messages if m["role"] == "system"]
        system = "\n\n".join(filter(None, [self._system, *theirs]))
        rest = [m for m in messages if m["role"] != "system"]
        return self._engine.chat_ids([{"role": "system", "content": system}, *rest] if system else rest)

    def asked(self, sampling: Mapping[str, Any]) -> EngineWriter:
        """The same with other sampling; its answers are no longer."""
        tokens = min(sampling.get("max_tokens", self._sampling["max_tokens"]), self._sampling["max_tokens"])
        return EngineWriter(self._engine, self._system, {**self._sampling, **sampling, "max_tokens": tokens})

    async def stream(
        self, messages: Messages, written: str = "", seed: int | None = None, logprobs: bool = False
    ) -> AsyncGenerator[Piece, None]:
        """An answer piece by piece; `written`, with which it begins, is the first.

        Raises:
            PromptRefused: the conversation is too long for the model.
        """
        before = self._engine.tokenizer.encode(written, add_special_tokens=False) if written else []
        params = self._sampling | ({} if seed is None else {"seed": seed})
        params["max_tokens"] -= len(before)
        yield Piece(written, before, "" if params["max_tokens"] > 0 else "length")
        if params["max_tokens"] > 0:
            prompt = [*self.prompt_ids(messages), *before]
            async with aclosing(self._engine.stream(uuid.uuid4().hex, prompt, params, logprobs)) as stream:
                async for piece in stream:
                    yield piece

    async def write(self, messages: Messages, written: str, seed: int) -> Draft:
        """A whole answer. Raises CannotWrite where the conversation is too long for the model."""
        try:
            pieces = [piece async for piece in self.stream(messages, written, seed)]
        except PromptRefused as error:
            raise CannotWrite(str(error)) from error
        tokens = sum(len(piece.token_ids) for piece in pieces[1:])
        return Draft("".join(piece.text for piece in pieces), tokens, pieces[-1].finish != "length")
