"""The HTTP API in front of an agent that writes what it is told to."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from agent.service.api import build
from agent.service.core import Service
from agent.service.files import Files
from agent.service.keys import parse_keys
from replay.record import Blob
from tests.agent.service.scripted import TEXT, Scripted, png, service


def client(service: Service) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(build(service)), base_url="http://llmi")


def ask(service: Service, *requests: Any) -> list[httpx.Response]:
    """Requests, (method, path, JSON or None, headers), one after another."""

    async def go() -> list[httpx.Response]:
        async with client(service) as http:
            return [
                await http.request(method, path, json=body, headers=headers)
                for method, path, body, headers in [(*r, {}, {})[:4] if len(r) < 4 else r for r in requests]
            ]

    return asyncio.run(go())


def post(tmp_path: Path, body: Any, path: str = "/v1/documents", agents: Scripted | None = None) -> httpx.Response:
    return ask(service(tmp_path, agents or Scripted()), ("POST", path, body))[0]


def told(text: str) -> list[tuple[str, Any]]:
    events = [block.split("\n") for block in text.strip().split("\n\n")]
    return [(e[0].removeprefix("event: "), json.loads(e[1].removeprefix("data: "))) for e in events]


def test_a_document_has_its_text_its_calls_and_addresses_of_its_pictures(tmp_path: Path) -> None:
    here = service(tmp_path, Scripted())
    (made,) = ask(here, ("POST", "/v1/documents", {"prompt": "Fish?"}))
    row = made.json()
    assert made.status_code == 200 and row["text"] == TEXT and row["status"] == "done" and row["model"] == "tiny"
    assert row["calls"][0]["status"] == "ok" and row["usage"]["completion_tokens"] == 11
    (url,) = row["images"].values()
    assert url in row["markdown"] and "<imgen>" not in row["markdown"]
    picture, again, page = ask(
        here, ("GET", url), ("GET", f"/v1/documents/{row['id']}"), ("GET", f"/v1/documents/{row['id']}/page")
    )
    assert picture.content == png() and picture.headers["content-type"] == "image/png"
    assert again.json() == row and "data:image/png" in page.text


def test_a_document_is_kept_for_another_process(tmp_path: Path) -> None:
    (made,) = ask(service(tmp_path, Scripted()), ("POST", "/v1/documents", {"prompt": "Fish?"}))
    identity, url = made.json()["id"], next(iter(made.json()["images"].values()))
    again, picture = ask(service(tmp_path, Scripted()), ("GET", f"/v1/documents/{identity}"), ("GET", url))
    assert again.json() == made.json() and picture.content == png()


def test_a_stream_tells_of_text_calls_and_pictures_and_ends_with_the_document(tmp_path: Path) -> None:
    events = told(post(tmp_path, {"prompt": "Fish?", "stream": True}).text)
    kinds = [name for name, _ in events]
    assert kinds[0] == "begun" and kinds[-1] == "done" and kinds.index("call") < kinds.index("made")
    assert "".join(row["text"] for name, row in events if name == "text") == TEXT
    made = next(row for name, row in events if name == "made")
    assert made["urls"] == list(events[-1][1]["images"].values())


def test_a_document_in_the_background_is_fetched_later_and_can_be_followed(tmp_path: Path) -> None:
    async def go() -> None:
        async with client(service(tmp_path, Scripted(pause_s=0.01))) as http:
            first = await http.post("/v1/documents", json={"prompt": "Fish?", "background": True})
            assert first.status_code == 202 and first.json()["status"] == "writing"
            where = f"/v1/documents/{first.json()['id']}"
            events = told((await http.get(f"{where}/events")).text)
            assert events[-1][0] == "done" and (await http.get(where)).json() == events[-1][1]

    asyncio.run(go())


def test_a_cancelled_document_stops_and_is_gone(tmp_path: Path) -> None:
    async def go() -> None:
        agents = Scripted(pause_s=0.2)
        async with client(service(tmp_path, agents)) as http:
            first = await http.post("/v1/documents", json={"prompt": "Fish?", "background": True})
            await asyncio.sleep(0.1)
            where = f"/v1/documents/{first.json()['id']}"
            assert (await http.delete(where)).status_code == 204 and agents.stopped == 1
            assert (await http.get(where)).status_code == 404

    asyncio.run(go())


@pytest.mark.parametrize("lost_after", [[0], [3], [30], [80, 85], [100, 105]])
def test_a_document_whose_agent_is_lost_goes_on_and_is_told_once(tmp_path: Path, lost_after: list[int]) -> None:
    agents = Scripted(lost_after=lost_after)
    events = told(post(tmp_path, {"prompt": "Fish?", "stream": True}, agents=agents).text)
    assert "".join(row["text"] for name, row in events if name == "text") == TEXT
    kinds = [name for name, _ in events]
    assert kinds.count("call") == kinds.count("made") == 1 and kinds[-1] == "done"
    assert len(agents.asked) == 1 + len(lost_after)


def test_an_agent_that_is_always_lost_is_said_so(tmp_path: Path) -> None:
    answer = post(tmp_path, {"prompt": "Fish?"}, agents=Scripted(lost_after=[0, 0, 0]))
    assert answer.status_code == 503 and "lost 3 times: its process died" in answer.json()["error"]["message"]


BAD = [
    ({}, 422, "prompt: Field required"),
    ({"prompt": " "}, 422, "prompt: there is nothing to answer"),
    ({"prompt": "x", "promt": 1}, 422, "promt: Extra inputs"),
    ({"prompt": "x", "seed": -1}, 422, "seed"),
    ({"prompt": "x", "images": ["*"]}, 422, "images.0: neither"),
    ({"prompt": "x", "images": ["data:image/png;base64,AAAA"]}, 422, "images.0: no picture"),
    ({"prompt": "x", "images": ["http://10.0.0.1/a.png"]}, 422, "private address"),
    ({"prompt": "x", "images": ["AAAA"] * 17}, 422, "at most 16"),
    ({"prompt": "x", "model": "gpt"}, 404, "there is no model 'gpt'"),
    ({"prompt": "please refuse"}, 422, "too long for the model"),
    ({"prompt": "x" * (1 << 20)}, 413, "larger than"),
]


@pytest.mark.parametrize(("body", "status", "said"), BAD)
def test_a_bad_request_says_what_is_wrong(tmp_path: Path, body: Any, status: int, said: str) -> None:
    answer = post(tmp_path, body)
    assert answer.status_code == status and said in answer.json()["error"]["message"]


def test_a_body_without_a_length_is_measured_as_it_comes(tmp_path: Path) -> None:
    async def go() -> httpx.Response:
        async def body() -> AsyncIterator[bytes]:
            for _ in range(40):
                yield b"x" * 50_000

        async with client(service(tmp_path, Scripted())) as http:
            return await http.post("/v1/documents", content=body(), headers={"content-type": "application/json"})

    assert asyncio.run(go()).status_code == 413


@pytest.mark.parametrize("body", [b"{", b'{"prompt": "half \\ud83d"}', b"\xff", b"[]", b"null"])
def test_what_is_no_json_object_of_whole_characters_is_refused(tmp_path: Path, body: bytes) -> None:
    async def go() -> httpx.Response:
        async with client(service(tmp_path, Scripted())) as http:
            return await http.post("/v1/documents", content=body, headers={"content-type": "application/json"})

    assert asyncio.run(go()).status_code in (400, 422)


KEYS = "alice:0123456789abcdef,bob:fedcba9876543210"
ALICE, BOB = ({"Authorization": f"Bearer {pair.split(':')[1]}"} for pair in KEYS.split(","))


def test_a_key_is_needed_and_its_documents_are_its_own(tmp_path: Path) -> None:
    here = service(tmp_path, Scripted(), KEYS)
    body = {"prompt": "Fish?"}
    none, wrong, made = ask(
        here,
        ("POST", "/v1/documents", body, {}),
        ("POST", "/v1/documents", body, {"Authorization": "Bearer 0123456789abcdeg"}),
        ("POST", "/v1/documents", body, ALICE),
    )
    assert none.status_code == wrong.status_code == 401 and made.status_code == 200
    where = f"/v1/documents/{made.json()['id']}"
    hers, his, his_end = ask(here, ("GET", where, None, ALICE), ("GET", where, None, BOB), ("DELETE", where, None, BOB))
    assert [r.status_code for r in (hers, his, his_end)] == [200, 404, 404]


def test_limits_are_per_key_and_say_when_to_come_back(tmp_path: Path) -> None:
    here = service(tmp_path, Scripted(), KEYS, requests_per_minute=2)
    answers = ask(here, *[("GET", "/v1/models", None, ALICE)] * 3, ("GET", "/v1/models", None, BOB))
    assert [a.status_code for a in answers] == [200, 200, 429, 200]
    assert 1 <= int(answers[2].headers["retry-after"]) <= 60


def test_only_so_many_documents_of_a_key_are_written_at_once(tmp_path: Path) -> None:
    async def go() -> list[int]:
        async with client(service(tmp_path, Scripted(pause_s=0.01), documents_at_once=2)) as http:
            body = {"prompt": "Fish?"}
            answers = await asyncio.gather(*(http.post("/v1/documents", json=body) for _ in range(4)))
            late = await http.post("/v1/documents", json=body)
            return [a.status_code for a in answers] + [late.status_code]

    assert sorted(asyncio.run(go())) == [200, 200, 200, 429, 429]


@pytest.mark.parametrize("text", ["x", "a:short", "a:0123456789abcdef,a:fedcba9876543210", ":0123456789abcdef"])
def test_keys_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="NAME:KEY"):
        parse_keys(text)


def test_a_picture_has_a_name_that_its_content_does_not_tell(tmp_path: Path) -> None:
    blob = Blob(png())
    one, other = Files(str(tmp_path / "a"), 60).put_picture(blob), Files(str(tmp_path / "b"), 60).put_picture(blob)
    assert one != other and blob.sha256 not in one and Files(str(tmp_path / "a"), 60).put_picture(blob) == one


def test_what_is_old_is_swept(tmp_path: Path) -> None:
    files = Files(str(tmp_path), -2 * 86400.0)
    name = files.put_picture(Blob(png()))
    files.put_document("0" * 32, {}, {"owner": "x"})
    files.sweep()
    assert files.picture(name) is None and files.document("0" * 32) is None


@pytest.mark.parametrize("name", ["../secret", "x.png", "secret", "%2e%2e%2fsecret"])
def test_nothing_but_pictures_is_served_as_one(tmp_path: Path, name: str) -> None:
    assert ask(service(tmp_path, Scripted()), ("GET", f"/v1/images/{name}"))[0].status_code == 404


def test_health_and_readiness(tmp_path: Path) -> None:
    agents = Scripted()
    here = service(tmp_path, agents)
    assert [r.status_code for r in ask(here, ("GET", "/healthz"), ("GET", "/readyz"))] == [200, 200]
    agents.is_ready = False
    assert [r.status_code for r in ask(here, ("GET", "/healthz"), ("GET", "/readyz"))] == [200, 503]


def test_a_request_has_an_id_and_a_line_in_the_audit_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "llmi.audit")
    body = {"prompt": "a secret wish"}
    mine, odd = ask(
        service(tmp_path, Scripted(), KEYS),
        ("POST", "/v1/documents", body, {**ALICE, "X-Request-ID": "mine-1"}),
        ("POST", "/v1/documents", body, {**ALICE, "X-Request-ID": "a b"}),
    )
    assert mine.headers["x-request-id"] == "mine-1" and odd.headers["x-request-id"] != "a b"
    row = json.loads(caplog.records[0].message)
    assert row["request"] == "mine-1" and row["key"] == "alice" and row["document"] == mine.json()["id"]
    assert "secret wish" not in caplog.text and "0123456789abcdef" not in caplog.text


def test_the_real_openai_client_is_answered_whole_and_in_a_stream(tmp_path: Path) -> None:
    async def go() -> None:
        here = service(tmp_path, Scripted(), KEYS)
        async with client(here) as http:
            ai = openai.AsyncOpenAI(base_url="http://llmi/v1", api_key="0123456789abcdef", http_client=http)  # type: ignore[arg-type]
            url = f"data:image/png;base64,{base64.b64encode(png('blue')).decode()}"
            content: Any = [{"type": "text", "text": "Fish?"}, {"type": "image_url", "image_url": {"url": url}}]
            messages: Any = [{"role": "system", "content": "Be short."}, {"role": "user", "content": content}]
            whole = await ai.chat.completions.create(model="llmi", messages=messages, seed=1)
            text = whole.choices[0].message.content or ""
            assert "They swim." in text and "![A fish](http://llmi/v1/images/" in text and whole.usage
            assert whole.usage.total_tokens == 18 and whole.choices[0].finish_reason == "stop"
            assert whole.choices[0].message.images[0]["image_url"]["url"] in text  # type: ignore[attr-defined]
            options: Any = {"include_usage": True}
            stream = await ai.chat.completions.create(
                model="tiny", messages=messages, stream=True, stream_options=options
            )
            chunks = [chunk async for chunk in stream]
            streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
            assert streamed.split() == text.split() and chunks[-1].usage and chunks[-1].usage.total_tokens == 18
            assert {m.id async for m in ai.models.list()} == {"tiny", "other"}
            with pytest.raises(openai.NotFoundError, match="there is no model"):
                await ai.chat.completions.create(model="gpt-9", messages=messages)

    asyncio.run(go())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "the last one must be the user's"),
        ({"messages": [{"role": "user", "content": " "}]}, "with words"),
        ({"n": 2}, "n: "),
        ({"tools": [{}]}, "tools"),
        ({"temperature": 9}, "temperature"),
    ],
)
def test_a_chat_that_cannot_be_answered_says_why(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    body = {"model": "llmi", "messages": [{"role": "user", "content": "x"}]} | change
    answer = post(tmp_path, body, "/v1/chat/completions")
    assert answer.status_code == 422 and said in answer.json()["error"]["message"]


def test_a_document_grows_as_html_with_places_for_its_pictures(tmp_path: Path) -> None:
    events = told(post(tmp_path, {"prompt": "Fish?", "stream": True, "html": True}).text)
    states = [row["html"] for name, row in events if name == "html"]
    assert any('class="pending"' in html for html in states) and "<img" in states[-1]
    assert not any("imgen" in html for html in states) and events[-1][1]["html"] == states[-1]


def test_the_page_of_a_document_outlives_the_process(tmp_path: Path) -> None:
    here = service(tmp_path, Scripted())
    (made,) = ask(here, ("POST", "/v1/documents", {"prompt": "Fish?"}))
    where = f"/v1/documents/{made.json()['id']}/page"
    assert ask(here, ("GET", where))[0].text == ask(service(tmp_path, Scripted()), ("GET", where))[0].text


def test_feedback_is_kept_with_its_document(tmp_path: Path) -> None:
    here = service(tmp_path, Scripted())
    (made,) = ask(here, ("POST", "/v1/documents", {"prompt": "Fish?"}))
    where = f"/v1/documents/{made.json()['id']}"
    said, bad = ask(here, *[("POST", f"{where}/feedback", {"thumb": thumb}) for thumb in ("up", "maybe")])
    assert said.status_code == 204 and bad.status_code == 422
    for place in (here, service(tmp_path, Scripted())):
        assert ask(place, ("GET", where))[0].json()["feedback"]["thumb"] == "up"


def test_a_hostile_document_brings_no_markup_of_its_own(tmp_path: Path) -> None:
    text = "<script>alert(1)</script> <img src=x onerror=alert(1)> [a](javascript:alert(1)) $\\text{<script>}$"
    answer = post(tmp_path, {"prompt": "<script>alert(2)</script>"}, agents=Scripted(text)).json()
    assert not any(bad in answer["html"] for bad in ("<script", "<img", 'href="javascript'))


def test_the_page_and_its_files_come_from_here_alone(tmp_path: Path) -> None:
    page, css, base, js, other = ask(
        service(tmp_path, Scripted()),
        *[("GET", path) for path in ("/", "/page/page.css", "/page/document.css", "/page/page.js", "/page/api.py")],
    )
    assert [r.status_code for r in (page, css, base, js, other)] == [200, 200, 200, 200, 404]
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not any("http://" in r.text or "https://" in r.text for r in (page, css, base, js))


def test_what_test_time_scaling_did_is_told_and_kept(tmp_path: Path) -> None:
    events = told(post(tmp_path, {"prompt": "Fish?", "stream": True, "scale": 3}).text)
    assert ("stage", "candidates") in [(name, row.get("name")) for name, row in events]
    assert events[-1][1]["scaling"][0]["changed"] == ["3 answers"] and events[-1][1]["scaling"][0]["tokens"] == 20
    assert post(tmp_path, {"prompt": "Fish?", "scale": 99}).status_code == 422


def test_nothing_is_kept_to_be_trained_on_unless_service_and_user_allow_it(tmp_path: Path) -> None:
    body = {"prompt": "Fish?", "learn": True}
    refused = ask(service(tmp_path / "a", Scripted()), ("POST", "/v1/documents", body))[0]
    assert refused.status_code == 422 and "keeps nothing to be trained on" in refused.json()["error"]["message"]
    here = service(tmp_path / "b", Scripted(), learn=True)
    allowed, private = ask(here, *[("POST", "/v1/documents", body | {"learn": yes}) for yes in (True, False)])
    hidden: dict[str, Any] = {row["id"]: kept.get("learn") for row, kept in here.files.documents()}
    assert hidden[allowed.json()["id"]]["sampled"]["token_ids"] == [3] * 11 and hidden[private.json()["id"]] is None
    assert "token_ids" not in allowed.text and "owner" not in allowed.text


def test_two_hundred_clients_at_once_are_answered_or_told_to_come_back(tmp_path: Path) -> None:
    async def go() -> list[httpx.Response]:
        here = service(tmp_path, Scripted(pause_s=0.001), documents_at_once=32)
        async with client(here) as http:
            return await asyncio.gather(
                *(http.post("/v1/documents", json={"prompt": f"Fish {i}?", "stream": i % 2 == 0}) for i in range(200))
            )

    answers = asyncio.run(go())
    assert [a.status_code for a in answers].count(200) >= 32
    for answer in answers:
        assert answer.status_code == 200 or (answer.status_code == 429 and int(answer.headers["retry-after"]) > 0)


def test_a_document_that_takes_too_long_ends_at_its_deadline(tmp_path: Path) -> None:
    answer = post(tmp_path, {"prompt": "Fish?", "stream": True}, agents=Scripted(pause_s=1.0))
    name, row = told(answer.text)[-1]
    assert name == "failed" and row["reason"] == "the document was not done in 5 s"
