"""A picture service on this machine that speaks the OpenAI images API and Ark's, and misbehaves when told to."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable
from email.message import Message
from email.parser import BytesParser
from http.server import ThreadingHTTPServer
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.local_service import Answering

Misbehaviour = Callable[["Handler"], None]


def png(size: tuple[int, int] = (48, 32), colour: str = "red") -> bytes:
    """A picture with a comment in it."""
    comment = PngInfo()
    comment.add_text("author", "secret")
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(buffer, "PNG", pnginfo=comment)
    return buffer.getvalue()


class Handler(Answering):
    server: PictureService

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        fields, files = _form(self.headers, raw)
        self.server.seen.append({"path": self.path, "key": self.headers.get("Authorization"), **fields, **files})
        behaviour = self.server.behaviours.pop(0) if self.server.behaviours else Handler.good
        try:
            behaviour(self)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def do_GET(self) -> None:
        self.server.seen.append({"path": self.path, "key": self.headers.get("Authorization")})
        self.answer(200, png(), Content_Type="image/png")

    def good(self) -> None:
        self.picture(base64.b64encode(png()).decode())

    def picture(self, encoded: str) -> None:
        self.answer(200, {"created": 1, "data": [{"b64_json": encoded}]})


class PictureService(ThreadingHTTPServer):
    """Takes `behaviours` one a request, and is good once there are none left; `seen` are the requests' fields."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behaviours: list[Misbehaviour] = []
        self.seen: list[dict[str, Any]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()


def _form(headers: Message, raw: bytes) -> tuple[dict[str, Any], dict[str, list[bytes]]]:
    """Fields and files of a JSON or multipart body."""
    if headers.get_content_type() == "application/json":
        return json.loads(raw), {}
    head = f"Content-Type: {headers['Content-Type']}\r\n\r\n".encode()
    fields: dict[str, Any] = {}
    files: dict[str, list[bytes]] = {}
    for part in BytesParser().parsebytes(head + raw).get_payload():
        assert isinstance(part, Message)
        name = str(part.get_param("name", header="content-disposition"))
        data = part.get_payload(decode=True)
        assert isinstance(data, bytes)
        if part.get_filename():
            files.setdefault(name, []).append(data)
        else:
            fields[name] = data.decode()
    return fields, files


def error(status: int, code: str, message: str, parameter: str | None = None, **headers: str) -> Misbehaviour:
    said = {"error": {"code": code, "message": message, "param": parameter, "type": "invalid_request_error"}}
    return lambda handler: handler.answer(status, said, **headers)


def body(data: bytes) -> Misbehaviour:
    return lambda handler: handler.answer(200, data)


def encoded(data: bytes) -> Misbehaviour:
    return lambda handler: handler.picture(base64.b64encode(data).decode())


def half(handler: Handler) -> None:
    """Half of the body that was announced, then the end."""
    said = json.dumps({"data": [{"b64_json": base64.b64encode(png()).decode()}]}).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(said)))
    handler.end_headers()
    handler.wfile.write(said[: len(said) // 2])
    handler.wfile.flush()
    handler.connection.close()
    handler.close_connection = True


def silence(handler: Handler) -> None:
    time.sleep(5)


def drip(handler: Handler) -> None:
    """A good beginning, then a byte at a time."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


def drip_headers(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    for _ in range(100):
        handler.wfile.write(b"a")
        handler.wfile.flush()
        time.sleep(0.1)


def hang_up(handler: Handler) -> None:
    handler.connection.close()
    handler.close_connection = True


def flood(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(10**12))
    handler.end_headers()
    while True:
        handler.wfile.write(bytes(2**20))


def elsewhere(handler: Handler) -> None:
    handler.answer(307, b"", Location="http://169.254.169.254/latest/meta-data")
