"""A document for people: its text and its pictures as HTML that needs no network.

Nothing of the document is trusted: text is Markdown without HTML, everything else is escaped, and a picture that cannot
be decoded is not shown. Where there is no picture, a short note says so and why; a raw tag or a broken frame is never
seen.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from html import escape, unescape
from typing import Any, Protocol

from PIL import Image

from agent.markdown import clean, slot, to_html
from replay.record import Blob

#: Formats that every browser shows, by Pillow's name.
_MIMES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}
_MAX_PIXELS = 50_000_000  # decoding more to check it would take gigabytes
#: Marks that stand alone, and a tag cut off within its first mark.
_STRAY = re.compile(r"</?imgen>|</?imge?n?\Z")


class Outcome(Protocol):
    """One tag of a document and what became of it, as `rewards.base.CallOutcome` and `agent.render.CallOutcome`."""

    @property
    def source(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def params(self) -> Mapping[str, Any]: ...
    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def status(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def images(self) -> tuple[str, ...]: ...
    @property
    def provenance(self) -> Mapping[str, Any]: ...


def render_html(
    text: str,
    calls: Sequence[Outcome],
    blobs: Mapping[str, Blob],
    given: Sequence[Blob] = (),
    title: str = "",
    link: Callable[[Blob], str] | None = None,
) -> str:
    """One document as a self-contained `<section>`.

    Args:
        text: the raw answer, tags included.
        calls: every tag of `text` in order, malformed ones too.
        blobs: the pictures made, by SHA-256.
        given: the user's own pictures, shown before the text.
        link: the address of a picture, instead of a data URL.

    Raises:
        ValueError: the calls do not lie in the text one after another.
    """
    pieces: list[str] = []
    done = 0
    for i, call in enumerate(calls):
        if not done <= call.start <= call.end <= len(text):
            raise ValueError(f"call {i} spans {call.start} to {call.end}: expected a place in {done} to {len(text)}")
        pieces += [strip_marks(text[done : call.start]), slot(i)]
        done = call.end
    pieces.append(strip_marks(text[done:]))
    body = to_html("".join(pieces), [_outcome(c, blobs, link or _data_url) for c in calls])
    heading = f"<h2>{_safe(title)}</h2>\n" if title else ""
    return f'<section class="document" dir="auto">\n{heading}{_given(given, link or _data_url)}{body}</section>\n'


def strip_marks(text: str) -> str:
    """Text between tags without what is left of broken ones."""
    return clean(_STRAY.sub("", text))


def provenance_text(call: Outcome) -> str:
    """Where a call's pictures come from, in one line without markup."""
    return unescape(re.sub("<[^>]*>", "", _provenance(call).replace("</small><small>", "; ")))


def shown(blob: Blob) -> bool:
    """Whether the picture can be shown by a browser."""
    return _seen(blob.data) is not None


def _safe(text: object) -> str:
    return escape(clean(str(text)))


def _given(given: Sequence[Blob], link: Callable[[Blob], str]) -> str:
    shown = [_img(b, link, f"Picture {i} given with the question") for i, b in enumerate(given, 1)]
    lost = _lost(shown)
    return f'<div class="given">{"".join(shown)}</div>\n{_note(lost) if lost else ""}' if given else ""


def _outcome(call: Outcome, blobs: Mapping[str, Blob], link: Callable[[Blob], str]) -> str:
    what = f": {call.description}" if call.description else ""
    if call.status == "running":
        return f'<div class="pending" dir="auto">{_safe(call.source)}{_safe(what)} ...</div>\n'
    if call.status != "ok":
        return _note(f"No picture{what}", " - ".join(filter(None, [call.source, call.reason])))
    shown = [_img(blobs[sha], link, call.description) if sha in blobs else "" for sha in call.images]
    lost = _lost(shown)
    if not any(shown):
        return _note(f"No picture{what}", f"{call.source} - {lost or 'it made none'}")
    caption = f"{_safe(call.description)} {_provenance(call)}{_small(lost) if lost else ''}"
    return f'<figure>{"".join(shown)}<figcaption dir="auto">{caption}</figcaption></figure>\n'


def _lost(shown: Sequence[str]) -> str:
    return f"{shown.count('')} of {len(shown)} pictures missing or damaged" if "" in shown else ""


def _note(what: str, why: str = "") -> str:
    return f'<div class="note" role="note" dir="auto">{_safe(what)} {_small(_safe(why)) if why else ""}</div>\n'


def _small(html: str) -> str:
    return f"<small>{html}</small>"


def _provenance(call: Outcome) -> str:
    """The lines under a caption: where each picture comes from, and what it was made from."""
    said = call.provenance
    shown = [_facts(fact, call.source) for fact in (said, *_mappings(said.get("others")))]
    return "".join(map(_small, shown + [f"from {_facts(origin)}" for origin in _mappings(said.get("origins"))]))


def _mappings(value: object) -> list[Mapping[str, Any]]:
    return [v for v in value if isinstance(v, Mapping)] if isinstance(value, list | tuple) else []


def _facts(said: Mapping[str, Any], tool: str = "") -> str:
    """Who made a picture, with what, from where and under which licence; as far as that is known."""
    if isinstance(said.get("given"), int):
        return f"picture {said['given'] + 1} given with the question"
    told = {key: str(said.get(key) or "") for key in ("maker", "model", "title", "author", "source", "licence")}
    made = ": ".join(dict.fromkeys(filter(None, (tool, told["maker"], told["model"]))))
    where = next((str(said[key]) for key in ("page", "url") if _is_web(said.get(key))), "")
    title = told["title"] or (where and (told["source"] or where))
    linked = _link(where, title) if where else _safe(title)
    by = f" by {_safe(told['author'])}" if told["author"] else ""
    source = _link(told["source"]) if _is_web(told["source"]) else _safe(told["source"] * bool(told["title"]))
    return " · ".join(filter(None, [_safe(made), linked + by, source, _safe(told["licence"])]))


def _is_web(address: object) -> bool:
    return re.fullmatch(r"https?://[^\s]+", str(address)) is not None


def _link(address: str, text: str = "") -> str:
    return f'<a href="{_safe(address)}" rel="noopener noreferrer nofollow">{_safe(text or address)}</a>'


def _img(blob: Blob, link: Callable[[Blob], str], alt: str) -> str:
    """The picture as an `<img>`; "" if it cannot be shown."""
    if (seen := _seen(blob.data)) is None:
        return ""
    mime, width, height = seen
    return f'<img src="{_safe(link(Blob(blob.data, mime)))}" alt="{_safe(alt)}" width="{width}" height="{height}">'


@lru_cache(256)
def _seen(data: bytes) -> tuple[str, int, int] | None:
    """MIME type, width and height of a picture that browsers show, whatever it was said to be; None if it is none."""
    try:
        with Image.open(io.BytesIO(data), formats=list(_MIMES)) as image:
            if image.width * image.height > _MAX_PIXELS:
                return None
            image.load()
            return _MIMES[str(image.format)], image.width, image.height
    except Exception:  # Pillow's decoders raise many kinds for damaged data; each means the same here
        return None


def _data_url(blob: Blob) -> str:
    return f"data:{blob.mime};base64,{base64.b64encode(blob.data).decode('ascii')}"


def render_page(sections: Sequence[str], title: str, heading: bool = True) -> str:
    """A whole page of sections; it fetches nothing and runs no script, which its policy enforces too.

    Args:
        heading: whether the title stands on the page too, and not in the browser's frame alone.
    """
    head = f"<h1>{_safe(title)}</h1>\n" if heading else ""
    return f"""<!DOCTYPE html>
<html>
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{_safe(title)}</title>
<style>{CSS}</style>
</head>
<body>
<main>
{head}{"".join(sections)}</main>
</body>
</html>
"""


#: The page's style; documents look right in any page that includes it.
CSS = """
:root { color-scheme: light dark; --text: #1c2024; --quiet: #5c6570; --line: #d9dee3; --page: #fff; --soft: #f4f6f8;
  --link: #0b5cad }
@media (prefers-color-scheme: dark) { :root { --text: #e6e9ec; --quiet: #9aa4af; --line: #363d45; --page: #14171a;
  --soft: #1f2428; --link: #7db7f0 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--text); font: 1.0625rem/1.6 system-ui, sans-serif }
main { max-width: 46rem; margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1, h2, h3, h4 { line-height: 1.25; margin: 1.6em 0 .5em; text-wrap: balance }
main > h1, .document > h1:first-child { margin-top: .5em }
math { font-family: math; font-size: 1.1em }
mfrac > * { padding-block: .12em }
a { color: var(--link); overflow-wrap: anywhere }
.document { overflow-wrap: break-word }
.document + .document { border-top: 1px solid var(--line); margin-top: 3rem; padding-top: 1rem }
.document img { max-width: 100%; height: auto; max-height: 80vh; border-radius: .4rem; background: #fff }
figure { margin: 1.5rem 0; break-inside: avoid }
figure img { display: block; margin: 0 auto }
figure img + img { margin-top: .5rem }
figcaption { margin-top: .5rem; text-align: center; color: var(--quiet); font-size: .92rem }
figcaption small, .note small { display: block; font-size: .82rem }
.note { margin: 1.2rem 0; padding: .6rem .9rem; border-left: .25rem solid var(--line); background: var(--soft);
  color: var(--quiet) }
.given { display: flex; flex-wrap: wrap; gap: .5rem; margin: 1rem 0 }
.given img { height: 9rem; width: auto; object-fit: contain }
pre, .document table { display: block; overflow-x: auto }
pre { padding: .8rem 1rem; background: var(--soft); border-radius: .4rem }
code { font: .9em/1.45 ui-monospace, monospace }
table { border-collapse: collapse }
th, td { padding: .35rem .7rem; border: 1px solid var(--line); vertical-align: top }
td figure { margin: 0; min-width: 9rem }
blockquote { margin: 1rem 0; padding-left: 1rem; border-left: .25rem solid var(--line); color: var(--quiet) }
@media print { body { font-size: 11pt } main { max-width: none; padding: 0 } .document img { max-height: 18cm }
  a { color: inherit } }
"""
