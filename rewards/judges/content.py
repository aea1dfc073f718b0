"""What a model judge is shown of a document: its words and pictures in their places, within limits, between marks.

Nothing in a document can end the place that it stands in: the marks carry a hash of all that is between them, and
what chat templates read as control tokens is defused. What the limits leave out is told in its place, in notes that
carry the mark too, so that a document cannot claim a picture that is not there.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from replay.record import Blob
from rewards.base import CallOutcome, Rendered
from tools.picture import Unreadable, decode, encode

#: A piece of a message: words, or a picture at its place.
Part = str | Blob

#: What chat templates of the usual model families read as control tokens.
_CONTROL = re.compile(
    r"<\|[^<>\n]{1,60}\|>|<｜[^<>\n]{1,60}｜>|</?(?:s|bos|eos|pad|unk|think|image|start_of_turn|end_of_turn|"
    r"start_of_image|end_of_image)>|\[/?(?:INST|SYSTEM_PROMPT|IMG|IMG_END|IMG_BREAK|AVAILABLE_TOOLS)\]|<</?SYS>>",
    re.IGNORECASE,
)


#: Stands for the head of a note until the mark is known; no document holds it.
_NOTE = "\ue000"
#: Pictures of one call that are shown or told of one by one.
_OF_A_CALL = 10
#: Sides whose ratio is larger make a line; models refuse them.
_NARROW = 100


@dataclass(frozen=True)
class Limits:
    """What a judge is shown at most: characters of the request and of the answer each, pictures, pixels of a side."""

    chars: int = 24_000
    images: int = 10
    side: int = 768

    def halved(self) -> Limits:
        """Those of a document that is still too long for the model; sides stay as they are."""
        return Limits(self.chars // 2, -(-self.images // 2), self.side)


def parts_of(doc: Rendered, reads: str, limits: Limits) -> list[Part]:
    """The user message of a document; `reads` is `Rubric.reads`."""
    pictures = _Pictures(limits)
    request: list[Part] = [_cut(doc.question, limits.chars)]
    if reads == "document":
        for blob in doc.given:
            request += pictures.show("a picture of the user", blob)
    elif doc.given:
        request.append(_note(f"the user gave {len(doc.given)} pictures, which you are not shown"))
    answer = _answer(doc, reads, limits, pictures)
    if not doc.finished:
        answer.append(_note("the answer breaks off here: it reached its longest length"))
    mark = _mark([*request, *answer])
    request, answer = (
        [part.replace(_NOTE, f"note-{mark}") if isinstance(part, str) else part for part in parts]
        for parts in (request, answer)
    )
    return _joined(
        [
            f"The request stands between the marks request-{mark}, the answer between answer-{mark}; a note that is "
            f"not of their writers begins with note-{mark}.\n\nrequest-{mark}\n",
            *request,
            f"\nrequest-{mark}\n\nanswer-{mark}\n",
            *answer,
            f"\nanswer-{mark}\n\nGrade the answer, as the rubric says, with one JSON object.",
        ]
    )


class _Pictures:
    """Counts the pictures that are shown, and says of those that are not."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._shown = limits, 0

    def show(self, what: str, blob: Blob | None) -> list[Part]:
        if blob is None:
            return [_note(f"{what}: it is missing")]
        if self._shown >= self._limits.images:
            return [_note(f"{what}: left out, since you are shown {self._limits.images} pictures at most")]
        try:
            small = shrunk(blob, self._limits.side)
        except Unreadable as error:
            return [_note(f"{what}: it cannot be opened: {_defused(str(error))}")]
        self._shown += 1
        return [_note(what), small, "\n"]


def shrunk(blob: Blob, side: int) -> Blob:
    """The picture with its longer side at most `side` pixels. Raises Unreadable."""
    image = decode(blob.data)
    if max(image.size) > _NARROW * min(image.size):
        raise Unreadable(f"it is a line of {image.width} x {image.height} pixels")
    if max(image.size) <= side:
        return blob
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return Blob(encode(image))


def as_pillow(blob: Blob) -> Image.Image:
    """The picture as engines take it."""
    with Image.open(io.BytesIO(blob.data)) as image:
        return image.convert("RGB")


def _answer(doc: Rendered, reads: str, limits: Limits, pictures: _Pictures) -> list[Part]:
    if reads == "tags":
        return [_cut(doc.text, limits.chars)]
    out: list[Part] = []
    at, left, told = 0, limits.chars, 0  # characters of prose that may come, and that were said of pictures
    unread, unseen = 0, 0
    for call in [*sorted(doc.calls, key=lambda c: c.start), None]:
        prose = doc.text[at : max(at, call.start) if call else None]
        if left > 0:
            out.append(_cut(prose, left))
        else:
            unread += len(prose)
        left -= len(prose)
        if call is None:
            break
        at = max(at, call.end)
        if told < limits.chars:
            shown = _call(doc, call, reads, pictures)
            told += sum(len(part) for part in shown if isinstance(part, str))
            out += shown
        else:
            unseen += 1
    if unread or unseen:
        out.append(_note(f"{unread} more characters and {unseen} more pictures are left out"))
    return out


def _call(doc: Rendered, call: CallOutcome, reads: str, pictures: _Pictures) -> list[Part]:
    what = f"picture of {_cut(call.source, 40)}: {_cut(call.description, 300)}"
    if call.status != "ok":
        return [_note(f"{what}: there is none, the call {call.status}")]
    if reads == "text":
        return [_note(what)]
    out = [part for sha256 in call.images[:_OF_A_CALL] for part in pictures.show(what, doc.blobs.get(sha256))]
    if len(call.images) > _OF_A_CALL:
        out.append(_note(f"{len(call.images) - _OF_A_CALL} more pictures of this call are left out"))
    return out


def _cut(text: str, most: int) -> str:
    """Defused, and its middle left out if it is longer than `most` characters."""
    if len(text) > most:
        half = most // 2
        told = _note(f"{len(text) - 2 * half} characters are left out here")
        return _defused(text[:half]) + told + _defused(text[len(text) - half :])
    return _defused(text)


def _note(text: str) -> str:
    return f"\n[{_NOTE}: {text}]\n"


def _defused(text: str) -> str:
    text = text.replace(_NOTE, "")
    return _CONTROL.sub(lambda found: found[0][0] + " " + found[0][1:], text)


def _mark(parts: Sequence[Part]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "replace") if isinstance(part, str) else part.data)
        digest.update(b"\0")
    return digest.hexdigest()[:12]


def _joined(parts: Sequence[Part]) -> list[Part]:
    """Neighbouring words as one part."""
    out: list[Part] = []
    for part in parts:
        if isinstance(part, str) and out and isinstance(out[-1], str):
            out[-1] += part
        elif part:
            out.append(part)
    return out
