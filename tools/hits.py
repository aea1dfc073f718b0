"""What a search finds, and in which order: words, relevance, and the interface of all places to look for pictures."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Protocol

import snowballstemmer

from replay.record import Blob
from tools.fetch import Refused

LONGEST = 500  # characters of a query that are looked at: a page of text is no query
ELSEWHERE = 0.5  # what a word of the query counts that is in the caption and not in the title
ARRIVAL = 0.4  # how much the last of a provider's answers loses against its first
SMALL, SMALL_COSTS = 300, 0.3  # pixels of a shorter side, below which a picture loses so much

_STOP = """
a about above an and any are as at by can could for from get give has have her his i image in into is it its let like
looking me my of on one or our over photography picture please s see seen show showing shown shows some that the their
them there these this those to under up view was we what which while who with you your
"""
STOP = frozenset(_STOP.split())


def _none(timeout_s: float) -> Blob:
    raise Refused("there is no picture behind this hit")


@dataclass(frozen=True)
class Hit:
    """One picture found.

    Attributes:
        source: the package or site that has it.
        licence: SPDX identifier or what the source calls it; "unknown" where the source does not say.
        url, page: of the picture, and of the page that shows it; "" for one that is at hand.
        side: pixels of its shorter side; 0 where that is not known.
        score: higher is a better match; scores of two queries are not comparable.
        fetch: the picture, within so many seconds; raises `tools.fetch.FetchFailed`.
    """

    title: str
    caption: str = ""
    source: str = ""
    licence: str = ""
    author: str = ""
    url: str = ""
    page: str = ""
    side: int = 0
    score: float = 0.0
    fetch: Callable[[float], Blob] = field(default=_none, compare=False, repr=False)

    def provenance(self) -> dict[str, Any]:
        """What is known of it, JSON-ready."""
        names = ("title", "caption", "source", "licence", "author", "url", "page")
        known = {name: getattr(self, name) for name in names if getattr(self, name)}
        return known | {"score": round(self.score, 3)}


class Provider(Protocol):
    """A place to look for pictures.

    Attributes:
        name: as the config has it.
        hint: what the agent is told to do when nothing is found.
    """

    name: str
    hint: str

    def search(self, query: str, limit: int, timeout_s: float) -> list[Hit]:
        """At most `limit` hits, the best first; empty where nothing is relevant to `query`.

        Raises:
            tools.remote.ServiceFailed: it cannot say, within so many seconds.
        """
        ...


def ranked(query: str, hits: Sequence[Hit]) -> list[Hit]:
    """Hits of an engine that says nothing but their order, by relevance.

    A hit scores the share of the query's words that its title names (in its caption they count half), less up to
    `ARRIVAL` for coming late and `SMALL_COSTS` for being small. So an engine's order decides among equals.
    """
    words = [w for w in stems(query[:LONGEST]) if w not in ("photo", "photograph")]
    scored = []
    for i, hit in enumerate(hits):
        late = ARRIVAL * i / len(hits)
        scored.append(replace(hit, score=_match(words, hit) - late - SMALL_COSTS * (0 < hit.side < SMALL)))
    return sorted(scored, key=lambda hit: -hit.score)


def _match(words: Sequence[str], hit: Hit) -> float:
    title, caption = _Text(hit.title), _Text(hit.caption)
    return sum(1.0 if w in title else ELSEWHERE * (w in caption) for w in words) / max(len(words), 1)


class _Text:
    """The words of a text; in scripts without spaces between words a part of the text is one too."""

    def __init__(self, text: str) -> None:
        self._words, self._plain = frozenset(stems(text)), plain(text)

    def __contains__(self, word: str) -> bool:
        return word in self._words or (not word.isascii() and word in self._plain)


def plain(text: str) -> str:
    """Without case and accents."""
    text = unicodedata.normalize("NFKD", text).casefold()
    return "".join(c for c in text if not unicodedata.combining(c))


def stems(text: str) -> list[str]:
    """The different words that carry meaning, without case, accents and endings, in their order.

    "The flags of São Tomé" -> ["flag", "sao", "tome"]
    """
    letters = re.sub(r"\b(?:\w\.){2,}", lambda m: m[0].replace(".", ""), plain(text))  # "u.s.a." -> "usa"
    return list(dict.fromkeys(_stem(w) for w in re.findall(r"[^\W_]+", letters) if w not in STOP))


@lru_cache(maxsize=16384)
def _stem(word: str) -> str:
    return snowballstemmer.stemmer("english").stemWord(word)  # a new one: it keeps state, so threads cannot share it
