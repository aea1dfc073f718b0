"""A proxy in front of an S3 service that throttles, fails, cuts connections and loses answers, on command."""

from __future__ import annotations

import http.client
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any


@dataclass
class Proxy:
    """Forwards to an S3 service, and misbehaves as told.

    Attributes:
        todo: what to do with the next calls that match; afterwards it behaves.
        only: methods that match.
        path: part of a path that matches.
        seen: (method, path) of all calls.
    """

    url: str = ""
    todo: list[str] = field(default_factory=list)
    only: tuple[str, ...] = ("PUT",)
    path: str = ""
    seen: list[tuple[str, str]] = field(default_factory=list)

    def next(self, method: str, path: str) -> str:
        self.seen.append((method, path))
        matches = self.todo and method in self.only and self.path in path
        return self.todo.pop(0) if matches else "forward"

    def misbehave(self, *todo: str, only: tuple[str, ...] = ("PUT",), path: str = "") -> None:
        self.todo, self.only, self.path = list(todo), only, path


_ERRORS = {"SlowDown": 503, "InternalError": 500}


def handler(proxy: Proxy, target: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *args: Any) -> None:
            pass

        def do(self) -> None:
            how = proxy.next(self.command, self.path)
            length = int(self.headers.get("Content-Length", 0))
            if how == "cut":  # in the middle of an upload
                self.rfile.read(length // 2)
                return self.hang_up()
            body = self.rfile.read(length)
            if how in _ERRORS:
                text = f"<Error><Code>{how}</Code><Message>on command</Message></Error>".encode()
                return self.answer(_ERRORS[how], {"Content-Type": "application/xml"}, text)
            status, headers, data = self.forward(body)
            if how == "lose":  # it went through, but nobody hears of it
                return self.hang_up()
            self.answer(status, headers, data)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do

        def forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            upstream = http.client.HTTPConnection(target, timeout=30)
            headers = {name: value for name, value in self.headers.items() if name != "Expect"}
            upstream.request(self.command, self.path, body, headers)
            answer = upstream.getresponse()
            data = answer.read()
            upstream.close()
            dropped = {"transfer-encoding", "connection", "content-length"}
            headers = {k: v for k, v in answer.getheaders() if k.lower() not in dropped}
            length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
            return answer.status, headers | {"Content-Length": length or "0"}, data

        def answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(data))} | headers).items():
                if name not in ("Date", "Server"):
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data if self.command != "HEAD" else b"")
            self.wfile.flush()

        def hang_up(self) -> None:
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    return Handler
