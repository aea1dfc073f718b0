"""The page in a real browser."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from playwright.sync_api import Page, expect, sync_playwright

from agent.protocol import format_call
from agent.service.api import build
from tests.agent.service.scripted import TAG, Scripted, png, service

pytestmark = pytest.mark.slow  # `make test-all` installs the browser

LONG = (
    f"# Trout\n\nThey swim, and their speed is $v = \\frac{{s}}{{t}}$.\n\n{TAG}\n\n| when | where |\n|---|---|\n"
    f"| spring | brook |\n\n{format_call('search', 'A second fish', {'query': 'fish'})}\n\nThen they sleep."
)
KEY = "0123456789abcdef"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    assert chromium, "the Debian package chromium is needed"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def agents() -> Scripted:
    return Scripted(LONG, pause_s=0.005)


@pytest.fixture
def url(tmp_path: Path, agents: Scripted, request: pytest.FixtureRequest) -> Iterator[str]:
    """The service over HTTP; `indirect` gives it keys."""
    config = uvicorn.Config(build(service(tmp_path, agents, getattr(request, "param", ""))), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Page]:
    """The page, on which nothing may go wrong unseen and nothing may come from elsewhere."""
    page = browser.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else wrong.append(r.url))
    page.goto(url)
    yield page
    page.close()
    assert not wrong


def write(page: Page, prompt: str = "A report on trout") -> None:
    page.get_by_label("What should the document be about?").fill(prompt)
    page.keyboard.press("Control+Enter")


def test_a_document_appears_with_its_pictures_tables_and_formulas(page: Page) -> None:
    write(page)
    expect(page.get_by_role("status")).to_have_text("Done.")
    document = page.get_by_role("article", name="Document")
    expect(document.get_by_role("img", name="A fish")).to_be_visible()
    assert document.locator("img").count() == 2 and document.locator("table, math").count() == 2
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth)")


def test_a_document_is_shown_while_it_is_written_and_can_be_stopped(page: Page, agents: Scripted) -> None:
    agents.pause_s = 0.2
    write(page)
    expect(page.get_by_text("They swim")).to_be_visible()
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("status")).to_have_text("Stopped.")
    deadline = time.monotonic() + 10
    while not agents.stopped:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    agents.pause_s = 0.0
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("status")).to_have_text("Done.")


def test_history_feedback_calls_and_files(page: Page, tmp_path: Path) -> None:
    write(page, "First")
    expect(page.get_by_role("status")).to_have_text("Done.")
    page.get_by_role("button", name="Good document").click()
    expect(page.get_by_role("status")).to_have_text("Thank you.")
    page.get_by_role("button", name="Calls").click()
    page.get_by_text("search: A fish (ok").click()
    expect(page.get_by_role("region", name="Calls").get_by_text("CC0").first).to_be_visible()
    for button, beginning in (("HTML", "<!DOCTYPE html>"), ("Markdown", "# Trout")):
        with page.expect_download() as download:
            page.get_by_role("button", name=button, exact=True).click()
        assert Path(download.value.path()).read_text().startswith(beginning)
    page.reload()
    page.get_by_role("button", name="History").click()
    page.get_by_role("button", name="First").click()
    expect(page.get_by_role("article").get_by_role("img", name="A fish")).to_be_visible()
    expect(page.get_by_role("button", name="Good document")).to_have_attribute("aria-pressed", "true")


def test_pictures_go_along_and_can_be_taken_back(page: Page, agents: Scripted) -> None:
    files: Any = [{"name": f"{c}.png", "mimeType": "image/png", "buffer": png(c)} for c in ("red", "blue")]
    page.get_by_label("Add pictures").set_input_files(files)
    page.get_by_role("button", name="Remove picture 1").click()
    write(page)
    expect(page.get_by_role("status")).to_have_text("Done.")
    assert [blob.data for blob in agents.asked[0].given] == [png("blue")]


def test_what_is_wrong_is_said(page: Page) -> None:
    write(page, "please refuse")
    expect(page.get_by_role("status")).to_contain_text("too long for the model")


@pytest.mark.parametrize("url", [f"alice:{KEY}"], indirect=True)
def test_a_service_with_keys_asks_for_one(page: Page) -> None:
    write(page)
    expect(page.get_by_role("status")).to_contain_text("needs `Authorization")
    page.get_by_label("API key").fill(KEY)
    page.get_by_role("button", name="Write").click()
    expect(page.get_by_role("status")).to_have_text("Done.")


def test_a_hostile_document_runs_nothing(page: Page, agents: Scripted) -> None:
    agents.text = "<script>window.bad=1</script> <img src=x onerror='window.bad=1'> [a](javascript:window.bad=1) end"
    write(page, "<img src=x onerror=window.bad=1>")
    expect(page.get_by_role("status")).to_have_text("Done.")
    page.get_by_role("button", name="History").click()
    assert page.evaluate("window.bad") is None and page.get_by_text("<script>window.bad=1").is_visible()


def test_an_exported_file_runs_nothing_and_needs_nothing(
    browser: Any, page: Page, agents: Scripted, tmp_path: Path
) -> None:
    agents.text = f"<script>window.bad=1</script> <img src=x onerror='window.bad=1'>\n\n{TAG}\n\n$x^2$ end"
    write(page, "</title><script>window.bad=1</script>")
    expect(page.get_by_role("status")).to_have_text("Done.")
    with page.expect_download() as download:
        page.get_by_role("button", name="HTML", exact=True).click()
    file = tmp_path / "document.html"
    download.value.save_as(file)
    asked: list[str] = []
    alone = browser.new_page()
    alone.on("request", lambda r: asked.append(r.url))
    alone.goto(f"file://{file}")
    expect(alone.get_by_text("window.bad=1").first).to_be_visible()
    assert alone.evaluate("window.bad") is None and alone.locator("script").count() == 0
    assert alone.evaluate("[...document.images].every(i => i.complete && i.naturalWidth)")
    assert [url for url in asked if not url.startswith("data:")] == [f"file://{file}"]
    alone.close()


def test_more_effort_is_asked_for_and_its_stages_are_listed(page: Page, agents: Scripted) -> None:
    page.get_by_label("Effort").select_option("best of 3")
    write(page)
    expect(page.get_by_role("status")).to_have_text("Done.")
    page.get_by_role("button", name="Calls").click()
    expect(page.get_by_text("candidates: 3 answers (20 tokens, 2 calls")).to_be_visible()
    assert agents.asked[0].scale == 3
    expect(page.get_by_label("improve the model")).to_be_hidden()


def test_everything_has_a_name_and_text_can_be_read_in_light_and_dark(page: Page) -> None:
    write(page)
    expect(page.get_by_role("status")).to_have_text("Done.")
    page.get_by_role("button", name="Good document").click()
    expect(page.get_by_role("status")).to_have_text("Thank you.")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate(WRONG) == []


#: Controls without a name, and texts whose contrast is below WCAG's 4.5.
WRONG = """() => {
  const named = (e) => e.ariaLabel || e.labels?.[0]?.textContent || e.textContent.trim();
  const nameless = [...document.querySelectorAll("button, input, select, textarea, a")].filter((e) => !named(e));
  const pen = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d",
    { willReadFrequently: true });
  const rgba = (colour) => {
    pen.clearRect(0, 0, 1, 1); pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => {
    const part = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  };
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const colour = rgba(getComputedStyle(e).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const seen = [...document.querySelectorAll("body *")].filter((e) => e.checkVisibility()
    && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()));
  const faint = seen.filter((e) => {
    const [a, b] = [light(rgba(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05) < 4.5;
  });
  return [...nameless, ...faint].map((e) => e.outerHTML.slice(0, 200));
}"""


def test_it_can_be_used_by_keyboard_alone_and_on_a_phone(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 700})
    names = []
    for _ in range(6):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert names == ["skip", "show-history", "prompt", "images", "scale", "write"]
    write(page)
    expect(page.get_by_role("status")).to_have_text("Done.")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
