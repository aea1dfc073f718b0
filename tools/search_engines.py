"""The search engines: what each is asked, and how its answer is read.

Sources: www.mediawiki.org/wiki/API:Imageinfo (Commons), docs.searxng.org/dev/search_api.html,
api-dashboard.search.brave.com/app/documentation/image-search, serpapi.com/google-images-api.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tools.web_search import WANTED, Engine, Found, Overloaded

COMMONS_WIDTH = 1280  # pixels of the copy that Commons is asked for


class Commons(Engine):
    """Wikimedia Commons: freely licensed pictures, each with author and licence. Give a `contact`: its rules ask it."""

    name, home, quota = "commons", "https://commons.wikimedia.org/w/api.php", "3/second"

    def _question(self, query: str) -> tuple[str, Mapping[str, object], Mapping[str, str]]:
        words = re.sub(r"[^\w\s'.-]", " ", query)  # its own operators ("insource:/x/") are not the agent's
        return "", _COMMONS | {"gsrsearch": f"{words} filetype:bitmap|drawing"}, {}

    def _found(self, answer: Any) -> Iterator[Found]:
        if "error" in answer:
            if answer["error"]["code"] in ("maxlag", "ratelimited", "readonly"):
                raise Overloaded
            raise self._failed(f"answered the error {str(answer['error']['code'])[:60]!r}")
        for page in sorted(answer.get("query", {}).get("pages", []), key=lambda page: page["index"]):
            if not (images := page.get("imageinfo")):  # deleted, or left for a further request
                continue
            image = images[0]
            about = {key: value["value"] for key, value in (image.get("extmetadata") or {}).items()}
            yield Found(
                [image.get("thumburl") or image["url"]],
                image["descriptionurl"],
                re.sub(r"^File:|\.\w+$", "", page["title"]),
                about.get("ImageDescription"),
                about.get("Artist"),
                about.get("LicenseShortName") or "unknown",
                "Wikimedia Commons",
                (image["width"], image["height"]),
            )


_COMMONS: dict[str, object] = {
    "action": "query",
    "format": "json",
    "formatversion": 2,
    "maxlag": 5,
    "generator": "search",
    "gsrnamespace": 6,
    "gsrlimit": WANTED,
    "prop": "imageinfo",
    "iiprop": "url|size|extmetadata",
    "iiurlwidth": COMMONS_WIDTH,
    "iiextmetadatafilter": "ImageDescription|Artist|LicenseShortName",
    "iiextmetadatalanguage": "en",
}


class SearXNG(Engine):
    """An instance of SearXNG at `url`, whose settings allow the format `json`."""

    name = "searxng"

    def _question(self, query: str) -> tuple[str, Mapping[str, object], Mapping[str, str]]:
        return "/search", {"q": query, "format": "json", "categories": "images", "safesearch": 1}, {}

    def _found(self, answer: Any) -> Iterator[Found]:
        results = answer["results"]
        if not results and (silent := answer.get("unresponsive_engines")):
            raise self._failed(f"has no answer from its engines ({len(silent)} of them did not respond)")
        for one in results:
            yield Found(
                [one.get("img_src"), one.get("thumbnail_src")],
                one.get("url"),
                one.get("title"),
                one.get("content"),
                one.get("author"),
                source=one.get("source"),
                size=_size(one.get("resolution")),
            )


class Brave(Engine):
    """Brave's image search; the key is in BRAVE_API_KEY."""

    name, home, quota = "brave", "https://api.search.brave.com/res/v1", "1/second"
    key_variable = "BRAVE_API_KEY"

    def _question(self, query: str) -> tuple[str, Mapping[str, object], Mapping[str, str]]:
        words = " ".join(query.split()[:50])  # more it does not take
        asked = {"q": words, "count": WANTED, "safesearch": "strict"}
        return "/images/search", asked, {"X-Subscription-Token": self._key}

    def _found(self, answer: Any) -> Iterator[Found]:
        for one in answer["results"]:
            picture, copy = one.get("properties") or {}, one.get("thumbnail") or {}
            urls, size = [picture.get("url"), copy.get("src")], (picture.get("width"), picture.get("height"))
            yield Found(urls, one.get("url"), one.get("title"), source=one.get("source"), size=size)


class SerpApi(Engine):
    """Google's image search by SerpAPI; the key is in SERPAPI_API_KEY."""

    name, home, quota = "serpapi", "https://serpapi.com", "1/second"
    key_variable = "SERPAPI_API_KEY"

    def _question(self, query: str) -> tuple[str, Mapping[str, object], Mapping[str, str]]:
        asked = {"engine": "google_images", "q": query, "safe": "active", "hl": "en", "api_key": self._key}
        return "/search.json", asked, {}

    def _found(self, answer: Any) -> Iterator[Found]:
        if "hasn't returned any results" in str(answer.get("error")):
            return
        for one in answer["images_results"]:
            urls, size = (
                [one.get("original"), one.get("thumbnail")],
                (one.get("original_width"), one.get("original_height")),
            )
            yield Found(urls, one["link"], one.get("title"), source=one.get("source"), size=size)


def _size(resolution: object) -> tuple[object, object]:
    """Of "1920 x 1080", "1920×1080" or anything else."""
    numbers = re.findall(r"\d{1,9}", str(resolution or ""))
    return (int(numbers[0]), int(numbers[1])) if len(numbers) == 2 else (0, 0)
