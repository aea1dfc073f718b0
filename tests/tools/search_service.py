"""Search engines on this machine: one server that speaks the APIs of all four, and misbehaves when told to."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from PIL import Image

from tests.local_service import Answering

Misbehaviour = Callable[["Handler"], None]
#: What every engine knows of a picture: its title, page, size, and the colour that it has.
Known = dict[str, Any]

BRIDGE: Known = {"title": "Golden Gate Bridge", "colour": "orange", "size": (1600, 900)}
FOG: Known = {"title": "Fog over a bay", "colour": "grey", "size": (1600, 900)}


def picture(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (160, 90), colour).save(buffer, "PNG")
    return buffer.getvalue()


class Handler(Answering):
    server: SearchService

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        asked = {key: value[0] for key, value in parse_qs(parts.query).items()}
        self.server.seen.append({"path": parts.path, "headers": dict(self.headers), **asked})
        try:
            if parts.path.startswith("/pictures/"):
                self.show(parts.path.removeprefix("/pictures/"))
            else:
                behaviour = self.server.behaviours.pop(0) if self.server.behaviours else Handler.good
                behaviour(self)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def show(self, name: str) -> None:
        if name == "gone":
            self.answer(404, b"")
        elif name == "page":
            self.answer(200, b"<html>not a picture</html>", Content_Type="image/png")
        elif name == "down":
            self.close_connection = True
        else:
            self.answer(200, picture(name), Content_Type="image/png")

    def good(self) -> None:
        engine = urlsplit(self.path).path
        self.answer(200, ANSWERS[engine]([(known, self.link(known)) for known in self.server.known]))

    def link(self, known: Known) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/pictures/{known['colour']}"


Answers = list[tuple[Known, str]]


def commons(found: Answers) -> dict[str, Any]:
    if not found:
        return {"batchcomplete": True}

    def page(i: int, known: Known, link: str) -> dict[str, Any]:
        about = {
            "ImageDescription": {"value": f"<p>{known['title']}, seen &amp; <b>photographed</b></p>"},
            "Artist": {"value": '<a href="//commons.wikimedia.org/wiki/User:Ann">Ann</a>'},
            "LicenseShortName": {"value": "CC BY-SA 4.0"},
        }
        info = {"url": f"{link}-original", "thumburl": link, "descriptionurl": "https://commons.wikimedia.org/wiki/F"}
        info |= {"width": known["size"][0], "height": known["size"][1]}
        return {
            "ns": 6,
            "title": f"File:{known['title']}.jpg",
            "index": i,
            "imageinfo": [info | {"extmetadata": about}],
        }

    deleted = {"ns": 6, "title": "File:Deleted.jpg", "index": 99}
    pages = [page(i, known, link) for i, (known, link) in enumerate(found, 1)]
    return {"batchcomplete": True, "query": {"pages": [deleted, *reversed(pages)]}}


def searxng(found: Answers) -> dict[str, Any]:
    results = [
        {
            "url": "https://example.org/page",
            "title": known["title"],
            "content": "",
            "img_src": link,
            "thumbnail_src": f"{link}?small",
            "resolution": " x ".join(map(str, known["size"])),
            "source": "example.org",
        }
        for known, link in found
    ]
    return {"query": "q", "results": results, "unresponsive_engines": []}


def brave(found: Answers) -> dict[str, Any]:
    results = [
        {
            "type": "image_result",
            "title": known["title"],
            "url": "https://example.org/page",
            "source": "example.org",
            "thumbnail": {"src": f"{link}?small", "width": 500, "height": 281},
            "properties": {"url": link, "width": known["size"][0], "height": known["size"][1]},
        }
        for known, link in found
    ]
    return {"type": "images", "results": results}


def serpapi(found: Answers) -> dict[str, Any]:
    if not found:
        return {"error": "Google hasn't returned any results for this query."}
    results = [
        {
            "position": i,
            "title": known["title"],
            "link": "https://example.org/page",
            "source": "Example",
            "original": link,
            "thumbnail": f"{link}?small",
            "original_width": known["size"][0],
            "original_height": known["size"][1],
        }
        for i, (known, link) in enumerate(found, 1)
    ]
    return {"search_metadata": {"status": "Success"}, "images_results": results}


ANSWERS: dict[str, Callable[[Answers], dict[str, Any]]] = {
    "/w/api.php": commons,
    "/search": searxng,
    "/images/search": brave,
    "/search.json": serpapi,
}
#: provider -> its URL's path.
PATHS = {"commons": "/w/api.php", "searxng": "", "brave": "", "serpapi": ""}


class SearchService(ThreadingHTTPServer):
    """Knows the pictures `known`; takes `behaviours` one a search, and is good once there are none left; `seen` are
    the requests' parameters.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.known: list[Known] = [FOG, BRIDGE]
        self.behaviours: list[Misbehaviour] = []
        self.seen: list[dict[str, Any]] = []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def url(self, provider: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{PATHS[provider]}"

    def searches(self) -> list[dict[str, Any]]:
        """The requests that were no pictures."""
        return [asked for asked in self.seen if not asked["path"].startswith("/pictures/")]
