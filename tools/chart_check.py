"""Looks at a drawn chart for what its reader would stumble over: blank axes, text that is cut off, covered, too small
or without glyphs.

Works on matplotlib's artists after drawing, with their boxes in pixels; what is drawn is not looked at. Nothing of the
project's is imported here, because the zygote loads this file by its path.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

SMALLEST = 6.0  # pixels of a font that can be read
COVERED = 0.2  # share of a text that may lie under another one
MOST = 8  # that are told of one figure
QUOTED = 30  # characters of a text that are told
_GLYPH = re.compile(r"Glyph (\d+) .*missing from")


def problems(figure: Figure, cut_off: bool = False, told: Iterable[str] = ()) -> list[str]:
    """Short sentences, each of which says what to change; none for a good chart.

    Args:
        figure: drawn.
        cut_off: whether the picture ends before the figure's texts do.
        told: warnings of matplotlib's while it was drawn.
    """
    found = [*_blank(figure), *_glyphs(told)]
    if cut_off:
        found.append("text reaches beyond the figure's edge and is cut off: make the figure larger or the text shorter")
    found += _too_small(figure)
    for axis in _axes_of(figure):
        found += _crowded(axis)
    found += _covered(figure)
    return list(dict.fromkeys(found))[:MOST]


def _blank(figure: Figure) -> Iterator[str]:
    if not figure.axes and not figure.texts:
        yield "the figure is blank: plot something"
    for i, ax in enumerate(figure.axes, 1):
        if not ax.get_visible() or hasattr(ax, "_colorbar"):
            continue
        which = f"axes {i} of {len(figure.axes)}" if len(figure.axes) > 1 else "the chart"
        if not (ax.has_data() or ax.texts or ax.tables or ax.images or ax.artists or ax.get_legend()):
            if ax.axison:
                yield f"{which} shows nothing: plot data there, or leave it out"
        elif ax.lines and not (ax.patches or ax.collections or ax.images) and not any(map(_finite, ax.lines)):
            yield f"{which} shows nothing: none of its values is a finite number"


def _finite(line: Any) -> bool:
    return bool(np.isfinite(np.asarray(line.get_xydata(), float)).all(axis=1).any())


def _glyphs(told: Iterable[str]) -> Iterator[str]:
    missing = dict.fromkeys(chr(int(m[1])) for text in told if (m := _GLYPH.search(text)))
    if missing:
        yield f"no font here has {' '.join(list(missing)[:10])}: use other characters"


def _too_small(figure: Figure) -> Iterator[str]:
    text: Any
    for text in figure.findobj(Text):
        pixels = text.get_fontsize() * figure.dpi / 72
        if pixels < SMALLEST and _shown(text):
            yield f"the text {_quoted(text)} is {pixels:.0f} pixels high: use a larger fontsize or a larger figure"
            return


def _axes_of(figure: Figure) -> Iterator[Any]:
    for ax in figure.axes:
        if ax.get_visible() and ax.axison:
            yield from (axis for axis in ax._axis_map.values() if axis.get_visible())


def _ticks(axis: Any) -> list[Any]:
    """Labels of ticks that lie in view, along the axis."""
    low, high = sorted(axis.get_view_interval())
    margin = (high - low) * 1e-6
    at = [(tick.get_loc(), tick) for tick in axis.get_major_ticks()]
    labels = ((loc, label) for loc, tick in at for label in (tick.label1, tick.label2))
    inside = [(loc, label) for loc, label in labels if low - margin <= loc <= high + margin and _shown(label)]
    return [label for _, label in sorted(inside, key=lambda pair: pair[0])]


def _crowded(axis: Any) -> Iterator[str]:
    """Neighbouring tick labels that run into each other."""
    if axis.axis_name not in "xy" or not isinstance(axis.axes, Axes) or axis.axes.name == "polar":
        return
    labels = _ticks(axis)
    boxes = [label.get_window_extent() for label in labels]
    hits = 0
    for (a, one), (b, other) in itertools.pairwise(zip(labels, boxes, strict=True)):
        angle = math.radians(a.get_rotation() % 180)
        if axis.axis_name == "x" and 0.15 < angle < math.pi - 0.15:  # slanted: boxes overlap where letters do not
            apart = abs(b.get_position()[0] - a.get_position()[0])
            start, end = axis.axes.transData.transform([(0, 0), (apart, 0)])[:, 0]
            hits += abs(end - start) * math.sin(angle) < 0.8 * a.get_fontsize() * axis.axes.figure.dpi / 72
        else:
            hits += _overlap(one, other) > 0.02
    if hits:
        advice = "rotate them, or show fewer" if axis.axis_name == "x" else "show fewer, or make the figure higher"
        yield f"labels of the {axis.axis_name} axis overlap: {advice}"


def _covered(figure: Figure) -> Iterator[str]:
    """Texts over one another: titles, axis labels, annotations, legends, and the tick labels of an axis."""
    groups: list[tuple[str, Sequence[Any]]] = [(_quoted(text), [text]) for text in figure.texts if _shown(text)]
    if (title := getattr(figure, "_suptitle", None)) is not None and title not in figure.texts and _shown(title):
        groups.append((_quoted(title), [title]))
    for ax in figure.axes:
        if not ax.get_visible():
            continue
        named = [ax.title, ax._left_title, ax._right_title, *ax.texts]  # type: ignore[attr-defined]
        if ax.axison:
            named += [axis.label for axis in ax._axis_map.values() if axis.get_visible()]
        groups += [(_quoted(text), [text]) for text in named if _shown(text)]
        if (legend := ax.get_legend()) is not None and legend.get_visible():
            groups.append(("the legend", [legend]))
    for axis in _axes_of(figure):
        if labels := _ticks(axis):
            groups.append((f"labels of the {axis.axis_name} axis", labels))
    boxes = [[part.get_window_extent() for part in parts] for _, parts in groups]
    for i, j in itertools.combinations(range(len(groups)), 2):
        if any(_overlap(a, b) > COVERED for a in boxes[i] for b in boxes[j]):
            yield f"{groups[i][0]} and {groups[j][0]} overlap: move one of them"


def _overlap(a: Any, b: Any) -> float:
    """Area that two boxes share, of the smaller one's: 0 to 1."""
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    smaller = min(a.width * a.height, b.width * b.height)
    return width * height / smaller if width > 1 and height > 1 and smaller > 0 else 0.0


def _shown(text: Text) -> bool:
    return text.get_visible() and bool(text.get_text().strip()) and text.get_alpha() != 0


def _quoted(text: Text) -> str:
    words = " ".join(text.get_text().split())
    return repr(words if len(words) <= QUOTED else words[: QUOTED - 3] + "...")
