"""Finds pictures of real things by words.

A provider is anything with `search(query, limit)`. The built-in one ranks the captioned pictures of `corpus.pictures`
by BM25 over stems, where words of the title weigh more, and adds how much of the title the query names: so "flag of
Guinea" finds Guinea's flag and not Papua New Guinea's. It would rather find nothing than something else: a query for
a flag or a map gets that or nothing, and so does one of whose words only commonplace ones ("red", "new") are known.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Protocol

import snowballstemmer
from rank_bm25 import BM25Okapi

from agent.spec import PUBLISHED
from corpus import pictures
from corpus.pictures import Picture
from replay.record import Blob
from tools.base import CallFailed, ToolResult

TITLE_WEIGHT = 3  # a word of the title counts as often as this many in the caption
COVERAGE_WEIGHT = 8.0  # BM25 points for a query that names every word of a title
COMMON = 0.05  # a word in more than this share of the pictures does not tell what is meant
LONGEST = 500  # characters of a query that are looked at: a page of text is no query
QUOTED = 60  # characters of a query that a reason repeats

MIME = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}

_STOP = """
a about above an and any are as at by can could for from get give has have her his i image in into is it its let like
looking me my of on one or our over photography picture please s see seen show showing shown shows some that the their
them there these this those to under up view was we what which while who with you your
"""
STOP = frozenset(_STOP.split())
#: Words that ask for a kind of picture, by stem.
KINDS = {"flag": "flag", "map": "map", "photo": "photo", "photograph": "photo"}
#: Stems of words in many names, which name nothing by themselves.
WEAK = frozenset(
    ("central", "citi", "democrat", "east", "great", "island", "new")
    + ("north", "republ", "saint", "san", "south", "unit", "west")
)


@dataclass(frozen=True)
class Hit:
    """One picture found; a higher score is a better match, and scores of two queries are not comparable."""

    title: str
    caption: str
    source: str
    licence: str
    author: str
    score: float
    image: Blob

    def provenance(self) -> dict[str, Any]:
        """All but the picture itself, JSON-ready."""
        named = {k: getattr(self, k) for k in ("title", "caption", "source", "licence", "author")}
        return named | {"score": round(self.score, 3), "sha256": self.image.sha256}


class Provider(Protocol):
    """A place to look for pictures."""

    def search(self, query: str, limit: int) -> list[Hit]:
        """At most `limit` hits that are relevant to `query`, the best first; empty where there is none."""
        ...


class SearchTool:
    """The `search` tool.

    Args:
        top: pictures a call returns, at most; at least 1.
        provider: where to look; the built-in collection if not given.
    """

    spec = PUBLISHED["search"]

    def __init__(self, top: int = 1, provider: Provider | None = None) -> None:
        if top < 1:
            raise ValueError(f"search: top must be at least 1, not {top}")
        self.top = top
        self._provider = provider

    def run(self, params: Mapping[str, Any], images: Sequence[Blob] = ()) -> ToolResult:
        """The best pictures for `params["query"]`; the provenance is the best hit's, further ones are in `others`.

        Raises:
            CallFailed: the query is empty, or nothing is relevant to it.
        """
        query = str(params["query"]).strip()
        if not query:
            raise CallFailed("the search query is empty: say what the picture shows")
        hits = (self._provider or collection()).search(query, self.top)
        if not hits:
            quoted = query if len(query) <= QUOTED else query[:QUOTED] + "..."
            raise CallFailed(f"no picture found for {quoted!r}: name a country's flag or map, an animal, a landmark")
        best, *others = (hit.provenance() for hit in hits)
        return ToolResult(
            images=tuple(hit.image for hit in hits),
            provenance=best | {"others": others} if others else best,
        )


@cache
def collection() -> Collection:
    """The built-in collection, read and indexed once a process."""
    return Collection(pictures.load())


class Collection:
    """Ranks captioned pictures that are at hand.

    Args:
        items: the pictures; their files are read when they are found.
    """

    def __init__(self, items: Sequence[Picture]) -> None:
        self._items = items
        self._titles = [frozenset(stems(p.title)) for p in items]
        texts = [stems(p.title) * TITLE_WEIGHT + stems(p.caption) + [p.kind] for p in items]
        self._words = [frozenset(text) for text in texts]
        self._bm25 = BM25Okapi(texts)
        self._pictures_with = _count(self._words)

    def search(self, query: str, limit: int) -> list[Hit]:
        """The best pictures, by falling score and, where equal, in the order of the collection."""
        words = stems(query[:LONGEST])
        subject = {w for w in words if w not in KINDS}
        known = {w for w in subject if w in self._pictures_with}
        telling = (known - WEAK) or known
        wanted = {KINDS[w] for w in words if w in KINDS} - {"photo"}  # "photo" is said of any picture: no condition
        if not words or (subject and not known):
            return []
        vague = known != subject and all(w in WEAK or self._is_common(w) for w in known)
        scores = self._bm25.get_scores([KINDS.get(w, w) for w in words])
        found = []
        for i, picture in enumerate(self._items):
            if (wanted and picture.kind not in wanted) or (subject and not telling & self._words[i]):
                continue
            coverage = self._coverage(i, words)
            if coverage == 1 or not vague:
                found.append((-float(scores[i]) - COVERAGE_WEIGHT * coverage, i))
        return [self._hit(i, -score) for score, i in sorted(found)[:limit]]

    def _is_common(self, word: str) -> bool:
        return self._pictures_with[word] > COMMON * len(self._items)

    def _coverage(self, i: int, words: Iterable[str]) -> float:
        """Share of a title that the words name, rare words counting more: 0 to 1."""
        title = self._titles[i]
        if title <= set(words):
            return 1.0
        return sum(self._bm25.idf[w] for w in title.intersection(words)) / sum(self._bm25.idf[w] for w in title)

    def _hit(self, i: int, score: float) -> Hit:
        p = self._items[i]
        image = Blob(pictures.read(p), MIME[Path(p.file).suffix])
        return Hit(p.title, p.caption, p.source, p.licence, p.author, score, image)


def _count(texts: Iterable[frozenset[str]]) -> dict[str, int]:
    """In how many texts each word stands."""
    count: dict[str, int] = {}
    for text in texts:
        for word in text:
            count[word] = count.get(word, 0) + 1
    return count


def stems(text: str) -> list[str]:
    """The different words that carry meaning, without case, accents and endings, in their order.

    "The flags of São Tomé" -> ["flag", "sao", "tome"]
    """
    plain = unicodedata.normalize("NFKD", text).casefold()
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    plain = re.sub(r"\b(?:\w\.){2,}", lambda m: m[0].replace(".", ""), plain)  # "u.s.a." -> "usa"
    return list(dict.fromkeys(_stem(w) for w in re.findall(r"[^\W_]+", plain) if w not in STOP))


@lru_cache(maxsize=16384)
def _stem(word: str) -> str:
    return snowballstemmer.stemmer("english").stemWord(word)  # a new one: it keeps state, so threads cannot share it
