"""Captioned pictures that are at hand: the built-in collection, and folders of one's own.

They are ranked by BM25 over stems, where words of the title weigh more, and by how much of the title the query names:
so "flag of Guinea" finds Guinea's flag and not Papua New Guinea's. It would rather find nothing than something else: a
query for a flag or a map gets that or nothing, and so does one of whose words only commonplace ones ("red", "new") are
known.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from rank_bm25 import BM25Okapi

from corpus import pictures
from replay.record import Blob
from tools.download import clean
from tools.fetch import Unreachable
from tools.hits import LONGEST, Hit, stems

TITLE_WEIGHT = 3  # a word of the title counts as often as this many in the caption
COVERAGE_WEIGHT = 8.0  # BM25 points for a query that names every word of a title
COMMON, RARE = 0.05, 3  # a word in more than this share of the pictures, and in more than so many, tells nothing

MIME = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp", ".gif": "image/gif"}
METADATA = "metadata.jsonl"  # the name that Hugging Face's `imagefolder` has for it

#: Words that ask for a kind of picture, by stem.
KINDS = {"flag": "flag", "map": "map", "photo": "photo", "photograph": "photo"}
#: Stems of words in many names, which name nothing by themselves.
WEAK = frozenset(
    ("central", "citi", "democrat", "east", "great", "island", "new")
    + ("north", "republ", "saint", "san", "south", "unit", "west")
)


@dataclass(frozen=True)
class Entry:
    """A picture of a collection; `kind` is one of `corpus.pictures.KINDS`, or "" where kinds are not told."""

    hit: Hit
    kind: str = ""


class Collection:
    """Ranks captioned pictures (`tools.hits.Provider`).

    Args:
        entries: the pictures, at least one.
    """

    name = "collection"
    hint = "name a country's flag or map, an animal, a landmark"

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._entries = entries
        self._titles = [frozenset(stems(e.hit.title)) for e in entries]
        texts = [stems(e.hit.title) * TITLE_WEIGHT + stems(e.hit.caption) + [e.kind] for e in entries]
        self._words = [frozenset(text) for text in texts]
        self._bm25 = BM25Okapi(texts)
        self._pictures_with = Counter(word for text in self._words for word in text)

    def search(self, query: str, limit: int, timeout_s: float = 0.0) -> list[Hit]:
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
        for i, entry in enumerate(self._entries):
            if (wanted and entry.kind and entry.kind not in wanted) or (subject and not telling & self._words[i]):
                continue
            coverage = self._coverage(i, words)
            if coverage == 1 or not vague:
                found.append((-float(scores[i]) - COVERAGE_WEIGHT * coverage, i))
        return [replace(self._entries[i].hit, score=-score) for score, i in sorted(found)[:limit]]

    def _is_common(self, word: str) -> bool:
        return self._pictures_with[word] > max(RARE, COMMON * len(self._entries))

    def _coverage(self, i: int, words: Iterable[str]) -> float:
        """Share of a title that the words name, rare words counting more: 0 to 1."""
        title, named = self._titles[i], self._titles[i].intersection(words)
        if not named or named == title:
            return float(bool(named))
        return sum(map(self._rarity, named)) / sum(map(self._rarity, title))

    def _rarity(self, word: str) -> float:
        return math.log(1 + len(self._entries) / self._pictures_with[word])


@cache
def collection() -> Collection:
    """The built-in collection, read and indexed once a process."""
    return Collection([entry(picture) for picture in pictures.load()])


def entry(picture: pictures.Picture) -> Entry:
    """A picture of the built-in collection."""
    told = {name: getattr(picture, name) for name in ("title", "caption", "source", "licence", "author")}
    return Entry(Hit(**told, fetch=partial(_built_in, picture)), picture.kind)


def _built_in(picture: pictures.Picture, timeout_s: float) -> Blob:
    return Blob(pictures.read(picture), MIME[Path(picture.file).suffix])


class Folder:
    """A folder of captioned pictures, and the folders in it (`tools.hits.Provider`); indexed on first use.

    A picture is known by its line in a `metadata.jsonl` of its folder or one above (`file_name`, and any of `title`,
    `caption` or `text`, `author`, `licence`, `source`, `page`), by the text in a file of its name that ends in
    `.txt`, or by its name alone.

    Raises:
        ValueError: there is no such folder.
    """

    name = "folder"
    hint = "ask in other words, or for something else"

    def __init__(self, path: str) -> None:
        self._path = Path(path).expanduser()
        if not self._path.is_dir():
            raise ValueError(f"search: there is no folder {path}")
        self._lock = threading.Lock()
        self._collection: Collection | None = None

    def search(self, query: str, limit: int, timeout_s: float) -> list[Hit]:
        """The best pictures. Raises ValueError for a folder without pictures, and for metadata that are none."""
        with self._lock:
            if self._collection is None:
                entries = [Entry(_hit(*found)) for found in _files(self._path)]
                if not entries:
                    raise ValueError(f"search: the folder {self._path} holds no picture ({', '.join(MIME)})")
                self._collection = Collection(entries)
        return self._collection.search(query, limit)


def _files(top: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Every picture with what metadata say of it, in the order of their paths."""
    told: dict[Path, Mapping[str, Any]] = {}
    for metadata in sorted(top.rglob(METADATA)):
        for number, line in enumerate(metadata.read_text(encoding="utf-8").splitlines(), 1):
            try:
                about = json.loads(line)
                told[metadata.parent / about["file_name"]] = about
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{metadata}, line {number}: not an object with a file_name ({error})") from error
    for path in sorted(top.rglob("*")):
        if path.suffix.lower() in MIME and path.is_file():
            yield path, told.get(path, {})


def _hit(path: Path, about: Mapping[str, Any]) -> Hit:
    beside = path.with_suffix(".txt")
    caption = about.get("caption") or about.get("text") or (beside.read_text("utf-8") if beside.is_file() else "")
    told: dict[str, Any] = {key: str(about.get(key) or "") for key in ("author", "source", "page")}
    title, licence = about.get("title") or re.sub(r"[-_\s]+", " ", path.stem), about.get("licence") or "unknown"
    return Hit(str(title), " ".join(str(caption).split()), licence=str(licence), **told, fetch=partial(_read, path))


def _read(path: Path, timeout_s: float) -> Blob:
    try:
        return clean(path.read_bytes())
    except OSError as error:
        raise Unreachable(f"{path.name} cannot be read ({error.strerror})") from error
