"""The tag protocol: `<imgen>{'source': ..., 'description': ..., 'params': {...}}</imgen>` in a document.

`parse` cuts any text into segments that cover it without a gap. A tag runs from `<imgen>` to the first `</imgen>`, and
`<imgen>` always opens a new one, so one broken tag never spoils the next. A malformed tag is one `Invalid` with a
reason and a position; the rest of the document goes on. A `</imgen>` that closes nothing is text.

Every `Call` is one picture slot, whether or not its tool succeeds later: the user's pictures are counted first, then
the document's own in order, from 0. An `Invalid` takes no slot.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from agent.escapes import Style, quote
from agent.literal import Field, LiteralError, clip, read_loose, read_strict
from agent.spec import PUBLISHED, ToolSpec

OPEN, CLOSE = "<imgen>", "</imgen>"
KEYS = ("source", "description", "params")

_MARK = re.compile(r"</?imgen>")
_SOURCE = re.compile(r"""['"]source['"]\s*+:\s*+(?:'([^'\\<>{}]{1,64})'|"([^"\\<>{}]{1,64})")""")
_INTEGER = re.compile(r"\s*[+-]?[0-9]{1,18}\s*")


@dataclass(frozen=True, slots=True)
class Text:
    """Text between tags; never empty."""

    text: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Call:
    """A valid tag at `[start, end)`; `params` are exactly those of its tool's spec."""

    source: str
    description: str
    params: Mapping[str, Any]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Invalid:
    """A malformed tag at `[start, end)`.

    Attributes:
        reason: what is wrong with it, in a sentence.
        position: character offset in the whole text where the problem is.
        source: the tool it names, "" where that cannot be read.
    """

    reason: str
    start: int
    end: int
    position: int
    source: str


Segment = Text | Call | Invalid


def parse(text: str, specs: Mapping[str, ToolSpec] = PUBLISHED) -> list[Segment]:
    """The segments of `text` in order, without a gap; none for an empty text. Reads any string, in linear time."""
    out: list[Segment] = []
    done = 0
    marks = [*_MARK.finditer(text), None]
    for mark, following in pairwise(marks):
        if mark is None or mark[0] == CLOSE:
            continue
        if done < mark.start():
            out.append(Text(text[done : mark.start()], done, mark.start()))
        if following is not None and following[0] == CLOSE:
            tag = _closed(text, mark.end(), following.start(), specs)
        else:
            tag = _unclosed(text, mark.end(), following.start() if following else len(text))
        out.append(tag)
        done = tag.end
    if done < len(text):
        out.append(Text(text[done:], done, len(text)))
    return out


def _closed(text: str, start: int, end: int, specs: Mapping[str, ToolSpec]) -> Call | Invalid:
    """The tag whose literal is `text[start:end]`."""
    source = _source(text, start, end)
    whole = (start - len(OPEN), end + len(CLOSE))
    try:
        return _call(_fields(text, start, end, specs.get(source)), start, whole, specs)
    except LiteralError as e:
        return Invalid(e.reason, *whole, e.position, source)


def _unclosed(text: str, start: int, end: int) -> Invalid:
    """The tag that nothing closes before `end`: the next tag or the end of the text.

    If its literal is whole, the tag ends there, so that the reader keeps the text after it.
    """
    cut = end == len(text)
    reason = "the tag is cut off: the document ends inside it" if cut else "the tag is not closed before the next one"
    position = end
    try:
        _, literal_end = read_strict(text, start, end)
    except LiteralError:
        literal_end = end
    if text[literal_end:end].strip() and not CLOSE.startswith(text[literal_end:end].strip()):
        reason, end, position = f"{CLOSE} is missing after the tag", literal_end, literal_end
    return Invalid(reason, start - len(OPEN), end, position, _source(text, start, end))


def _source(text: str, start: int, end: int) -> str:
    m = _SOURCE.search(text, start, end)
    return (m[1] or m[2]) if m else ""


def _fields(text: str, start: int, end: int, spec: ToolSpec | None) -> dict[str, Field]:
    """The dict that fills `text[start:end]`, by the strict reader, or else by the loose one."""
    if not text[start:end].strip():
        raise LiteralError("the tag is empty", start)
    try:
        fields, stop = read_strict(text, start, end)
        if text[stop:end].strip():
            raise LiteralError("there is text after the closing brace", stop)
        return fields
    except LiteralError as strict:
        if spec is None:
            raise
        try:
            shape = {"source": None, "description": None, "params": dict.fromkeys(spec.params)}
            return read_loose(text, start, end, shape)
        except LiteralError as loose:
            raise max(loose, strict, key=lambda e: e.position) from None  # the one that came further knows more


def _call(fields: dict[str, Field], at: int, whole: tuple[int, int], specs: Mapping[str, ToolSpec]) -> Call:
    """The valid call that the literal at offset `at` stands for.

    Raises:
        LiteralError: keys, tool, parameters or types are wrong.
    """
    _exact_keys("the tag", fields, KEYS, at)
    source, description, params = (fields[k] for k in KEYS)
    if not isinstance(source.value, str):
        raise LiteralError("'source' must be text", source.at)
    if (spec := specs.get(source.value)) is None:
        raise LiteralError(f"unknown source {clip(source.value)}: known are {', '.join(specs)}", source.at)
    caption = _text("description", description)
    if not isinstance(params.value, dict):
        raise LiteralError("'params' must be a dict", params.at)
    _exact_keys(f"'params' of {spec.name}", params.value, spec.params, params.at)
    values = {name: _typed(name, params.value[name], kind) for name, kind in spec.params.items()}
    return Call(spec.name, caption, values, *whole)


def _exact_keys(what: str, fields: Mapping[str, Field], keys: Sequence[str] | Mapping[str, type], at: int) -> None:
    for key, field in fields.items():
        if key not in keys:
            raise LiteralError(f"{what} must not have {clip(key)}: its keys are {', '.join(keys)}", field.key_at)
    for key in keys:
        if key not in fields:
            raise LiteralError(f"{what} lacks {clip(key)}", at)


def _typed(name: str, field: Field, kind: type) -> str | int | list[int]:
    if kind == list[int]:
        return _integers(name, field)
    return _integer(name, field) if kind is int else _text(name, field)


def _text(name: str, field: Field) -> str:
    if not isinstance(field.value, str):
        raise LiteralError(f"{clip(name)} must be text", field.at)
    if not field.value.strip():
        raise LiteralError(f"{clip(name)} is empty", field.at)
    return field.value


def _integer(name: str, field: Field) -> int:
    """An integer; `1.0` and `'1'` are taken for 1, `true` is not."""
    value = field.value
    if isinstance(value, str) and _INTEGER.fullmatch(value):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise LiteralError(f"{clip(name)} must be an integer", field.at)
    return int(value)


def _integers(name: str, field: Field) -> list[int]:
    """One integer or a list of them, as a list that is not empty."""
    if not isinstance(field.value, list):
        return [_integer(name, field)]
    if not field.value:
        raise LiteralError(f"{clip(name)} is empty", field.at)
    return field.value


def check_references(
    segments: Sequence[Segment], given: int, specs: Mapping[str, ToolSpec] = PUBLISHED
) -> list[Segment]:
    """The same segments, calls that do not point backwards made `Invalid`.

    Args:
        segments: of `parse` with the same specs.
        given: how many pictures the user gave.
    """
    out: list[Segment] = []
    slots = given
    for segment in segments:
        if isinstance(segment, Call):
            reason = _bad_reference(segment, slots, specs[segment.source])
            if reason:
                segment = Invalid(reason, segment.start, segment.end, segment.start, segment.source)
            else:
                slots += 1
        out.append(segment)
    return out


def _bad_reference(call: Call, slots: int, spec: ToolSpec) -> str:
    for name in spec.image_params:
        value = call.params[name]
        indices = value if isinstance(value, list) else [value]
        if wrong := [i for i in indices if not 0 <= i < slots]:
            return f"{name} is {wrong[0]}, but {slots} pictures stand before this tag (they are counted from 0)"
    return ""


def format_call(
    source: str, description: str, params: Mapping[str, str | int | list[int]], style: Style = "python"
) -> str:
    """A tag that `parse` reads back as exactly this, and whose literal `ast.literal_eval` or `json.loads` reads so too.

    Raises:
        ValueError: a parameter is neither text nor an integer of at most 18 digits nor a list of such.
    """

    def value(name: str, v: str | int | list[int]) -> str:
        if isinstance(v, str):
            return quote(v, style)
        if isinstance(v, list) and v and not any(isinstance(i, str | list) for i in v):
            return f"[{', '.join(value(name, i) for i in v)}]"
        if isinstance(v, bool) or not isinstance(v, int) or abs(v) >= 10**18:
            raise ValueError(f"parameter {name!r} must be text or an integer of at most 18 digits")
        return str(v)

    inner = ", ".join(f"{quote(name, style)}: {value(name, v)}" for name, v in params.items())
    tops = zip(KEYS, (quote(source, style), quote(description, style), f"{{{inner}}}"), strict=True)
    return OPEN + "{" + ", ".join(f"{quote(k, style)}: {v}" for k, v in tops) + "}" + CLOSE
