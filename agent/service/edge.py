"""What every request passes first: the size of bodies, request ids, headers that protect, and the audit log."""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException

from agent.service.problem import Problem

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")

audit = logging.getLogger("llmi.audit")

Message = MutableMapping[str, Any]


class Edge:
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
