"""The literal inside a tag: a dict in Python's or JSON's notation, read as it was meant.

The strict reader knows the grammar of both notations at once: either quote, triple quotes, `r''`, strings joined over
lines, raw newlines, trailing commas, `true` and `True`. Where it fails, the loose reader knows which keys the
dict must have, and ends a value at the first quote that is followed by what has to come next: so quotes inside a value
need no escape. Both take linear time, and all offsets count in the whole text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from agent.escapes import unescape

Scalar = str | int | float | bool | None
Value = Scalar | list[int]
#: The keys that a dict must have; None where a plain value belongs, a shape where a dict does.
Shape = Mapping[str, "Shape | None"]


class LiteralError(Exception):
    """The literal cannot be read: `reason` says why, `position` is the character offset in the whole text."""

    def __init__(self, reason: str, position: int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.position = position


@dataclass(frozen=True, slots=True)
class Field:
    """A value, and the offsets of its key and of itself."""

    value: Value | dict[str, Field]
    key_at: int
    at: int


_SPACE = r"\s*+"  # possessive, or a long run of spaces would take quadratic time
_BLANK = re.compile(_SPACE)
_OPEN = re.compile(_SPACE + r"\{")
_CLOSE = rf"{_SPACE}(?:,{_SPACE})?\}}"
_MARK = re.compile("'''|\"\"\"|'|\"")
_STRING = re.compile(
    r"""(?P<raw>[rR]?)(?:'''(?P<a>(?:[^'\\]|\\.|'(?!''))*)'''|\"""(?P<b>(?:[^"\\]|\\.|"(?!""))*)\""""
    r"""|'(?P<c>[^'\\]*(?:\\.[^'\\]*)*)'|"(?P<d>[^"\\]*(?:\\.[^"\\]*)*)")""",
    re.DOTALL,
)
_LIST = re.compile(rf"\[{_SPACE}(?:[+-]?[0-9]{{1,18}}{_SPACE}(?:,{_SPACE}|(?=\])))*+\]")
_NUMBER = re.compile(r"[+-]?[0-9]{1,18}(\.[0-9]{1,18})?([eE][+-]?[0-9]{1,3})?(?![\w.])")
_WORD = re.compile(r"(?:[tT]rue|[fF]alse|null|None)(?!\w)")
_WORDS: dict[str, Scalar] = {"true": True, "false": False, "null": None, "none": None}


def clip(name: str) -> str:
    """A name out of the text, short and quoted, for a reason."""
    return repr(name if len(name) <= 40 else name[:40] + "...")


def read_strict(text: str, start: int, end: int) -> tuple[dict[str, Field], int]:
    """The dict that starts at `text[start:end]`, white space allowed before it, and the offset after it.

    Raises:
        LiteralError: it is not a dict of plain values and of dicts of those, or a key is given twice.
    """
    reader = _Strict(text, start, end)
    return reader.fields(depth=0), reader.pos


class _Strict:
    """A cursor over `text[pos:end]`."""

    def __init__(self, text: str, pos: int, end: int) -> None:
        self.text, self.pos, self.end = text, pos, end

    def fail(self, reason: str) -> NoReturn:
        raise LiteralError(reason, self.pos)

    def space(self) -> int:
        if m := _BLANK.match(self.text, self.pos, self.end):
            self.pos = m.end()
        return self.pos

    def take(self, mark: str) -> bool:
        found = self.text.startswith(mark, self.space(), self.end)
        self.pos += len(mark) * found
        return found

    def fields(self, depth: int) -> dict[str, Field]:
        if not self.take("{"):
            self.fail("a '{' is missing here")
        out: dict[str, Field] = {}
        while not self.take("}"):
            key_at = self.pos
            if (key := self.string()) is None:
                self.fail("a quoted key or a '}' is missing here")
            if key in out:
                raise LiteralError(f"the key {clip(key)} is given twice", key_at)
            if not self.take(":"):
                self.fail(f"a ':' is missing after the key {clip(key)}")
            at = self.space()
            out[key] = Field(self.value(key, depth), key_at, at)
            if not self.take(",") and not self.text.startswith("}", self.pos, self.end):
                self.fail(f"a ',' or a '}}' is missing after the value of {clip(key)}")
        return out

    def value(self, key: str, depth: int) -> Value | dict[str, Field]:
        if self.text.startswith("{", self.pos, self.end) and depth == 0:
            return self.fields(depth + 1)
        if (string := self.string()) is not None:
            return string
        if (plain := _plain(self.text, self.pos, self.end)) is None:
            self.fail(f"{clip(key)} has no value that can be read: it must be quoted text or a number")
        self.pos = plain[1]
        return plain[0]

    def string(self) -> str | None:
        """The string here, with those that follow over white space; None leaves the cursor where it is."""
        parts: list[str] = []
        at = self.pos
        # On one line, 'a.split(' ')' is a string with quotes in it, which is the loose reader's business.
        while (not parts or "\n" in self.text[self.pos : at]) and (m := _STRING.match(self.text, at, self.end)):
            inside = next(filter(None, m.group("a", "b", "c", "d")), "")
            parts.append(inside if m["raw"] else unescape(inside))
            self.pos = m.end()
            if blank := _BLANK.match(self.text, self.pos, self.end):
                at = blank.end()
        return "".join(parts) if parts else None


def _plain(text: str, pos: int, end: int) -> tuple[Value, int] | None:
    """The number, word or list of integers at `pos`, and the offset after it."""
    if m := _NUMBER.match(text, pos, end):
        return float(m[0]) if m[1] or m[2] else int(m[0]), m.end()
    if m := _WORD.match(text, pos, end):
        return _WORDS[m[0].lower()], m.end()
    if m := _LIST.match(text, pos, end):
        return [int(number) for number in m[0][1:-1].split(",") if number.strip()], m.end()
    return None


def read_loose(text: str, start: int, end: int, shape: Shape) -> dict[str, Field]:
    """The dict that fills `text[start:end]` and has exactly the keys of `shape`, in any order.

    Raises:
        LiteralError: a key, a brace or the end of a value is not found.
    """
    return _loose(text, start, end, shape, _SPACE + r"\Z")[0]


def _loose(text: str, pos: int, end: int, shape: Shape, after: str) -> tuple[dict[str, Field], int]:
    """One dict, which must be followed by the pattern `after`, and the offset after its closing brace."""
    pos = _expect(_OPEN, text, pos, end, "a '{' is missing here").end()
    left = dict(shape)
    out: dict[str, Field] = {}
    while left:
        start_of_key = re.compile(rf"{_SPACE}(?:,{_SPACE})?({_key(left)}){_SPACE}")
        key = _expect(start_of_key, text, pos, end, f"the key {' or '.join(map(clip, left))} is missing here")
        name = key[2]
        inner = left.pop(name)
        follows = rf"{_SPACE},{_SPACE}{_key(left)}" if left else _CLOSE + after
        value: Value | dict[str, Field]
        if inner is None:
            value, pos = _loose_scalar(text, key.end(), end, follows, name)
        else:
            value, pos = _loose(text, key.end(), end, inner, follows)
        out[name] = Field(value, key.start(1), key.end())
    return out, _expect(re.compile(_CLOSE), text, pos, end, "a '}' is missing here").end()


def _key(names: Iterable[str]) -> str:
    return rf"['\"]({'|'.join(map(re.escape, names))})['\"]{_SPACE}:"


def _loose_scalar(text: str, at: int, end: int, follows: str, name: str) -> tuple[Value, int]:
    if mark := _MARK.match(text, at, end):
        close = re.compile(rf"{mark[0]}(?={follows})").search(text, mark.end(), end)
        if close is None:
            raise LiteralError(f"the value of {clip(name)} does not end where it should", at)
        return unescape(text[mark.end() : close.start()]), close.end()
    plain = _plain(text, at, end)
    if plain is None or not re.compile(follows).match(text, plain[1], end):
        raise LiteralError(f"{clip(name)} has no value that can be read: it must be quoted text or a number", at)
    return plain


def _expect(pattern: re.Pattern[str], text: str, pos: int, end: int, reason: str) -> re.Match[str]:
    if (m := pattern.match(text, pos, end)) is None:
        raise LiteralError(reason, pos)
    return m
