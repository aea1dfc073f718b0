r"""Quoted strings in a tag: what their backslashes mean, and how to write one that reads back.

**The rule**, the same in Python's and JSON's notation: `\n \t \r \\ \' \" \/ \xNN \uNNNN \UNNNNNNNN` mean what the two
say. Every other backslash stays as it is: nobody who writes `\alpha`, `\beta`, `\frac` or `\b` wants a bell, a
backspace or a form feed. So does one of `\n \t \r` that begins a TeX command and hardly anything else (`\theta`,
`\nabla`, `\rho`); `\nu`, `\ne` and `\neq` are newlines, since code holds `\nu = 1`.
"""

from __future__ import annotations

import re
from typing import Literal

Style = Literal["python", "json"]

_TEX = (
    r"(?:n(?:abla|ot|otin|exists|parallel|leq|geq)|t(?:heta|au|imes|anh?|ilde|o|riangle|herefore|frac)|text\w*(?=\{)"
    r"|r(?:ho|angle|ceil|floor|m)|right\w*)(?![A-Za-z])"
)
_HEX = "[0-9a-fA-F]"
_ESCAPE = re.compile(
    rf"\\(?:(?P<tex>{_TEX})"
    rf"|u(?P<high>[dD][89abAB]{_HEX}{{2}})\\u(?P<low>[dD][c-fC-F]{_HEX}{{2}})"  # JSON's two halves of one character
    rf"|u(?P<u>{_HEX}{{4}})|U(?P<U>{_HEX}{{8}})|x(?P<x>{_HEX}{{2}})"
    r"""|(?P<one>[\\'"/ntr]))"""
)
_ONE = {"n": "\n", "t": "\t", "r": "\r"}
_SHORT = {char: letter for letter, char in _ONE.items()}


def unescape(raw: str) -> str:
    """What the inside of a quoted string means. Half a surrogate pair becomes U+FFFD, which can be encoded."""
    return _ESCAPE.sub(_meaning, raw)


def _meaning(m: re.Match[str]) -> str:
    if m["one"]:
        return _ONE.get(m["one"], m["one"])
    if m["high"]:
        return bytes.fromhex(m["high"] + m["low"]).decode("utf-16-be")
    if m["tex"] or (code := int(m["u"] or m["U"] or m["x"], 16)) > 0x10FFFF:
        return m[0]
    return "\ufffd" if 0xD800 <= code <= 0xDFFF else chr(code)


def quote(value: str, style: Style) -> str:
    """`value` as a quoted string of the notation, which the standard library and `unescape` read back alike.

    `<imgen>` and `</imgen>` lose their `<` to an escape, since they would open or end a tag.
    """
    mark = '"' if style == "json" or ("'" in value and '"' not in value) else "'"
    unsafe = re.compile(rf"[\x00-\x1f\x7f\\{mark}]|<(?=/?imgen>)")
    written = unsafe.sub(lambda m: _written(m[0], short=True), value)
    if unescape(written) != value:  # a newline or a tab would read as the start of a TeX command
        written = unsafe.sub(lambda m: _written(m[0], short=False), value)
    return mark + written + mark


def _written(char: str, short: bool) -> str:
    if char in "\\'\"":
        return "\\" + char
    return "\\" + _SHORT[char] if short and char in _SHORT else f"\\u{ord(char):04x}"
