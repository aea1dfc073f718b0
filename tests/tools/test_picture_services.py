"""The OpenAI images API and Ark, against a server on this machine that speaks both and misbehaves on purpose."""

import base64
import io
import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from replay.record import Blob
from tests.tools.picture_service import (
    PictureService,
    body,
    drip,
    drip_headers,
    elsewhere,
    encoded,
    error,
    flood,
    half,
    hang_up,
    png,
    silence,
)
from tools import remote
from tools.ark import ArkTool
from tools.base import CallFailed, load
from tools.download import Downloader
from tools.fetch import Fetcher
from tools.images_api import ImagesApiTool
from tools.remote import ServiceFailed
from tools.service_tool import ServiceTool

KEY = "sk-a-very-secret-key"
CALL = {"prompt": "a red house"}
EDIT = {"prompt": "make it blue", "img_index": [0, 1]}
TOOLS: list[type[ServiceTool]] = [ImagesApiTool, ArkTool]


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[PictureService]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("ARK_API_KEY", KEY)
    server = PictureService()
    yield server
    server.shutdown()
    server.server_close()


def tool(service: PictureService, kind: type[ServiceTool] = ImagesApiTool, **options: Any) -> ServiceTool:
    return kind(**{"model": "painter-1", "url": service.url, "timeout_s": 10.0, **options})


def picture(blob: Blob) -> Image.Image:
    return Image.open(io.BytesIO(blob.data))


@pytest.mark.parametrize("kind", TOOLS)
def test_words_become_a_picture_and_provenance_says_whose(service, kind):
    result = tool(service, kind, size="1024x1024", extra={"quality": "low"}).run(CALL)
    assert picture(result.images[0]).size == (48, 32) and b"secret" not in result.images[0].data
    assert result.provenance == {"maker": "painter-1", "model": "painter-1", "source": "127.0.0.1"}
    (seen,) = service.seen
    assert seen["path"] == "/v1/images/generations" and seen["key"] == f"Bearer {KEY}"
    asked = {"model": "painter-1", "prompt": "a red house", "size": "1024x1024", "quality": "low"}
    assert asked.items() <= seen.items() and seen["response_format"] == "b64_json"


def test_gpt_image_is_not_told_a_response_format_and_the_config_takes_fields_away(service):
    tool(service, model="gpt-image-1").run(CALL)
    tool(service, extra={"response_format": None, "n": None}).run(CALL)
    assert all("response_format" not in seen for seen in service.seen) and "n" not in service.seen[1]


@pytest.mark.parametrize("given", [1, 2])
def test_pictures_are_edited_by_openais_form_and_by_arks_json(service, given):
    images = [Blob(png()), Blob(png((20, 20)))][:given]
    for kind in TOOLS:
        result = tool(service, kind, edits=True, references=2).run(EDIT, images)
        assert result.provenance["of"] == [image.sha256 for image in images]
    form, ark = service.seen
    files = form["image" if given == 1 else "image[]"]
    assert form["path"] == "/v1/images/edits" and form["prompt"] == "make it blue" and form["n"] == "1"
    links = ark["image"] if given == 2 else [ark["image"]]
    sent = [base64.b64decode(link.removeprefix("data:image/png;base64,")) for link in links]
    assert ark["path"] == "/v1/images/generations" and sent == files and len(files) == given
    assert [Image.open(io.BytesIO(f)).size for f in files] == [(48, 32), (20, 20)][:given]
    assert all(b"secret" not in f for f in files)


@pytest.mark.parametrize("kind", TOOLS)
@pytest.mark.parametrize(
    "behaviour",
    [
        error(400, "moderation_blocked", "Your request was rejected by the safety system."),
        error(400, "content_policy_violation", "It may violate our policies: rejected."),
        error(400, "InputTextSensitiveContentDetected", "The request was rejected for its text."),
        error(400, "string_above_max_length", "String too long, rejected.", "prompt"),
        error(400, "invalid_image_file", "Rejected: invalid.", "image[0]"),
        error(400, "InvalidParameter", "The parameter `prompt` was rejected."),
        error(413, "", "Rejected: too large."),
        lambda h: h.answer(
            200, {"data": [{"error": {"code": "OutputImageSensitiveContentDetected", "message": "rejected"}}]}
        ),
    ],
)
def test_what_the_service_refuses_of_the_call_is_the_calls_fault_with_the_services_reason(service, kind, behaviour):
    service.behaviours = [behaviour]
    asking = tool(service, kind)
    with pytest.raises(CallFailed, match=r"(?i)rejected"):
        asking.run(CALL)
    assert len(service.seen) == 1 and asking.run(CALL).images


INFRASTRUCTURE = {
    "no key": (error(401, "invalid_api_key", f"Incorrect API key provided: {KEY}"), "OPENAI_API_KEY"),
    "no right": (error(403, "", f"The organization of {KEY} must be verified"), r"403.*OPENAI_API_KEY"),
    "no model": (error(404, "model_not_found", "no model"), "404.*`model` and `url`"),
    "no money": (error(429, "insufficient_quota", "You exceeded your quota"), "wants to be paid"),
    "limit": (error(400, "billing_hard_limit_reached", "limit"), "wants to be paid"),
    "wrong size": (error(400, "invalid_value", "Invalid value: '7x7'", "size"), "`size` and `extra`"),
    "overloaded": (error(500, "server_error", "The server had an error"), "500"),
    "gateway": (lambda h: h.answer(502, b"<html>Bad gateway</html>"), "502"),
    "html": (body(b"<html>welcome</html>"), "without a picture"),
    "nothing": (body(b"{}"), "without a picture"),
    "an empty list": (body(b'{"data": []}'), "without a picture"),
    "a number": (body(b"7"), "without a picture"),
    "null": (body(b'{"data": [{"b64_json": null}]}'), "without a picture"),
    "deep": (body(b"[" * 100_000), "without a picture"),
    "a link inside": (body(b'{"data": [{"url": "http://169.254.169.254/"}]}'), "link that cannot be followed"),
    "no link": (body(b'{"data": [{"url": "file:///etc/passwd"}]}'), "link that cannot be followed"),
    "broken base64": (lambda h: h.picture("%%%not base64"), "without a picture"),
    "cut base64": (lambda h: h.picture(base64.b64encode(png()).decode()[:-3]), "without a picture"),
    "half a picture": (encoded(png()[: len(png()) // 2]), "cannot be read"),
    "no picture": (encoded(b"GIF89a, or so"), "cannot be read"),
    "a bomb": (encoded(png((6000, 6000))), "25000000"),
    "half a body": (half, "broke off"),
    "hung up": (hang_up, "broke off"),
    "elsewhere": (elsewhere, "307"),
    "silence": (silence, "did not answer in 1 s"),
    "drip": (drip, "did not answer in 1 s"),
    "dripping headers": (drip_headers, "did not answer in 1 s"),
}


@pytest.mark.parametrize("what", INFRASTRUCTURE)
def test_whatever_else_goes_wrong_is_infrastructure_and_costs_that_call_only(service, what):
    service.behaviours = [INFRASTRUCTURE[what][0]]
    asking = tool(service, timeout_s=1.0 if "1 s" in INFRASTRUCTURE[what][1] else 10.0)
    started = time.monotonic()
    with pytest.raises(ServiceFailed, match=INFRASTRUCTURE[what][1]) as failed:
        asking.run(CALL)
    assert KEY not in str(failed.value) and time.monotonic() - started < 4
    assert len(service.seen) == 1 and asking.run(CALL).images


def test_a_link_is_followed_by_the_downloader_and_gives_pixels_only(service):
    asking = tool(service)
    asking._service.downloader = Downloader(Fetcher(allowed=lambda _: True, ports=[service.server_port]))
    service.behaviours = [body(f'{{"data": [{{"url": "{service.url}/made.png"}}]}}'.encode())]
    made = asking.run(CALL).images[0]
    assert picture(made).size == (48, 32) and b"secret" not in made.data
    assert service.seen[-1] == {"path": "/v1/made.png", "key": None}


def test_a_flood_is_cut_off(service, monkeypatch):
    monkeypatch.setattr(remote, "MOST_BYTES", 2**22)
    service.behaviours = [flood]
    with pytest.raises(ServiceFailed, match="more than 4194304 bytes"):
        tool(service).run(CALL)


def test_a_service_that_is_down_is_named(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(ServiceFailed, match=f"images-api at {url} cannot be reached"):
        ImagesApiTool("painter-1", url=url).run(CALL)


def test_an_overloaded_service_is_asked_again_within_the_deadline_only(service):
    service.behaviours = [error(429, "rate_limit_exceeded", "slow down", None, Retry_After="0.2")] * 2
    assert tool(service).run(CALL).images and len(service.seen) == 3
    service.behaviours = [error(429, "rate_limit_exceeded", "slow down", None, Retry_After="60")]
    with pytest.raises(ServiceFailed, match="429: slow down"):
        tool(service).run(CALL)


def test_calls_run_side_by_side_and_a_slow_one_holds_up_no_other(service):
    asking = tool(service, timeout_s=3.0)
    service.behaviours = [silence]
    outcomes: list[Any] = []

    def call() -> None:
        try:
            outcomes.append(asking.run(CALL))
        except ServiceFailed as failed:
            outcomes.append(failed)

    threads = [threading.Thread(target=call) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert [isinstance(outcome, ServiceFailed) for outcome in outcomes] == [False] * 5 + [True]


def test_the_key_is_never_logged(service, caplog):
    with caplog.at_level(logging.DEBUG):
        tool(service).run(CALL)
        service.behaviours = [INFRASTRUCTURE["no key"][0]]
        with pytest.raises(ServiceFailed):
            tool(service).run(CALL)
    assert KEY not in caplog.text


def test_a_key_is_sent_over_https_and_to_this_machine_only(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    keys = [ImagesApiTool("m", url=u)._service._key for u in ("http://example.org/v1", "https://example.org/v1")]
    assert keys == ["", KEY]


@pytest.mark.parametrize(
    ("options", "key", "reason"),
    [
        ({}, None, "set the environment variable OPENAI_API_KEY"),
        ({}, "two\nlines", "characters that no key has"),
        ({"url": "ftp://x"}, KEY, "must be as"),
        ({"url": "https://me:pass@x/v1"}, KEY, "without a user"),
        ({"timeout_s": 0}, KEY, "timeout_s"),
        ({"dollars": -1}, KEY, "dollars"),
        ({"references": 2}, KEY, "need edits: true"),
    ],
)
def test_a_config_that_cannot_work_is_refused_at_the_start(monkeypatch, options, key, reason):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    if key:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match=reason) as refused:
        ImagesApiTool("painter-1", **options)
    assert not key or key not in str(refused.value)


@pytest.mark.parametrize("kind", TOOLS)
def test_the_spec_is_that_of_drawing_or_of_editing_one_or_several(kind):
    assert kind.describe(model="m").params == {"prompt": str}
    assert kind.describe(model="m", edits=True).params == {"img_index": int, "prompt": str}
    several = kind.describe(model="m", edits=True, references=3)
    assert several.params == {"img_index": list[int], "prompt": str} and several.image_params == ("img_index",)


def test_calls_that_ask_for_nothing_or_point_at_nothing_never_reach_the_service(service):
    for params, images in (({"prompt": " ", "img_index": 0}, [Blob(png())]), (EDIT, []), (EDIT, [Blob(b"x")])):
        with pytest.raises(CallFailed):
            tool(service, edits=True).run(params, images)
    assert not service.seen


def test_a_call_costs_what_the_config_says_and_a_closed_tool_asks_no_more(service):
    asking = tool(service, dollars=0.04)
    assert asking.cost(CALL) == 0.04
    asking.close()
    with pytest.raises(ServiceFailed, match="is closed"):
        asking.run(CALL)
    assert not service.seen


def test_the_tools_are_found_by_their_names():
    assert load("images-api") is ImagesApiTool and load("ark") is ArkTool
