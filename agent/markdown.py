"""Markdown to HTML with figures in it.

Figures stand in the source as slots, marks that no text can hold. Every figure comes out exactly once and as a block of
its own: a paragraph is split around it, a code fence or a code span around it is opened, a heading keeps its words and
the figure follows, a table cell holds it. Nothing of the source reaches the page as markup of its own, and nothing is
fetched: HTML is shown as text, and of a Markdown image only the words are kept.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.dollarmath import dollarmath_plugin

from agent.formulas import to_mathml

# Two noncharacters of Unicode, which `clean` takes out of everything else; and what a link's address makes of them.
_SLOT = re.compile("\ufdd0([0-9]+)\ufdd1")
_SLOT_IN_URL = re.compile("%EF%B7%90([0-9]+)%EF%B7%91")
_UNCLEAN = re.compile("[\ufdd0\ufdd1\ud800-\udfff]")
#: Inline tokens whose content is text.
_TEXTS = ("text", "code_inline", "math_inline", "math_inline_double")


def clean(text: str) -> str:
    """`text` without what would pass for a slot or cannot be encoded."""
    return _UNCLEAN.sub("\ufffd", text)


def slot(index: int) -> str:
    """The mark of figure `index` in the source."""
    return f"\ufdd0{index}\ufdd1"


def to_html(source: str, figures: Sequence[str]) -> str:
    """Markdown with slots as HTML.

    Args:
        source: cleaned text, with `slot(i)` where figure i belongs.
        figures: trusted HTML, a block each.
    """
    env: dict[str, Any] = {}
    left = dict(enumerate(figures))
    tokens = _place(_MARKDOWN.parse(source, env))
    for token in tokens:
        if token.type == "html_block":
            token.content = left.pop(token.meta["slot"], "")
    html = _MARKDOWN.renderer.render(tokens, _MARKDOWN.options, env)
    return _SLOT.sub("", html) + "".join(left.values())  # those that stood in a link's title or the like


def _link(self: Any, tokens: Sequence[Token], i: int, options: Any, env: Any) -> str:
    return f'<a href="{escape(str(tokens[i].attrs["href"]))}" rel="noopener noreferrer nofollow">'


def _formula(self: Any, tokens: Sequence[Token], i: int, options: Any, env: Any) -> str:
    return to_mathml(tokens[i].content.strip(), block=tokens[i].type != "math_inline")


def _markdown() -> MarkdownIt:
    md = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    md.use(dollarmath_plugin, allow_space=False, allow_digits=False, double_inline=True)
    md.add_render_rule("link_open", _link)
    for kind in ("math_inline", "math_inline_double", "math_block"):
        md.add_render_rule(kind, _formula)
    return md


_MARKDOWN = _markdown()


def _place(tokens: list[Token]) -> list[Token]:
    """The same tokens with each slot as a block of its own."""
    out: list[Token] = []
    i = 0
    while i < len(tokens):
        if i + 1 < len(tokens) and tokens[i + 1].type == "inline":  # a block that holds text is always three tokens
            out += _text_block(*tokens[i : i + 3])
            i += 3
            continue
        out += _code_block(tokens[i]) if tokens[i].type in ("fence", "code_block", "math_block") else [tokens[i]]
        i += 1
    return out


def _figure(index: str) -> Token:
    return Token("html_block", "", 0, meta={"slot": int(index)}, block=True)


def _code_block(token: Token) -> list[Token]:
    parts = _SLOT.split(token.content)  # text, index, text, index, ..., text
    pieces = [_figure(p) if n % 2 else replace(token, content=p) for n, p in enumerate(parts)]
    return pieces if len(parts) == 1 else [p for p in pieces if p.type == "html_block" or p.content.strip()]


def _text_block(opening: Token, inline: Token, closing: Token) -> list[Token]:
    runs, late = _runs(inline.children or [])
    if opening.type == "paragraph_open":
        blocks = [
            [opening, replace(inline, children=r), closing] if isinstance(r, list) else [_figure(r)] for r in runs
        ]
        return [t for block in blocks for t in block] + [_figure(i) for i in late]
    if opening.type == "heading_open":
        words = [t for r in runs if isinstance(r, list) for t in r]
        figures = [_figure(i) for i in [*(r for r in runs if isinstance(r, str)), *late]]
        return [opening, replace(inline, children=words), closing, *figures] if words else figures
    cell = [replace(inline, children=r) if isinstance(r, list) else _figure(r) for r in runs]
    return [opening, *cell, *map(_figure, late), closing]


def _runs(children: list[Token]) -> tuple[list[list[Token] | str], list[str]]:
    """Inline tokens cut at the slots: runs of tokens and indices in order, and the indices that stood in a span."""
    run: list[Token] = []
    runs: list[list[Token] | str] = [run]
    late: list[str] = []
    for child in children:
        if child.type == "image":
            inside = "".join(map(slot, map(int, _SLOT_IN_URL.findall(str(child.attrs["src"])))))
            child = Token("text", "", 0, content=child.content + inside, level=child.level)
        elif child.type == "link_open":
            late += _SLOT_IN_URL.findall(str(child.attrs["href"]))
        text, *rest = _SLOT.split(child.content) if child.type in _TEXTS else [""]
        run.append(replace(child, content=text) if rest else child)
        for index, text in zip(rest[::2], rest[1::2], strict=True):
            if child.level:
                late.append(index)
            else:
                run = []
                runs += [index, run]
            run.append(replace(child, content=text))
    return [r for r in runs if isinstance(r, str) or any(map(_shows, r))], late


def _shows(token: Token) -> bool:
    if token.type in _TEXTS:
        return bool(token.content.strip())
    return token.type not in ("softbreak", "hardbreak")
