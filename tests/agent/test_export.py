"""A document as a page, as Markdown with its pictures, and as JSON."""

from __future__ import annotations

import io
import json

import pytest
from markdown_it import MarkdownIt
from PIL import Image

from agent.answer import Document
from agent.export import file_name, to_json, to_markdown, to_page
from agent.formulas import LONGEST, to_mathml
from agent.markdown import slot, to_html
from agent.protocol import format_call
from agent.render import CallOutcome
from replay.record import Blob


def picture(colour: str = "red") -> Blob:
    out = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(out, "PNG")
    return Blob(out.getvalue())


def document(description: str = "A fish", *, status: str = "ok", blob: Blob | None = None) -> Document:
    tag = format_call("search", description, {"query": "fish"})
    text = f"# Fish\n\nThey swim:\n{tag}\nand sleep."
    blob = blob or picture()
    images, reason = ((blob.sha256,), "") if status == "ok" else ((), "no hit")
    said = {"maker": "Commons", "title": "Trout", "page": "https://example.org/trout", "licence": "CC0", "odd": {1}}
    start = text.index(tag)
    call = CallOutcome("search", description, {"query": "fish"}, start, start + len(tag), status, reason, images, said)
    return Document("What do fish do?", text, (call,), {blob.sha256: blob}, (picture("blue"),))


def test_markdown_names_its_pictures_and_where_they_come_from() -> None:
    text = to_markdown(document(), file_name)
    assert file_name(picture("blue")) in text and file_name(picture()) in text and "<imgen>" not in text
    html = MarkdownIt("commonmark").render(text)
    assert html.count("<img") == 2 and "Trout" in html and "CC0" in html and html.index("swim") < html.index("sleep")


def test_a_picture_that_was_not_made_leaves_a_note_in_markdown() -> None:
    text = to_markdown(document(status="failed"), file_name)
    assert text.count("![") == 1 and "> No picture: A fish (search - no hit)" in text


def test_a_damaged_picture_leaves_a_note_in_markdown() -> None:
    text = to_markdown(document(blob=Blob(b"no picture")), file_name)
    assert text.count("![") == 1 and "No picture: A fish" in text


@pytest.mark.parametrize("hostile", ["](x) <script>alert(1)</script>", "*a* `b` [c](d) $e$", "one\n\n# two"])
def test_a_caption_is_text_in_markdown(hostile: str) -> None:
    html = MarkdownIt("commonmark").render(to_markdown(document(hostile), file_name))
    assert "<script" not in html and html.count("<a ") == html.count('<a href="https://example.org')
    assert html.count("<h1>") == 1


def test_json_holds_every_call_and_picture() -> None:
    made = json.loads(json.dumps(to_json(document())))
    (call,) = made["calls"]
    assert call["images"][0] in made["images"] and made["given"][0] in made["images"]
    assert call["provenance"]["page"] == "https://example.org/trout" and call["provenance"]["odd"] == "{1}"


def test_a_page_is_headed_by_its_question_unless_the_document_has_a_heading() -> None:
    assert "<h1>What do fish do?</h1>" in to_page(Document("What do fish do?", "They swim."))
    headed = to_page(document())
    assert headed.count("<h1") == 1 and "<h1>Fish</h1>" in headed and "<title>What do fish do?</title>" in headed


def test_formulas_are_drawn_and_prices_are_not() -> None:
    html = to_html("It costs $5 to $6. With $a^2$:\n\n$$\\frac{1}{2}$$\n", [])
    assert "costs $5 to $6" in html and "<msup>" in html and "<mfrac>" in html and 'display="block"' in html


@pytest.mark.parametrize(
    "tex",
    [r"\text{<script>alert(1)</script>}", r"\href{javascript:alert(1)}{x}",
     r"\text{</math><img src=x onerror=alert(1)>}",
     "\\frac{", "{" * 900, "_" * 900, r"\frac" * 300, "x" * (LONGEST + 1), "<script>", ""],
)  # fmt: skip
def test_a_hostile_formula_executes_nothing(tex: str) -> None:
    html = to_mathml(tex, block=True)
    assert not any(bad in html for bad in ("<script", "<img", "href", 'javascript:alert(1)"'))


def test_a_figure_in_a_formula_comes_out_once() -> None:
    html = to_html(f"a $x{slot(0)}y$ b\n\n$$\nz{slot(1)}\n$$", ["<F0>", "<F1>"])
    assert html.count("<F0>") == html.count("<F1>") == 1
