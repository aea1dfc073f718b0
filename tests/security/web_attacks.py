"""The attacks on the downloader: one table, `ATTACKS`, of what a hostile web server, name server or URL may do.

`contained(attack, web)` tries one against a real server on this machine, and says what went wrong, or None. Servers
of this machine are what the downloader refuses, so all attacks but those on the address itself allow 127.0.0.1.
"""

from __future__ import annotations

import gzip
import ipaddress
import re
import socket
import time
from dataclasses import dataclass, field
from typing import Any

from replay.record import Blob
from tests.security import bad_pictures as bad
from tests.security.hostile_web import Behaviour, Web, drips, endless, head, late, redirect, reply, sends
from tools.download import Downloader
from tools.fetch import Fetcher, FetchFailed, public

SLOW_S = 1.0  # deadline of a fetch from a slow server
HONEST_S = 5.0  # ... and of the others, which build their bombs first, on a loaded machine
MAX_BYTES = 4 * 2**20
SLACK_S = 3.0  # beyond the deadline, for decoding


def hangs(host: str) -> list[str]:
    time.sleep(2 * SLOW_S)
    return ["127.0.0.1"]


class Fickle:
    """A name server with one answer for the first question, and another one ever after."""

    def __init__(self, *answers: str) -> None:
        self._answers = list(answers)

    def __call__(self, host: str) -> list[str]:
        return [self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]]


@dataclass(frozen=True)
class Attack:
    """One attack.

    Attributes:
        does: what the server does at the path `name`; None where it must not be asked at all.
        expected: pattern of the reason of the refusal; "" where a clean picture must come.
        url: where, with `{port}` of the server; by default the path `name` on it.
        options: of the fetcher, beside those of `contained`.
    """

    name: str
    does: Behaviour | None
    expected: str
    url: str = ""
    options: dict[str, Any] = field(default_factory=dict)


def at(name: str, url: str, expected: str = "public internet", **options: Any) -> Attack:
    """An attack by the URL alone, which the strict rules must stop before anything is sent."""
    return Attack(name, None, expected, url, {"allowed": public} | options)


def named(name: str, address: str) -> Attack:
    """A name of the public DNS that leads to an address that is not public."""
    return at(name, "http://pictures.example:{port}/", lookup=lambda host: [address])


SLOW = "in time"
LARGE = "larger than"
NO_PICTURE = "not a PNG"
BROKEN = "broken or incomplete"
BOMB = "more than .* pixels"

ATTACKS: tuple[Attack, ...] = (
    # where the URL leads
    at("loopback", "http://127.0.0.1:{port}/"),
    at("loopback by name", "http://localhost:{port}/"),
    at("loopback in short", "http://127.1:{port}/"),
    at("loopback as a number", "http://2130706433:{port}/"),
    at("loopback in hex", "http://0x7f000001:{port}/"),
    at("loopback in octal", "http://0177.0.0.1:{port}/"),
    at("loopback over IPv6", "http://[::1]:{port}/"),
    at("loopback mapped into IPv6", "http://[::ffff:127.0.0.1]:{port}/"),
    at("loopback through NAT64", "http://[64:ff9b::7f00:1]:{port}/"),
    at("loopback through 6to4", "http://[2002:7f00:1::]:{port}/"),
    at("loopback through Teredo", "http://[2001:0:7f00:1::]:{port}/"),
    at("loopback with a dot behind it", "http://localhost.:{port}/", "public internet|cannot be resolved"),
    at("loopback in wide digits", "http://１２７.０.０.１:{port}/"),
    at("loopback in circled digits", "http://①②⑦.⓪.⓪.①:{port}/"),
    at("loopback with ideographic dots", "http://127。0。0。1:{port}/"),
    at("loopback in percent signs", "http://%31%32%37.0.0.1:{port}/", "no proper host"),
    at("loopback with a zone", "http://[::1%25lo]:{port}/", "public internet|no proper host|malformed"),
    at("loopback without slashes", "http:127.0.0.1:{port}/", "no proper host"),
    at("loopback behind three slashes", "http:///127.0.0.1:{port}/", "no proper host"),
    at("loopback with a tab in it", "http://127.0.\t0.1:{port}/", "characters that no URL"),
    at("this machine's own name", f"http://{socket.gethostname()}:{{port}}/", "public internet|cannot be resolved"),
    at("a port that does not exist", "http://127.0.0.1:99999/", "malformed"),
    at("a host that ends in nothing", "http://127.0.0.1\0.example.com:{port}/", "characters that no URL"),
    at("a file in capitals", "FILE:///etc/passwd", "scheme"),
    at("a scheme in a scheme", "jar:http://127.0.0.1:{port}/!/a.png", "scheme"),
    at("the unspecified address", "http://0.0.0.0:{port}/"),
    at("the unspecified address over IPv6", "http://[::]:{port}/"),
    at("the cloud's metadata", "http://169.254.169.254/latest/meta-data/"),
    named("a name for a private address", "10.0.0.1"),
    named("a name for the carrier's network", "100.64.0.1"),
    named("a name for link-local IPv6", "fe80::1%lo"),
    named("a name for unique-local IPv6", "fd00:ec2::254"),
    named("a name for multicast", "224.0.0.1"),
    Attack(
        "a name that changes its address",
        None,
        "no connection|in time",
        "http://pictures.example:{port}/",
        # allowed and silent at the first question, the server itself at the second
        {
            "allowed": lambda address: str(address) == "127.0.0.2",
            "lookup": Fickle("127.0.0.2", "127.0.0.1"),
        },
    ),
    Attack("a resolver that hangs", None, SLOW, "http://pictures.example:{port}/", {"lookup": hangs}),
    at("a file", "file:///etc/passwd", "scheme"),
    at("FTP", "ftp://127.0.0.1:{port}/a.png", "scheme"),
    at("gopher to a database", "gopher://127.0.0.1:{port}/_FLUSHALL", "scheme"),
    at("a picture in the URL", "data:image/png;base64,iVBORw0KGgo=", "scheme"),
    at("a user name", "http://example.com@127.0.0.1:{port}/", "user name"),
    at("a user name behind a backslash", "http://example.com\\@127.0.0.1:{port}/", "characters that no URL"),
    at(
        "a second request in the URL",
        "http://127.0.0.1:{port}/ HTTP/1.1\r\nX: y\r\n\r\nGET /",
        "characters that no URL",
    ),
    at("a URL without end", "http://127.0.0.1:{port}/" + "a" * 100_000, "characters"),
    at("a database's port", "http://example.com:6379/", "port 6379", ports=(80, 443)),
    # redirects
    Attack("redirect to another address of this machine", redirect("http://127.0.0.2:{port}/"), "public internet"),
    Attack("redirect to the cloud's metadata", redirect("http://169.254.169.254/"), "public internet"),
    Attack("redirect without a scheme", redirect("//127.0.0.2:{port}/"), "public internet"),
    Attack("redirect without a scheme and backwards", redirect("\\\\127.0.0.2:{port}/"), "characters that no URL"),
    Attack("redirect to a mapped address", redirect("http://[::ffff:169.254.169.254]/"), "public internet"),
    Attack("redirect to a port of this machine", redirect("http://127.0.0.2:22/"), "public internet"),
    Attack("redirect to a picture in the URL", redirect("data:image/png;base64,iVBORw0KGgo="), "scheme"),
    Attack("redirect to a file", redirect("file:///etc/passwd"), "scheme"),
    Attack("redirect with a user name", redirect("http://a:b@127.0.0.1:{port}/"), "user name"),
    Attack("redirect to itself", redirect(""), "redirects"),
    Attack("redirect without end", lambda web: redirect(f"?{len(web.asked)}")(web), "redirects"),
    # how much, and how slowly
    Attack("a body said to be huge", lambda web: head(f"Content-Length: {10**12}"), LARGE),
    Attack("a body without end", endless(b"\0", head()), LARGE),
    Attack("chunks without end", endless(b"4\r\naaaa\r\n", head("Transfer-Encoding: chunked")), LARGE),
    Attack("a huge chunk", endless(b"\0", head("Transfer-Encoding: chunked") + b"fffffffffff\r\n"), LARGE),
    Attack("a chunk of negative size", endless(b"\0", head("Transfer-Encoding: chunked") + b"-5\r\n"), "proper HTTP"),
    Attack("a chunk size without end", endless(b"0", head("Transfer-Encoding: chunked")), "proper HTTP"),
    Attack("trailers without end", endless(b"a: b\r\n", head("Transfer-Encoding: chunked") + b"0\r\n"), LARGE),
    Attack("a body of negative size", endless(b"\0", head("Content-Length: -1")), LARGE),
    Attack(
        "a compressed bomb",
        lambda w: reply(gzip.compress(bytes(2**24)), "image/png", "Content-Encoding: gzip"),
        "compr",
    ),
    Attack("half a body", lambda web: reply(bad.picture())[:-50], "ends early"),
    Attack("half a chunk", lambda web: head("Transfer-Encoding: chunked") + b"64\r\nabc", "proper HTTP"),
    Attack("silence", drips(b"", b""), SLOW),
    Attack("silence where TLS is expected", None, SLOW, "https://127.0.0.1:{port}/"),
    Attack("dripping status", drips(b"H"), SLOW),
    Attack("dripping headers", drips(b"HTTP/1.1 200 OK\r\nA: "), SLOW),
    Attack("dripping body", drips(head("Content-Length: 100000")), SLOW),
    Attack("dripping chunks", drips(head("Transfer-Encoding: chunked"), b"1\r\na\r\n"), SLOW),
    Attack("dripping redirects", late(redirect("")), SLOW),
    # what is said about it
    Attack("headers without end", endless(b"a: b\r\n", b"HTTP/1.1 200 OK\r\n"), "proper HTTP"),
    Attack("one header without end", endless(b"a", b"HTTP/1.1 200 OK\r\nA: "), "proper HTTP"),
    Attack("interim replies without end", endless(b"HTTP/1.1 100 Continue\r\n\r\n"), f"{LARGE}|{SLOW}"),
    Attack("no HTTP at all", endless(b"\xff\xd8\xff"), "proper HTTP"),
    Attack("an error page", lambda web: reply(bad.HTML, "text/html", status="404 Not Found"), "answered 404"),
    Attack("nothing", sends(b""), NO_PICTURE),
    Attack(
        "two lengths",
        lambda w: head("Content-Length: 5", f"Content-Length: {10**9}") + b"x" * 5,
        f"{NO_PICTURE}|{LARGE}",
    ),
    Attack(
        "a length and chunks",
        lambda w: head("Content-Length: 9", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
        NO_PICTURE,
    ),
    Attack("part of a picture", lambda w: reply(bad.picture(), status="206 Partial Content"), "answered 206"),
    Attack(
        "another protocol", lambda w: reply(b"", status="101 Switching Protocols"), "answered 101|proper HTTP|in time"
    ),
    # what it is
    Attack("HTML as PNG", sends(bad.HTML), NO_PICTURE),
    Attack("SVG", sends(bad.SVG, "image/svg+xml"), NO_PICTURE),
    Attack("SVG as PNG", sends(bad.SVG), NO_PICTURE),
    Attack("PostScript as PNG", sends(bad.EPS), NO_PICTURE),
    Attack("TIFF as PNG", sends(lambda: bad.picture("TIFF")), NO_PICTURE),
    Attack("JPEG as PNG", sends(lambda: bad.picture("JPEG")), "said to be"),
    Attack("PNG as HTML", sends(bad.picture, "text/html"), "said to be"),
    Attack("a pixel that counts visitors", sends(lambda: bad.picture(size=(1, 1))), "only 1 x 1"),
    Attack("a PNG bomb", sends(bad.png_bomb), BOMB),
    Attack("a PNG bomb of single bits", sends(bad.png_bomb_of_bits), BOMB),
    Attack("a text bomb within a PNG", sends(bad.png_with_text_bomb), f"{NO_PICTURE}|{BROKEN}"),
    Attack("a profile bomb within a PNG", sends(bad.png_with_profile_bomb), NO_PICTURE),
    Attack("a PNG of countless chunks", sends(bad.png_of_endless_chunks), ""),
    Attack("a GIF with a giant screen", sends(bad.gif_screen, "image/gif"), BOMB),
    Attack("a GIF of countless frames", sends(bad.gif_of_many_frames, "image/gif"), ""),
    Attack("an animated PNG", sends(bad.apng_bomb), ""),
    Attack("a WebP with a giant canvas", sends(bad.webp_giant, "image/webp"), BOMB),
    Attack("a JPEG of countless passes", sends(bad.jpeg_of_many_scans, "image/jpeg"), "passes"),
    Attack("half a JPEG", sends(lambda: bad.half(lambda: bad.picture("JPEG")), "image/jpeg"), f"{NO_PICTURE}|{BROKEN}"),
    Attack("half a PNG", sends(lambda: bad.half(bad.picture)), BROKEN),
    Attack("half a GIF", sends(lambda: bad.half(lambda: bad.picture("GIF")), "image/gif"), BROKEN),
    Attack("half a WebP", sends(lambda: bad.half(lambda: bad.picture("WEBP")), "image/webp"), f"{NO_PICTURE}|{BROKEN}"),
    Attack("broken EXIF", sends(bad.broken_exif, "image/jpeg"), ""),
    Attack("a ZIP behind a PNG", sends(bad.png_and_zip), ""),
    Attack("a script behind a GIF", sends(bad.gif_and_script, "image/gif"), ""),
    Attack("a script within a JPEG", sends(bad.jpeg_and_script, "image/jpeg"), ""),
    Attack("a script within a PNG", sends(bad.png_and_script), ""),
    Attack("a photo that tells where it was taken", sends(bad.located_photo, "image/jpeg"), ""),
)

LEFTOVERS = (b"script", b"payload", b"PK\x03\x04", b"Secret", b"Exif", b"xmp", b"acTL", b"NETSCAPE", b"eXIf", b"iCCP")


def downloader(**options: Any) -> Downloader:
    """With small limits, and for servers on 127.0.0.1."""

    def allowed(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
        return str(address) == "127.0.0.1"

    limits: dict[str, Any] = {"allowed": allowed, "ports": range(1, 65536), "timeout_s": HONEST_S}
    return Downloader(Fetcher(**(limits | {"max_bytes": MAX_BYTES} | options)))


def contained(attack: Attack, web: Web) -> str | None:
    """Tries one attack: None if it is contained, else what went wrong."""
    if attack.does is not None:
        web.behaviours[attack.name.replace(" ", "-")] = attack.does
    url = (attack.url or web.url(attack.name.replace(" ", "-"))).replace("{port}", str(web.port))
    deadline_s = SLOW_S if SLOW in attack.expected else HONEST_S
    asked, began = len(web.asked), time.monotonic()
    reason, blob = "", None
    try:
        blob = downloader(**({"timeout_s": deadline_s} | attack.options)).picture(url)
    except FetchFailed as failure:
        reason = str(failure)
    took = time.monotonic() - began
    if took > deadline_s + SLACK_S:
        return f"it took {took:.1f} s"
    if attack.does is None and len(web.asked) > asked:
        return "the server was asked"
    if attack.expected:
        ok = blob is None and re.search(attack.expected, reason) and len(reason) < 200
        return None if ok else f"{'a picture came' if blob else repr(reason)} instead of {attack.expected!r}"
    return _unclean(blob) if blob else f"no picture: {reason}"


def _unclean(blob: Blob) -> str | None:
    left = [word for word in LEFTOVERS if word in blob.data]
    return f"what came holds {left}" if left else None
