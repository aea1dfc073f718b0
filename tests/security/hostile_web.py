"""A web server on loopback that does what it is told, bytes and all: late, endless, broken or wrong."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterable

Sent = bytes | Iterable[bytes]
#: What a server does: bytes sent at once or one after another.
Behaviour = Callable[["Web"], Sent]


class Web:
    """A server on loopback that answers each path as an attack says, and remembers what it was asked for."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.behaviours: dict[str, Behaviour] = {}
        self.asked: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._serve, daemon=True)]
        self._threads[0].start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}/{path}"

    def close(self) -> None:
        self._stop.set()
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for thread in self._threads:
            thread.join(10)

    def _serve(self) -> None:
        while not self._stop.is_set():
            try:
                conn, _ = self._socket.accept()
            except OSError:
                return
            self._threads.append(threading.Thread(target=self._answer, args=(conn,), daemon=True))
            self._threads[-1].start()

    def _answer(self, conn: socket.socket) -> None:
        with conn:
            conn.settimeout(5)
            try:
                request = conn.recv(65536)
                if not request.startswith(b"GET "):
                    self._stop.wait(2)  # TLS, which hears nothing
                    return
                path = request.decode("latin-1").split(" ")[1].lstrip("/")
                self.asked.append(path)
                sent = self.behaviours[path.partition("?")[0]](self)
                for piece in [sent] if isinstance(sent, bytes) else sent:
                    conn.sendall(piece)
                    if self._stop.is_set():
                        return
            except (OSError, LookupError):
                return  # the other side has had enough, or this was never HTTP


def reply(body: bytes, mime: str = "image/png", *headers: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {mime}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def head(*headers: str) -> bytes:
    return "\r\n".join(["HTTP/1.1 200 OK", "Content-Type: image/png", *headers, "", ""]).encode()


def redirect(place: str) -> Behaviour:
    return lambda web: reply(b"", "text/html", f"Location: {place.format(port=web.port)}", status="302 Found")


def sends(data: Callable[[], bytes] | bytes, mime: str = "image/png") -> Behaviour:
    return lambda web: reply(data if isinstance(data, bytes) else data(), mime)


def endless(piece: bytes, first: bytes = b"") -> Behaviour:
    return lambda web: itertools.chain([first], itertools.repeat(piece * (65536 // len(piece) or 1)))


def drips(first: bytes, piece: bytes = b"a", every_s: float = 0.05) -> Behaviour:
    def behaviour(web: Web) -> Iterable[bytes]:
        yield first
        while True:
            time.sleep(every_s)
            yield piece

    return behaviour


def late(behaviour: Behaviour, by_s: float = 0.4) -> Behaviour:
    def later(web: Web) -> Sent:
        time.sleep(by_s)
        return behaviour(web)

    return later
