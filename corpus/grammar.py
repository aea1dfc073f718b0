"""Prompts made from a grammar: a phrasing (opener, request, ending) with its slots filled.

Three splits that never meet, by construction. A question is *held out* if its MD5 says so, whatever the order in
which questions are made, so training never sees that combination of phrasing, entity and data. *Unseen* questions
are made of openers, requests, endings, entities, items, shapes and changes that no other question has.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import NamedTuple

from corpus import phrases, pictures
from corpus.phrases import CLASSES, Pattern
from corpus.scenes import COLOURS, GROUNDS, PLACES, SHAPES
from replay.record import Prompt

SPLITS = ("train", "heldout", "unseen")
#: One question in so many is held out.
HELD_OUT = 5
#: Countries with short names: so many for training, as many again at most for unseen prompts.
COUNTRIES, LONGEST_NAME = 60, 9
#: Photographed subjects of the collection, for training and for unseen prompts.
SUBJECTS = (
    ("astronaut", "butterfly", "cat", "Colosseum", "crab", "dog", "dolphin", "Eiffel Tower", "giraffe", "hammer")
    + ("hedgehog", "horse", "igloo", "kangaroo", "koala", "owl", "penguin", "pig", "rocket", "sheep", "Taj Mahal"),
    ("chameleon", "chair", "crocodile", "gorilla", "heron", "Louvre", "moose", "Parthenon", "squirrel", "toucan"),
)
UNSEEN_SHAPES = ("heart", "boat")
#: How often each kind of picture is asked for.
_KINDS = {"flag": 0.4, "map": 0.3, "photo": 0.3}
_PLACE = {p: f"on the {p}" for p in ("left", "right")} | {p: f"at the {p}" for p in ("top", "bottom")}
_GROUND = {"night": "at night", "snow": "in the snow"}
#: Chart title -> what is counted, for training and for unseen prompts.
ITEMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "Fruit": (("apples", "pears", "plums", "figs"), ("melons", "dates", "limes")),
    "Animals": (("goats", "hens", "cows", "ducks"), ("geese", "lambs", "bees")),
    "Things": (("books", "cups", "pens", "keys"), ("clocks", "chairs", "lamps")),
}
#: What can be wanted of a picture -> how it then looks, for training and for unseen prompts. Each changes every flag
#: visibly; mirroring would not.
CHANGES: tuple[dict[str, str], dict[str, str]] = (
    {
        "make it grey": "in grey",
        "make it sepia": "in sepia",
        "blur it": "blurred",
        "put a border around it": "with a border",
        "make it brighter": "brighter",
        "make it darker": "darker",
    },
    {"rotate it": "rotated", "invert its colours": "with colours inverted"},
)


@dataclass(frozen=True)
class Entity:
    """A real thing of the picture collection.

    Attributes:
        words: what a question calls it: "the flag of Kenya", "a giraffe".
        query: what to search for: "flag of Kenya", "giraffe".
        picture: the collection's own picture of it.
    """

    words: str
    query: str
    picture: pictures.Picture


class Phrasing(NamedTuple):
    """A question with its slots open, and its class."""

    cls: str
    text: str


def prompts(n: int, seed: int, split: str) -> list[Prompt]:
    """Make distinct prompts, a sixth of each class, the classes mixed within every six.

    `meta` holds `class`, `phrasing` and the values of the slots that the question fills: `real` and `query`; `scene`,
    `shape`; `data`, `counted`, `labels`, `values` and `title`; `change` and `changed`.

    Raises:
        ValueError: no such split, or it has fewer than `n` prompts.
    """
    patterns = _by_class(split)
    rng = Random(f"{split} {seed}")
    found: dict[str, Prompt] = {}
    order: list[str] = []
    misses = 0
    while len(found) < n:
        order = order or rng.sample(CLASSES, len(CLASSES))
        prompt = _prompt(rng.choice(patterns[order[-1]]), split, rng)
        if prompt.id in found or not _belongs(prompt.question, split):
            misses += 1
            if misses > 1000:
                raise ValueError(f"{n} are too many {split} prompts: the grammar gave {len(found)} distinct ones")
            continue
        found[prompt.id] = prompt
        order.pop()
        misses = 0
    return list(found.values())


def phrasings(split: str) -> list[Phrasing]:
    """Every phrasing of a split, each once, in a fixed order ("heldout" has those of "train")."""
    openers, endings = _frame(split)
    every = (
        Phrasing(pattern.cls, _sentence(opener, request, ending))
        for patterns in _by_class(split).values()
        for pattern in patterns
        for request in phrases.expand(pattern.text)
        for opener, ending in itertools.product(openers, endings)
    )
    return list(dict.fromkeys(every))


def _by_class(split: str) -> dict[str, list[Pattern]]:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: the grammar has {', '.join(SPLITS)}")
    patterns = phrases.UNSEEN if split == "unseen" else phrases.TRAIN
    return {cls: [p for p in patterns if p.cls == cls] for cls in CLASSES}


def _frame(split: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if split == "unseen":
        return phrases.UNSEEN_OPENERS, phrases.UNSEEN_ENDINGS
    return phrases.OPENERS, phrases.ENDINGS


def _sentence(opener: str, request: str, ending: str) -> str:
    text = opener + request if request.endswith("?") else f"{opener}{request}."
    return text[0].upper() + text[1:] + ending


def _belongs(question: str, split: str) -> bool:
    held = int(hashlib.md5(question.encode()).hexdigest(), 16) % HELD_OUT == 0
    return split == "unseen" or held == (split == "heldout")


def _prompt(pattern: Pattern, split: str, rng: Random) -> Prompt:
    openers, endings = _frame(split)
    phrasing = _sentence(rng.choice(openers), rng.choice(phrases.expand(pattern.text)), rng.choice(endings))
    slots, entity = _slots(split == "unseen", rng)
    question = phrasing.format_map(slots)
    question = question[0].upper() + question[1:]
    return Prompt(
        id=f"{split}-{hashlib.md5(question.encode()).hexdigest()[:16]}",
        question=question,
        images=(pictures.read(entity.picture),) if pattern.given else (),
        image_num=len(pattern.tools) or -1,
        tools=pattern.tools,
        meta={"class": pattern.cls, "phrasing": phrasing, **_used(phrasing, slots)},
    )


def _slots(unseen: bool, rng: Random) -> tuple[dict[str, str], Entity]:
    entity = _entity(unseen, rng)
    change, changed = rng.choice(list(CHANGES[unseen].items()))
    slots = {"real": entity.words, "query": entity.query, "change": change, "changed": changed}
    return slots | _scene(unseen, rng) | _data(unseen, rng), entity


@cache
def _entities() -> tuple[dict[str, list[Entity]], dict[str, list[Entity]]]:
    """Kind -> entities, for training and for unseen prompts."""
    countries = _ranked(c for c in pictures.countries() if c.isalpha() and len(c) <= LONGEST_NAME)
    seen, unseen = countries[:COUNTRIES], countries[COUNTRIES : 2 * COUNTRIES]
    return _kinds(seen, SUBJECTS[0]), _kinds(unseen, SUBJECTS[1])


def _kinds(countries: Iterable[str], subjects: Iterable[str]) -> dict[str, list[Entity]]:
    of = {(p.kind, p.subject): p for p in pictures.load()}
    return {
        "flag": [Entity(f"the flag of {c}", f"flag of {c}", of["flag", c]) for c in countries],
        "map": [Entity(f"the map of {c}", f"map of {c}", of["map", c]) for c in countries],
        "photo": [Entity(f"{_article(s)} {s}", s, of["photo", s]) for s in subjects],
    }


def _ranked(names: Iterable[str]) -> list[str]:
    """By MD5: a fixed choice, whatever the order of the collection."""
    return sorted(names, key=lambda name: hashlib.md5(name.encode()).hexdigest())


def _article(noun: str) -> str:
    """Names of single things ("Eiffel Tower") take the definite article."""
    return "the" if noun[0].isupper() else "an" if noun[0] in "aeiou" else "a"


def _entity(unseen: bool, rng: Random) -> Entity:
    kinds = _entities()[unseen]
    return rng.choice(kinds[rng.choices(list(_KINDS), weights=list(_KINDS.values()))[0]])


def _scene(unseen: bool, rng: Random) -> dict[str, str]:
    shape = rng.choice([s for s in SHAPES if (s in UNSEEN_SHAPES) == unseen])
    colour, place, ground = rng.choice(COLOURS), rng.choice(PLACES), rng.choice(GROUNDS)
    thing = f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"
    where, around = _PLACE.get(place, f"in the {place}"), _GROUND.get(ground, f"over a {ground}")
    return {"scene": f"{thing} {where} {around}", "shape": thing}


def _data(unseen: bool, rng: Random) -> dict[str, str]:
    title = rng.choice(list(ITEMS))
    labels = rng.sample(ITEMS[title][unseen], rng.choice((2, 2, 2, 3)))
    values = [str(v) for v in rng.sample(range(2, 10), len(labels))]
    return {
        "data": _listed([f"{value} {label}" for value, label in zip(values, labels, strict=True)]),
        "counted": _listed(labels),
        "labels": ",".join(labels),
        "values": ",".join(values),
        "title": title,
    }


def _listed(things: list[str]) -> str:
    return f"{', '.join(things[:-1])} and {things[-1]}"


#: Slot of a phrasing -> the values that documents need of it.
_VALUES = {
    "real": ("real", "query"),
    "scene": ("scene", "shape"),
    "data": ("data", "counted", "labels", "values", "title"),
    "change": ("change", "changed"),
    "changed": ("change", "changed"),
}


def _used(phrasing: str, slots: dict[str, str]) -> dict[str, str]:
    named = (slot for slot in _VALUES if f"{{{slot}}}" in phrasing)
    return {value: slots[value] for slot in named for value in _VALUES[slot]}
