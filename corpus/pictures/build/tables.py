"""The tables that people edit, and small helpers for wording."""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


#: Countries whose names take an article within a sentence.
WITH_ARTICLE = frozenset(
    (
        "Bahamas",
        "Central African Republic",
        "Comoros",
        "Democratic Republic of the Congo",
        "Dominican Republic",
        "Gambia",
        "Maldives",
        "Marshall Islands",
        "Netherlands",
        "Philippines",
        "Republic of the Congo",
        "Seychelles",
        "Solomon Islands",
        "United Arab Emirates",
        "United Kingdom",
        "United States",
    )
)


@dataclass(frozen=True)
class Country:
    """One line of `countries.tsv`; `adjectives` and `also` (other names) are lists, separated by commas."""

    code: str
    name: str
    adjectives: str
    also: str
    capital: str
    continent: str

    @property
    def phrase(self) -> str:
        """The name as it stands within a sentence: "Kenya", "the Netherlands"."""
        return f"the {self.name}" if self.name in WITH_ARTICLE else self.name

    @property
    def names(self) -> str:
        """What people call it beside its name, as a sentence of a caption; "" when there is nothing."""
        return f" Also called {listed(self.also.split(', '))}." if self.also else ""


def countries() -> list[Country]:
    return [Country(**row) for row in rows("countries.tsv")]


def rows(name: str) -> list[dict[str, str]]:
    """The lines of a tab-separated table, by column."""
    with (HERE / name).open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))


def slug(name: str) -> str:
    """A plain file name: "São Tomé" -> "sao-tome"."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return "-".join("".join(c if c.isalnum() else " " for c in plain.replace("'", "")).split())


def listed(words: Iterable[str]) -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    *head, last = words
    return f"{', '.join(head)} and {last}" if head else last
