"""Fonts for text in any language: what a text's own font lacks, is taken from installed ones that have it.

A text is given only those further fonts that it needs, because every font of a list costs time at each drawing.
Nothing of the project's is imported here, because the zygote loads this file by its path. The Debian packages
fonts-noto-core, fonts-droid-fallback, fonts-nanum and fonts-symbola have all of these.
"""

from __future__ import annotations

from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.text import Text

_NOTO = (
    "Arabic Hebrew Devanagari Bengali Gurmukhi Gujarati Oriya Tamil Telugu Kannada Malayalam Sinhala Thai Lao Khmer "
    "Myanmar Tibetan Georgian Armenian Ethiopic Mongolian Cherokee Thaana Syriac Tifinagh NKo Symbols Symbols2 Math"
)
#: In order of preference.
FAMILIES = (
    "Noto Sans",
    "Noto Sans CJK SC",
    "Droid Sans Fallback",
    "WenQuanYi Zen Hei",
    "NanumGothic",
    *(f"Noto Sans {script}" for script in _NOTO.split()),
    "Symbola",
)


class Fallback:
    """The characters of the installed fonts."""

    def __init__(self) -> None:
        installed = {font.name for font in font_manager.fontManager.ttflist}
        self._default = _characters("DejaVu Sans")
        self._others = {name: _characters(name) for name in FAMILIES if name in installed}

    def extend(self, figure: Figure) -> bool:
        """Give the texts of a figure the fonts that they lack; whether there were any."""
        extended = False
        for text in figure.findobj(Text):
            missing = {ord(c) for c in text.get_text()} - self._default
            needed = []
            for name, characters in self._others.items():
                if not missing.isdisjoint(characters):
                    needed.append(name)
                    missing -= characters
            if needed and not set(needed) <= set(text.get_fontfamily()):
                text.set_fontfamily([*text.get_fontfamily(), *needed])
                extended = True
        return extended


def _characters(family: str) -> frozenset[int]:
    path = font_manager.findfont(FontProperties(family=family))
    return frozenset(font_manager.get_font(path).get_charmap()) | {ord("\n"), ord("\t")}
