"""Maps of countries, drawn from Natural Earth's borders as the npm package `world-atlas` carries them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pycountry

from corpus.pictures import Picture
from corpus.pictures.build.atlas import Atlas
from corpus.pictures.build.flags import encode
from corpus.pictures.build.tables import Country, countries, listed, slug

PACKAGE = "world-atlas"


def make(packages: Path) -> Iterator[tuple[Picture, bytes]]:
    """All maps, with their encoded pictures."""
    atlas = Atlas(packages / PACKAGE / "package/countries-10m.json")
    names = {_key(country): country.name for country in countries()}
    phrases = {_key(country): country.phrase for country in countries()}
    for country in countries():
        key = _key(country)
        adjective = country.adjectives.replace(", ", " or ")
        yield (
            Picture(
                file=f"maps/{slug(country.name)}.png",
                title=f"Map of {country.phrase}",
                subject=country.name,
                caption=(
                    f"A map of {country.phrase} in {country.continent}: a {adjective} map with the country in orange. "
                    + _borders(sorted(phrases[n] for n in atlas.neighbours(key) if n in phrases))
                    + f" Its capital is {country.capital}."
                    + country.names
                ),
                source="world-atlas 2.0.2 (npm), countries-10m.json: Natural Earth 4.1; drawn for this collection",
                licence="Public domain",
                author="Natural Earth",
                kind="map",
            ),
            encode(atlas.draw(key, names)),
        )


def _borders(neighbours: list[str]) -> str:
    return f"It borders {listed(neighbours)}." if neighbours else "It has no land border."


def _key(country: Country) -> str:
    """The atlas names countries by their ISO 3166 number, Kosovo (which has none) by its name."""
    if country.code == "xk":
        return "Kosovo"
    return str(pycountry.countries.lookup(country.code).numeric)
