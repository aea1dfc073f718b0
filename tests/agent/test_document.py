"""What a person sees of a document: its text and pictures, honest notes for what failed, and nothing that runs."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from agent.document import render_html, render_page
from agent.protocol import Call, Invalid, format_call, parse
from replay.record import Blob
from rewards.base import CallOutcome

VOID = {"img", "br", "hr", "meta"}
FORBIDDEN = {"script", "iframe", "object", "embed", "link", "form", "svg", "style", "video"}


def encode(image: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def picture(colour: str = "red", kind: str = "PNG") -> Blob:
    return Blob(encode(Image.new("RGB", (4, 3), colour), kind), f"image/{kind.lower()}")


RED = picture()
NOISE = encode(Image.effect_noise((64, 64), 50))
TAG = format_call("search", "A red square", {"query": "red"})


def outcomes(text: str, status: str = "ok", blobs: tuple[Blob, ...] = (RED,), **more: object) -> list[CallOutcome]:
    """Every tag of a text, each as if its call had ended so."""
    made = tuple(b.sha256 for b in blobs) if status == "ok" else ()
    tags = [s for s in parse(text) if isinstance(s, Call | Invalid)]
    return [
        CallOutcome(s.source, s.description, s.params, s.start, s.end, status, images=made, **more)  # type: ignore[arg-type]
        if isinstance(s, Call)
        else CallOutcome(s.source, "", {}, s.start, s.end, "invalid", s.reason)
        for s in tags
    ]


def html(text: str, status: str = "ok", blobs: tuple[Blob, ...] = (RED,), **more: object) -> str:
    out = render_html(text, outcomes(text, status, blobs, **more), {b.sha256: b for b in blobs})
    check(out)
    return out


class Checker(HTMLParser):
    """Elements are closed in order, none is forbidden, no attribute runs or fetches, no block is in a paragraph."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in FORBIDDEN, tag
        assert not any(name.startswith("on") or name == "style" for name, _ in attrs), attrs
        for name, value in attrs:
            assert name != "src" or (value or "").startswith("data:image/"), value
            assert name != "href" or not re.match(r"\s*(javascript|data|vbscript|file):", value or "", re.I), value
        if tag in ("figure", "div", "p"):
            assert not {"p", "h1", "h2", "pre", "em", "strong", "a", "code"} & set(self.stack), self.stack
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.stack.pop() == tag


def check(out: str) -> None:
    checker = Checker()
    checker.feed(out)
    checker.close()
    assert not checker.stack
    assert "imgen" not in out
    assert "\ufdd0" not in out
    out.encode()


# Pictures


def test_a_picture_stands_where_its_tag_stood_with_caption_and_provenance() -> None:
    facts = {"title": "Red & square", "source": "https://example.org/r?a=1&b=2", "licence": "CC0-1.0", "rank": 1}
    out = html(f"Before.\n\n{TAG}\n\nAfter.", provenance=facts)
    assert f'<img src="data:image/png;base64,{base64.b64encode(RED.data).decode()}" alt="A red square"' in out
    assert 'width="4" height="3"' in out
    assert "A red square <small>search · Red &amp; square · " in out
    assert '<a href="https://example.org/r?a=1&amp;b=2" rel="noopener noreferrer nofollow">' in out
    assert "CC0-1.0" in out and "rank" not in out
    assert out.index("Before.") < out.index("<figure>") < out.index("After.")


def test_a_caption_says_who_made_the_picture_with_what_from_where_and_under_which_licence() -> None:
    found = {
        "maker": "commons",
        "title": "Red <square>",
        "author": "A. & B.",
        "licence": "CC BY 4.0",
        "page": "https://example.org/p",
        "url": "https://example.org/r.png",
        "source": "example.org",
    }
    link = '<a href="https://example.org/p" rel="noopener noreferrer nofollow">Red &lt;square&gt;</a>'
    facts = f"{link} by A. &amp; B. · example.org · CC BY 4.0"
    assert f"<small>search: commons · {facts}</small>" in html(TAG, provenance=found)
    edited = {"maker": "pillow", "origins": [found, {"given": 1}, {"maker": "diffusers", "model": "flux"}]}
    lines = ["search: pillow", f"from commons · {facts}", "from picture 2 given with the question"]
    lines.append("from diffusers: flux")
    assert "".join(f"<small>{line}</small>" for line in lines) in html(TAG, provenance=edited)


def test_every_picture_of_a_search_has_its_own_line() -> None:
    out = html(TAG, provenance={"title": "One", "others": [{"title": "Two", "licence": "CC0"}]})
    assert "<small>search · One</small><small>search · Two · CC0</small>" in out


@pytest.mark.parametrize("odd", [7, "text", [7, None], {"title": "x"}, [{"page": "javascript:x", "given": "no"}]])
def test_odd_provenance_of_a_foreign_tool_breaks_nothing(odd: object) -> None:
    html(TAG, provenance={"others": odd, "origins": odd, "title": odd, "page": odd, "given": odd})


def test_a_call_that_made_several_pictures_shows_them_all_under_one_caption() -> None:
    out = html(TAG, blobs=(RED, picture("blue", "JPEG"), picture("green", "WEBP")))
    assert (out.count("<img"), out.count("<figure>"), out.count("<figcaption")) == (3, 1, 1)
    assert "data:image/jpeg" in out and "data:image/webp" in out


def test_the_user_s_pictures_come_first() -> None:
    out = render_html("Text.", [], {}, given=[RED, Blob(b"broken")])
    assert out.index('alt="Picture 1 given with the question"') < out.index("Text.")
    assert out.count("<img") == 1 and "1 of 2 pictures missing or damaged" in out


def test_the_type_of_a_picture_is_read_from_its_bytes() -> None:
    jpeg = picture(kind="JPEG")
    assert "data:image/jpeg" in html(TAG, blobs=(Blob(jpeg.data, 'x" onerror="alert(1)'),))


# Calls without a picture


def test_a_failed_call_leaves_a_note_and_no_frame() -> None:
    out = html(f"Before.\n\n{TAG}\n\nAfter.", status="failed", reason="no hit for <red>")
    assert '<div class="note" role="note" dir="auto">No picture: A red square' in out
    assert "search - no hit for &lt;red&gt;" in out
    assert "<img" not in out and "<figure" not in out


def test_an_invalid_call_leaves_a_note_and_not_the_raw_tag() -> None:
    out = html("Before <imgen>{'source': 'search', 'secret'</imgen> after")
    assert "No picture" in out and "a &#x27;:&#x27; is missing" in out
    assert "{" not in out


@pytest.mark.parametrize("kept", range(len("<img"), len(TAG)))
def test_a_document_cut_off_anywhere_in_a_tag_never_shows_the_raw_tag(kept: int) -> None:
    out = html(f"Before {TAG[:kept]}")
    assert "{" not in out and "&lt;" not in out
    assert kept < len("<imgen>") or "cut off" in out


@pytest.mark.parametrize("data", [b"", b"not a picture", NOISE[: len(NOISE) // 2], RED.data[:40], b"<svg/>"])
def test_a_damaged_picture_is_a_note_and_no_broken_frame(data: bytes) -> None:
    out = html(TAG, blobs=(Blob(data),))
    assert "<img" not in out and "search - 1 of 1 pictures missing or damaged" in out


def test_a_picture_too_large_to_be_checked_is_a_note() -> None:
    assert "<img" not in html(TAG, blobs=(Blob(encode(Image.new("1", (8000, 8000)))),))


def test_a_missing_picture_is_told_beside_those_that_are_there() -> None:
    call = CallOutcome("code", "two", {}, 0, len(TAG), "ok", images=(RED.sha256, "0" * 64))
    out = render_html(TAG, [call], {RED.sha256: RED})
    assert out.count("<img") == 1 and "1 of 2 pictures missing or damaged" in out
    call = CallOutcome("code", "none", {}, 0, len(TAG), "ok")
    assert "code - it made none" in render_html(TAG, [call], {})


# Markdown around pictures


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One # two, T three.", "<p>One # two, </p> F <p> three.</p>"),
        ("# Title T", "<h1>Title </h1> F"),
        ("T\n===", "F"),
        ("- a T\n- b", "<ul> <li>a F</li> <li>b</li> </ul>"),
        ("1. a\n\n   T\n\n2. b", "<ol> <li> <p>a</p> F</li> <li> <p>b</p></li> </ol>"),
        ("```\nT\n```", "F"),
        (
            "```py\na = 1\nT\nb\n```",
            '<pre><code class="language-py">a = 1 </code></pre> F <pre><code class="language-py"> b </code></pre>',
        ),
        ("    T", "F"),
        ("`T`", "F"),
        ("say `a T b` so", "<p>say <code>a </code></p> F <p><code> b</code> so</p>"),
        ("**bold T**", "<p><strong>bold </strong></p> F"),
        ("> T", "<blockquote> F </blockquote>"),
        ("![a cat](T)", "<p>a cat</p> F"),
        ("![T](http://x.org/a.png)", "F"),
        ("[T](http://x.org/)", '<p><a href="http://x.org/" rel="noopener noreferrer nofollow"></a></p> F'),
        ("[a]: T\n\ntext", "<p>text</p> F"),
        ("TT", "F F"),
        ("```T\na\n```", '<pre><code class="language-">a </code></pre> F'),
    ],
)
def test_a_figure_is_a_block_of_its_own_wherever_its_tag_stood(text: str, expected: str) -> None:
    out = html(text.replace("T", TAG, 2) if text != "# Title T" else f"# Title {TAG}")
    body = out.removeprefix('<section class="document" dir="auto">\n').removesuffix("</section>\n")
    body = re.sub("<figure>.*?</figure>", "F", body, flags=re.DOTALL)
    assert re.sub(r"\s+(?=</li>)", "", " ".join(body.split())) == expected
    assert out.count("<figure>") == text.replace("Title", "").count("T")


def test_a_figure_stands_in_a_table_cell() -> None:
    out = html(f"| place | picture |\n|---|---|\n| Paris | {TAG} |\n| Rome | **{TAG}** |\n")
    assert len(re.findall(r"<td>\s*<figure>", out)) == 1 and out.count("<figure>") == 2
    assert out.count("<tr>") == 3


def test_text_that_looks_like_a_slot_moves_no_figure() -> None:
    out = html(f"\ufdd00\ufdd1 <http://x.org/%EF%B7%900%EF%B7%91%EF%B7%909%EF%B7%91> &#xFDD0;0&#xFDD1; {TAG} end")
    assert out.count("<figure>") == 1


# Nothing of the document runs or fetches


@pytest.mark.parametrize(
    "evil",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "a <b onclick='x'>b</b> <!-- <script> -->",
        "[x](javascript:alert(1)) [y](data:text/html,<script>alert(1)</script>) <javascript:alert(1)>",
        '[x](http://a.org/"onmouseover="alert(1))',
        "![x](http://tracker.example/p.png) ![y](data:image/png;base64,AAAA)",
        '"><script>alert(1)</script>',
        "<style>*{display:none}</style><iframe src=http://x.org></iframe></section></main>",
        "```<script>\n</code></pre><script>alert(1)</script>\n```",
    ],
)
def test_scripts_and_foreign_pictures_in_the_text_are_only_text(evil: str) -> None:
    html(evil)
    check(render_html(evil, [], {}, title=evil))
    call = CallOutcome(
        evil, evil, {}, 0, len(TAG), "ok", images=(RED.sha256,), provenance={"title": evil, "source": evil}
    )
    check(render_html(TAG, [call], {RED.sha256: RED}))
    check(render_html(TAG, [CallOutcome(evil, evil, {}, 0, len(TAG), "failed", evil)], {}))


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [TAG, "<imgen>{", "</imgen>", "\n", "\n\n", "|", "|--|\n", "# ", "- ", "> ", "`", "```\n", "**"]
        )
        | st.sampled_from(
            ["[", "](", ")", "![", "<", ">", "    ", "&#", "\ufdd0", "0", "\ufdd1", "\ud800", "a", " ", "*"]
        )
        | st.text(st.characters(), max_size=4)
    ).map("".join)
)
def test_any_text_renders_with_every_figure_once(text: str) -> None:
    made = outcomes(text)
    out = render_html(text, made, {RED.sha256: RED})
    check(out)
    assert out.count("<figure>") == sum(c.status == "ok" for c in made)
    assert out.count('class="note"') == sum(c.status == "invalid" for c in made)


def test_an_empty_document_renders() -> None:
    assert render_html("", [], {}) == '<section class="document" dir="auto">\n</section>\n'


def test_a_title_heads_its_section() -> None:
    assert "<h2>A &amp; B</h2>" in render_html("x", [], {}, title="A & B")


@pytest.mark.parametrize("places", [[(0, 99)], [(3, 2)], [(0, 3), (2, 4)], [(-1, 2)]])
def test_calls_that_do_not_lie_in_the_text_are_refused(places: list[tuple[int, int]]) -> None:
    calls = [CallOutcome("search", "d", {}, start, end, "failed") for start, end in places]
    with pytest.raises(ValueError, match=r"call \d spans"):
        render_html("text", calls, {})


# The page


def test_a_page_is_whole_fetches_nothing_and_runs_no_script() -> None:
    page = render_page([html(TAG), html("two")], "A < B")
    assert page.startswith("<!DOCTYPE html>") and page.count("<section") == 2
    assert "<title>A &lt; B</title>" in page and "<h1>A &lt; B</h1>" in page
    assert "default-src 'none'" in page and 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page and "@media print" in page
    assert not re.search(r"<script|<link|url\(|@import|https?:", page)
