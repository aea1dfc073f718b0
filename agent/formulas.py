"""Formulas in TeX as MathML, which browsers draw by themselves."""

from __future__ import annotations

import re
from html import escape, unescape
from xml.etree.ElementTree import Element, tostring

from latex2mathml.converter import convert_to_element

LONGEST = 2000  # characters of a formula; the converter's time grows faster than its input
_ELEMENTS = re.compile(r"m(ath|row|i|n|o|text|space|frac|sqrt|root|sub|sup|subsup|under|over|underover|table|tr|td|"
                       r"style|padded|phantom|enclose|multiscripts|prescripts|error|fenced)")  # fmt: skip
_ATTRIBUTES = {
    "accent", "columnalign", "columnlines", "columnspacing", "depth", "display", "displaystyle", "fence", "form",
    "height", "linebreak", "linethickness", "lspace", "mathvariant", "maxsize", "minsize", "movablelimits", "notation",
    "rowlines", "rowspacing", "rspace", "scriptlevel", "separator", "stretchy", "symmetric", "voffset", "width",
    "xmlns",
}  # fmt: skip


def to_mathml(tex: str, block: bool = False) -> str:
    """A formula as MathML, or its source as code where it cannot be read. Nothing in it is trusted."""
    try:
        if len(tex) > LONGEST:
            raise ValueError("too long")
        tree = convert_to_element(tex, display="block" if block else "inline")
        _tame(tree)
        return tostring(tree, encoding="unicode")
    except Exception:  # the converter raises many kinds for what is no TeX; each means the same here
        return f"<pre><code>{escape(tex)}</code></pre>" if block else f"<code>{escape(tex)}</code>"


def _tame(element: Element) -> None:
    """Keeps what draws: links and styles could fetch, and texts hold entities that would be escaped twice."""
    if not _ELEMENTS.fullmatch(element.tag):
        raise ValueError(f"no element {element.tag!r} of MathML draws")
    for name in set(element.attrib) - _ATTRIBUTES:
        del element.attrib[name]
    element.text = unescape(element.text) if element.text else element.text
    for child in element:
        _tame(child)
