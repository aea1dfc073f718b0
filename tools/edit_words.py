"""The words of the edit tool's instructions: what an operation is, and the readers that take its arguments.

A reader gets a place where its operation was found (tools/edit_grammar.py says how) and reads sizes, amounts,
directions, colours and texts from the clause around it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from PIL import ImageColor

from tools.base import CallFailed
from tools.edit_ops import Colour


@dataclass(frozen=True)
class Operation:
    """One operation: its name in `tools.edit_ops.OPERATIONS` and its arguments, JSON-ready."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


class Found(NamedTuple):
    """A place where an operation was found.

    Attributes:
        match: of its pattern.
        clause: all of the clause that the match is in.
        before: what is before the match in the clause.
        after: what is after it.
        quoted: the quoted text in the match, "" if there is none.
    """

    match: re.Match[str]
    clause: str
    before: str
    after: str
    quoted: str


Reader = Callable[[Found], Operation | None]

MORE = r"(?:more|high(?:er)?|increas\w*|rais\w*|boost\w*|stronger|enhanc\w*|add|greater|improv\w*|extra|up)"
LESS = r"(?:less|low(?:er)?\w*|decreas\w*|reduc\w*|weak\w*|soft\w*|down|fewer|cut|drop|flat\w*)"
_DIRECTION = re.compile(rf"\b(?:(?P<more>{MORE})|{LESS})\b", re.I)
_SLIGHTLY = re.compile(r"\b(?:slight\w*|a\s+(?:little|bit|touch|tad)|somewhat|subtl\w+|gent\w+|light\s+blur)\b", re.I)
_STRONGLY = re.compile(r"\b(?:much|a\s+lot|very|strong\w*|heav\w+|significant\w*|extreme\w*|dramatic\w*|far)\b", re.I)
_PERCENT = re.compile(r"(to\s+)?(\d+(?:\.\d+)?)\s*(?:%|percent\b|per\s+cent\b)", re.I)
_PIXELS = re.compile(r"(\d+)[\s-]*(?:px|pixels?)\b", re.I)
_SIZE = re.compile(r"(\d+)\s*(?:px|pixels?)?\s*(?:x|×|by)\s*(\d+)", re.I)
PART = re.compile(
    r"\b(left|right|top|bottom|upper|lower)(?:[\s-]?hand)?(?:[\s-]+(left|right))?"
    r"[\s-]+(half|third|quarter|corner|side|part)",
    re.I,
)
_ISH = {"reddish": "red", "bluish": "blue", "greenish": "green", "yellowish": "yellow", "golden": "gold"}
_PREFIX = re.compile(r"^(light|dark|pale|deep|medium|hot|sky|royal|forest|sea|spring|steel|slate)(?=[a-z]{3})")
_NAMES = sorted((_PREFIX.sub(r"\1[\\s-]?", name) for name in [*ImageColor.colormap, *_ISH]), key=len, reverse=True)
COLOUR = rf"(?:#[0-9a-f]{{6}}|(?:(?:light|dark|bright|pure|deep|soft|warm)[\s-]+)?(?:{'|'.join(_NAMES)}))\b"
IT = r"(?:\s+(?:it|this|that|everything|(?:the|this|my)\s+(?:\w+\s+)?(?:image|picture|photo(?:graph)?|chart|plot)))"


def _amount(clause: str) -> float:
    if percent := _PERCENT.search(clause):
        return min(float(percent[2]) / 100, 10.0)
    if re.search(r"\b(?:twice|double)\b", clause, re.I):
        return 1.0
    return 0.15 if _SLIGHTLY.search(clause) else 0.6 if _STRONGLY.search(clause) else 0.4


def _pixels(clause: str) -> int | None:
    return int(found[1][:7]) if (found := _PIXELS.search(clause)) else None


def _given(**arguments: Any) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}


def colour(text: str) -> Colour:
    """The colour that a match of `COLOUR` names: CSS names with or without a space, `#rrggbb`, light and dark ones."""
    words = [_ISH.get(word, word) for word in re.split(r"[\s-]+", text.lower())]
    for name in ("".join(words), words[-1]):
        if name in ImageColor.colormap or name.startswith("#"):
            break
    r, g, b = ImageColor.getrgb(name)[:3]
    if name == "".join(words) or words[0] not in ("light", "dark"):
        return r, g, b
    target = 255 if words[0] == "light" else 0
    return (r + target) // 2, (g + target) // 2, (b + target) // 2


def simple(name: str) -> Reader:
    return lambda found: Operation(name)


def level(name: str, sign: int) -> Reader:
    """Less contrast, brightness down, more vivid: `sign` is that of the word alone; more or less around it turns it."""
    return lambda found: Operation(name, {"factor": _factor(found.clause, _turned(found, sign))})


def _turned(found: Found, sign: int) -> int:
    words = found.before + found.match[0]
    if not re.sub(r"\b(?:the|its|also)\b|\s", "", found.before):  # "reduce brightness by 10% and contrast by 20%"
        words = found.match.string[: found.match.end()]
    directions = list(_DIRECTION.finditer(words)) or list(_DIRECTION.finditer(found.after))
    return -sign if directions and not directions[-1]["more"] else sign


def plain_level(name: str, sign: int) -> Reader:
    """Brighter, darken, muted: words that say in which direction."""
    return lambda found: Operation(name, {"factor": _factor(found.clause, sign)})


def _factor(clause: str, sign: int) -> float:
    if (percent := _PERCENT.search(clause)) and percent[1]:  # "to 150%"
        return min(float(percent[2]) / 100, 10.0)
    return round(max(0.0, 1 + sign * _amount(clause)), 4)


def greyscale(found: Found) -> Operation:
    percent = _PERCENT.search(found.clause)
    if found.match[0].lower().startswith("desat") and (percent or _SLIGHTLY.search(found.clause)):
        return Operation("saturation", {"factor": round(max(0.0, 1 - _amount(found.clause)), 4)})
    return Operation("greyscale")


def blur(found: Found) -> Operation:
    if (radius := _pixels(found.clause)) is not None:
        return Operation("blur", {"radius": max(1, radius)})
    return Operation("blur", {"strength": _amount(found.clause)})


def sharpen(found: Found) -> Operation:
    if found.match[0].lower() == "sharpness":
        return Operation("sharpen" if _turned(found, 1) > 0 else "blur", {"strength": _amount(found.clause)})
    return Operation("sharpen", {"strength": _amount(found.clause)})


def tint(found: Found) -> Operation | None:
    name = next(g for g in found.match.groups() if g)
    r, g, b = colour(name)
    if r == g == b:
        return Operation("greyscale") if re.search("gr[ae]y", name, re.I) else None
    return Operation("tint", {"colour": (r, g, b)})


def posterize(found: Found) -> Operation:
    levels = re.search(r"(\d+)\s*(?:levels?|tones?|shades?)", found.clause, re.I)
    return Operation("posterize", {"bits": max(1, int(levels[1][:3]).bit_length() - 1) if levels else 2})


def rotate(found: Found) -> Operation:
    words = found.clause.lower()
    number = re.search(r"(-?\d+(?:\.\d+)?)(?!\s*(?:%|px|pixel))", words)
    degrees = 180.0 if re.search(r"upside|half|around|on its head", words) else 90.0
    if number:
        degrees = float(number[1][:9])
    if re.search(r"\bleft\b|(?:counter|anti)[\s-]?clock", words):
        degrees = -degrees
    return Operation("rotate", {"clockwise": round(degrees % 360, 2)})


def flip(found: Found) -> Operation:
    vertical = bool(re.search(r"vertical|top|bottom|upside", found.clause, re.I))
    horizontal = bool(re.search(r"horizontal|left|right|sideways", found.clause, re.I))
    return Operation("flip", {"axis": "both" if vertical and horizontal else "vertical" if vertical else "horizontal"})


def crop(found: Found) -> Operation:
    words = found.clause.lower()
    away = bool(re.search(r"\b(?:off|out|away|remov\w*)\b", words))
    if size := _SIZE.search(words):
        return Operation("crop_size", {"width": int(size[1][:7]), "height": int(size[2][:7])})
    if "square" in words:
        return Operation("crop_ratio", {"ratio": 1.0})
    if ratio := re.search(r"(?<!\d)([1-9]\d{0,3})\s*:\s*([1-9]\d{0,3})(?!\d)", words):
        return Operation("crop_ratio", {"ratio": round(int(ratio[1]) / int(ratio[2]), 4)})
    if part := PART.search(words):
        return Operation("crop", {"box": _part(part[1], part[2], part[3], away)})
    if percent := _PERCENT.search(words):
        share = min(float(percent[2]) / 100, 0.99)
        side = re.search(r"\b(left|right|top|bottom)\b", words)
        if side:
            return Operation("crop", {"box": _side(side[1], share, away=True)})
        cut = (1 - share) / 2 if percent[1] or re.search("middle|cent|keep", words) else min(share, 0.49)
        return Operation("crop", {"box": tuple(round(v, 4) for v in (cut, cut, 1 - cut, 1 - cut))})
    return Operation("crop", {"box": (0.25, 0.25, 0.75, 0.75)})


def _part(first: str, second: str | None, what: str, away: bool) -> tuple[float, float, float, float]:
    if second:  # a corner
        top = _side(first, 0.5, away=False)
        left = _side(second, 0.5, away=False)
        return left[0], top[1], left[2], top[3]
    return _side(first, {"third": 1 / 3, "quarter": 0.25}.get(what, 0.5), away)


def _side(side: str, share: float, away: bool) -> tuple[float, float, float, float]:
    """The share of the picture at a side, or with `away` all but it: left, top, right, bottom."""
    start = side in ("left", "top", "upper")
    low, high = (0.0, share) if start else (1 - share, 1.0)
    if away:
        low, high = (high, 1.0) if start else (0.0, low)
    low, high = round(low, 4), round(high, 4)
    return (low, 0.0, high, 1.0) if side in ("left", "right") else (0.0, low, 1.0, high)


def resize(found: Found) -> Operation:
    words = found.clause.lower()
    if "thumb" in words:
        return Operation("thumbnail", {"side": _pixels(words) or 128})
    if (size := _SIZE.search(words)) and int(size[1][:7]) and int(size[2][:7]):
        return Operation("resize", {"width": int(size[1][:7]), "height": int(size[2][:7])})
    if pixels := _pixels(words):
        return Operation("resize", {"height" if re.search(r"high|tall|height", words) else "width": pixels})
    shrink = bool(re.search(r"small|shr[iu]nk|down|reduc|less", words))
    if percent := _PERCENT.search(words):
        change = float(percent[2]) / 100
        grow = bool(re.search(r"larg|bigg|\bup|increas", words))
        absolute = percent[1] or not (shrink or grow)
        factor = change if absolute else 1 + change if grow else 1 - change
    elif times := re.search(r"(\d+(?:\.\d+)?)\s*(?:times|x\b)|factor\s+(?:of\s+)?(\d+(?:\.\d+)?)", words):
        factor = float(times[1] or times[2])
        factor = 1 / factor if shrink and factor > 1 else factor
    elif share := re.search(r"\b(half|halve|third|quarter|double|twice|triple)\b", words):
        factor = {"half": 0.5, "halve": 0.5, "third": 1 / 3, "quarter": 0.25, "triple": 3.0}.get(share[1], 2.0)
    elif shrink or re.search(r"larg|bigg|\bup", words):
        factor = 0.5 if shrink else 2.0
    else:
        raise CallFailed("the instruction does not say to what size: say '200x100', '50%', 'smaller' or 'larger'")
    if not 0 < factor < 1000:
        raise CallFailed(f"a picture cannot be resized by {factor:g}")
    return Operation("resize", {"factor": round(factor, 4)})


def border(found: Found) -> Operation:
    named = re.search(COLOUR, found.match[0], re.I) or re.search(COLOUR, found.clause, re.I)
    arguments = _given(colour=colour(named[0]) if named else (0, 0, 0), width=_pixels(found.clause) or None)
    if share := next((s for word, s in (("thin", 0.015), ("thick", 0.1), ("wide", 0.1)) if word in found.clause), None):
        arguments["share"] = share
    return Operation("border", arguments)


def round_corners(found: Found) -> Operation:
    return Operation("round_corners", _given(radius=_pixels(found.clause) or None))


def pixelate(found: Found) -> Operation:
    return Operation("pixelate", _given(block=_pixels(found.clause) or None))


def caption(found: Found) -> Operation | None:
    text = found.quoted or found.match["plain"]
    rest = found.clause.replace(text, "")
    if not (text := " ".join(text.split())):
        return None
    top = bool(re.search(r"\b(?:top|above|upper)\b", rest, re.I))
    named = re.search(rf"\bin\s+({COLOUR})", rest, re.I)
    arguments = _given(text=text, at="top" if top else "bottom", colour=colour(named[1]) if named else None)
    return Operation("caption", arguments)
