"""One GET to a server that is not trusted.

A name is resolved once, each address is judged, and the connection goes to exactly the address that was judged: a
name server that answers differently the second time gains nothing. Redirects begin at the first step again. One
deadline and one number of bytes bound the whole exchange, whatever the server sends: headers, interim replies,
chunk sizes and trailers too. Proxies of the environment, cookies and credentials are not used.
"""

from __future__ import annotations

import io
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from email.message import Message
from functools import cache
from http.client import HTTPException, HTTPResponse
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import cast
from urllib.parse import quote, urljoin, urlsplit

Address = IPv4Address | IPv6Address

LONGEST_URL = 4096  # characters
HEAD_BYTES = 64 * 1024  # all that may come beside the body
CONNECT_S = 4.0  # for one address of several
MOST_ADDRESSES = 3  # of a name that are tried
_CHUNK = 64 * 1024
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_RESERVED = "/%:=&?~+!$,;'@()*[]"  # characters of a path and query that stand for themselves (RFC 3986)

#: What is not the public internet, by IANA's registries of special-purpose addresses and of IPv6 address space, and
#: the one public address that answers as a cloud's metadata service (Azure's).
_SPECIAL = """
    0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24
    192.31.196.0/24 192.52.193.0/24 192.88.99.0/24 192.168.0.0/16 192.175.48.0/24 198.18.0.0/15 198.51.100.0/24
    203.0.113.0/24 224.0.0.0/4 240.0.0.0/4 168.63.129.16/32
    2001::/23 2001:db8::/32 2002::/16 2620:4f:8000::/48 3fff::/20
"""
_NOT_PUBLIC = [ip_network(network) for network in _SPECIAL.split()]
_UNICAST6 = ip_network("2000::/3")  # outside: loopback, local, mapped, NAT64, multicast, unassigned


class FetchFailed(Exception):
    """Nothing usable came; the message is short and holds no part of the URL but its host."""


class Refused(FetchFailed):
    """What is offered is not taken: trying again would not help."""


class Unreachable(FetchFailed):
    """The network or the server failed: it may work another time."""


@dataclass(frozen=True)
class Reply:
    """A complete answer; `url` is where it came from in the end."""

    url: str
    status: int
    headers: Message
    body: bytes


def public(address: Address) -> bool:
    """Whether an address is on the public internet, and neither embeds another one nor leads into a tunnel."""
    if address.version == 6 and address not in _UNICAST6:
        return False
    return not any(address in network for network in _NOT_PUBLIC if network.version == address.version)


def resolve(host: str) -> list[str]:
    """The addresses of a name, in the order of preference of this machine."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


class Fetcher:
    """Gets URLs; thread-safe, and holds nothing between calls.

    Args:
        allowed: which addresses may be connected to.
        ports: which ports.
        redirects: how many are followed; with 0 a redirect is returned as it is.
        max_bytes: largest body.
        timeout_s: for everything, from the name to the last byte.
        agent: the User-Agent header.
        lookup: gives the addresses of a name; by default the system's resolver.
        tls: whose certificates are believed; by default the system's.
    """

    def __init__(
        self,
        *,
        allowed: Callable[[Address], bool] = public,
        ports: Collection[int] = (80, 443),
        redirects: int = 5,
        max_bytes: int = 20 * 2**20,
        timeout_s: float = 10.0,
        agent: str = "llmi",
        lookup: Callable[[str], Sequence[str]] = resolve,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.allowed, self.ports, self.redirects, self.max_bytes = allowed, ports, redirects, max_bytes
        self.timeout_s, self.agent, self.lookup, self.tls = timeout_s, agent, lookup, tls

    def get(self, url: str, headers: Mapping[str, str] | None = None, timeout_s: float | None = None) -> Reply:
        """What is at `url`, asked for with `headers` beside those that every request has.

        Args:
            timeout_s: less time than the fetcher's own.

        Raises:
            Refused: the URL, its address, a redirect or the size of the body is not acceptable, or it is not HTTP.
            Unreachable: no connection, no complete answer, or none in time.
        """
        deadline = time.monotonic() + min(self.timeout_s, self.timeout_s if timeout_s is None else timeout_s)
        try:
            for _ in range(self.redirects + 1):
                reply = self._exchange(_Place.of(url), headers or {}, deadline)
                place = reply.headers.get("Location")
                if self.redirects == 0 or reply.status not in _REDIRECTS or place is None:
                    return reply
                url = urljoin(url, place)
        except FetchFailed:
            raise
        except TimeoutError as error:
            raise Unreachable("no complete answer in time") from error
        except OSError as error:
            raise Unreachable(f"no connection ({error.strerror or type(error).__name__})") from error
        except (HTTPException, ValueError) as error:
            raise Refused(f"the answer is not proper HTTP ({type(error).__name__})") from error
        raise Refused(f"more than {self.redirects} redirects")

    def _exchange(self, place: _Place, headers: Mapping[str, str], deadline: float) -> Reply:
        if place.port not in self.ports:
            raise Refused(f"port {place.port} is not allowed")
        with self._connect(place, deadline) as sock:
            sock.settimeout(_left(deadline))
            sock.sendall(place.request({"User-Agent": self.agent} | dict(headers)))
            stream = _Stream(sock, deadline, self.max_bytes + HEAD_BYTES)
            with HTTPResponse(cast(socket.socket, stream), method="GET") as response:
                response.begin()
                wanted = response.status == 200
                body = self._body(response) if wanted else b""
                return Reply(place.url, response.status, response.headers, body)

    def _body(self, response: HTTPResponse) -> bytes:
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("identity", ""):
            raise Refused("the body is compressed, which was not asked for")
        too_large = Refused(f"the body is larger than {self.max_bytes} bytes")
        if (response.length or 0) > self.max_bytes:
            raise too_large
        body = bytearray()
        while chunk := response.read(_CHUNK):
            body += chunk
            if len(body) > self.max_bytes:
                raise too_large
        if response.length:  # (http.client only says so of chunked bodies)
            raise Unreachable("the body ends early")
        return bytes(body)

    def _connect(self, place: _Place, deadline: float) -> socket.socket:
        """A connection to the first allowed address that answers, with TLS if the scheme asks for it."""
        addresses = [a for a in self._addresses(place.host, deadline) if self.allowed(a)]
        if not addresses:
            raise Refused(f"the address of {place.host} is not on the public internet")
        for i, address in enumerate(tried := addresses[:MOST_ADDRESSES], 1):
            try:
                sock = socket.create_connection((str(address), place.port), min(CONNECT_S, _left(deadline)))
                break
            except OSError:
                if i == len(tried):
                    raise
        if place.scheme == "http":
            return sock
        try:
            sock.settimeout(_left(deadline))
            return (self.tls or _tls()).wrap_socket(sock, server_hostname=place.host)
        except BaseException:
            sock.close()
            raise

    def _addresses(self, host: str, deadline: float) -> list[Address]:
        """Of a name, or of an address in any spelling that the system's resolver knows ("127.1", "0x7f000001")."""
        answers: queue.SimpleQueue[Sequence[str] | Exception] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answers.put(self.lookup(host))
            except Exception as error:
                answers.put(error)

        threading.Thread(target=ask, name="resolve", daemon=True).start()  # the resolver knows no deadline
        try:
            answer = answers.get(timeout=_left(deadline))
        except queue.Empty:
            raise Unreachable(f"the name {host} was not resolved in time") from None
        if isinstance(answer, Exception):
            raise Unreachable(f"the name {host} cannot be resolved") from answer
        return [ip_address(a) for a in answer]


@dataclass(frozen=True)
class _Place:
    """A URL that is fit to be fetched, taken apart once: what is judged is what is connected to."""

    url: str
    scheme: str
    host: str
    port: int
    target: str

    @classmethod
    def of(cls, url: str) -> _Place:
        if len(url) > LONGEST_URL:
            raise Refused(f"the URL has more than {LONGEST_URL} characters")
        if any(c < " " or c in '\x7f\\"<>' for c in url):
            raise Refused("the URL holds characters that no URL has")
        try:
            parts = urlsplit(url.strip())
            host = (parts.hostname or "").encode("idna").decode("ascii")
            port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
        except ValueError as error:
            raise Refused("the URL is malformed") from error
        if parts.scheme not in ("http", "https"):
            raise Refused(f"the scheme {parts.scheme[:20]!r} is not allowed: http and https are")
        if "@" in parts.netloc:
            raise Refused("the URL holds a user name")
        if not host or not all(c.isalnum() or c in "-._:" for c in host):
            raise Refused("the URL names no proper host")
        path = quote(parts.path or "/", _RESERVED) + (f"?{quote(parts.query, _RESERVED)}" if parts.query else "")
        return cls(url.strip(), parts.scheme, host, port, path)

    def request(self, headers: Mapping[str, str]) -> bytes:
        name = f"[{self.host}]" if ":" in self.host else self.host
        host = name if self.port == {"http": 80, "https": 443}[self.scheme] else f"{name}:{self.port}"
        fixed = {"Host": host, "Accept-Encoding": "identity", "Connection": "close"}
        lines = [f"{key}: {value}" for key, value in {**fixed, **headers}.items()]
        if any(c < " " for line in lines for c in line):
            raise Refused("a header of the request holds a control character")
        return "\r\n".join([f"GET {self.target} HTTP/1.1", *lines, "", ""]).encode("latin-1", "replace")


class _Stream(io.RawIOBase):
    """What a socket gives until a moment and up to a number of bytes."""

    def __init__(self, sock: socket.socket, deadline: float, most: int) -> None:
        self._sock, self._deadline, self._most = sock, deadline, most

    def makefile(self, mode: str) -> io.BufferedReader:
        """What `HTTPResponse` asks a socket for."""
        return io.BufferedReader(self, _CHUNK)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._sock.settimeout(_left(self._deadline))
        n = self._sock.recv_into(buffer)
        self._most -= n
        if self._most < 0:
            raise Refused("the answer is larger than is allowed")
        return n


def _left(deadline: float) -> float:
    """Seconds until then, never 0 (which a socket reads as "do not wait").

    Raises:
        Unreachable: it has passed.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise Unreachable("no complete answer in time")
    return max(left, 0.001)
