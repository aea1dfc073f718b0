"""A finished document as files: one HTML page, Markdown beside a folder of pictures, or JSON with all that is known."""

from __future__ import annotations

import base64
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agent.answer import Document
from agent.document import provenance_text, render_html, render_page, shown, strip_marks
from agent.render import CallOutcome
from replay.record import Blob

MAX_TITLE = 120  # characters of the question that head the page
EXTENSIONS = {"image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp", "image/gif": ".gif"}


def to_page(document: Document) -> str:
    """A page that fetches nothing and runs nothing. The question heads it, unless the document has a heading itself."""
    section = render_html(document.text, document.calls, document.blobs, document.given)
    return render_page([section], title_of(document), heading=not document.text.lstrip().startswith("# "))


def title_of(document: Document) -> str:
    return textwrap.shorten(document.question, MAX_TITLE, placeholder=" ...")


def to_markdown(document: Document, link: Callable[[Blob], str]) -> str:
    """Markdown. `link` gives the address of a picture, and is called for each that is shown."""
    pieces: list[str] = []
    for i, blob in enumerate(document.given, 1):
        pieces += [_picture(blob, f"Picture {i} given with the question", link), "\n\n"]
    done = 0
    for call in document.calls:
        before = strip_marks(document.text[done : call.start]).rstrip()
        pieces += [before, "\n\n", figure(call, document.blobs, link), "\n\n"]
        done = call.end
        while document.text[done : done + 1] == "\n":
            done += 1
    pieces.append(strip_marks(document.text[done:]))
    return "".join(pieces).strip() + "\n"


def figure(call: CallOutcome, blobs: Mapping[str, Blob], link: Callable[[Blob], str]) -> str:
    """A tag's pictures and caption in Markdown, or a note why there is no picture."""
    made = [blobs[sha] for sha in call.images if sha in blobs]
    pictures = [_picture(blob, call.description, link) for blob in made if shown(blob)]
    what = _escaped(call.description)
    if not pictures:
        why = _escaped(" - ".join(filter(None, [call.source, call.reason or "it made none that can be shown"])))
        return f"> No picture{': ' * bool(what)}{what} ({why})"
    return "\n\n".join([*pictures, f"*{what}* {_escaped(provenance_text(call))}".strip()])


def file_name(blob: Blob) -> str:
    """A file name for a picture, by its content."""
    return blob.sha256[:16] + EXTENSIONS.get(blob.mime, "")


def to_json(document: Document) -> dict[str, Any]:
    """All of it, as JSON holds it; pictures as data URLs by SHA-256."""
    given = {blob.sha256: blob for blob in document.given}
    return {
        "question": document.question,
        "text": document.text,
        "calls": [outcome_json(call) for call in document.calls],
        "finished": document.finished,
        "scaling": [vars(stage) for stage in document.scaling],
        "given": list(given),
        "images": {sha: data_url(blob) for sha, blob in {**given, **document.blobs}.items()},
    }


def outcome_json(call: CallOutcome) -> dict[str, Any]:
    """One call, as JSON holds it."""
    return {name: _plain(value) for name, value in vars(call).items()}


def data_url(blob: Blob) -> str:
    return f"data:{blob.mime};base64,{base64.b64encode(blob.data).decode('ascii')}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, str | int | float | bool | None):
        return value
    return [_plain(v) for v in value] if isinstance(value, Sequence) else str(value)


def _picture(blob: Blob, alt: str, link: Callable[[Blob], str]) -> str:
    return f"![{_escaped(alt)}]({link(blob)})" if shown(blob) else ""


def _escaped(text: str) -> str:
    """One line in which no character means anything to Markdown or HTML."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>#|!~&$" else c for c in " ".join(text.split()))
