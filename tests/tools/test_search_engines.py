"""Search engines by their APIs, against a real server that speaks them and misbehaves."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from PIL import Image

from tests.security.web_attacks import downloader
from tests.tools.search_service import BRIDGE, FOG, PATHS, Handler, Misbehaviour, SearchService
from tools.base import CallFailed
from tools.fetch import public
from tools.hits import Hit, ranked
from tools.remote import ServiceFailed
from tools.search import SearchTool
from tools.throttle import Busy, Throttle, asked_pause
from tools.web_search import text

ENGINES = list(PATHS)
KEYS = {"brave": "BRAVE_API_KEY", "serpapi": "SERPAPI_API_KEY"}
SECRET = "k-5f0e8a2b"
QUERY = {"query": "a photo of the Golden Gate Bridge"}


@pytest.fixture
def service() -> Iterator[SearchService]:
    with SearchService() as service:
        yield service
        service.shutdown()


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in KEYS.values():
        monkeypatch.setenv(variable, SECRET)


def tool(service: SearchService, engine: str, **options: Any) -> SearchTool:
    """A tool that may take pictures from this machine, within a few seconds."""
    given: dict[str, Any] = {"timeout_s": 4.0, "quota": "100/second", "downloader": downloader()} | options
    return SearchTool(engine, url=service.url(engine), **given)


def colour(data: bytes) -> Any:
    return Image.open(io.BytesIO(data)).convert("RGB").getpixel((5, 5))


@pytest.mark.parametrize("engine", ENGINES)
def test_the_relevant_picture_is_taken_though_it_came_second(service: SearchService, engine: str) -> None:
    result = tool(service, engine).run(QUERY)
    told = result.provenance
    assert told["title"] == "Golden Gate Bridge" and told["maker"] == engine
    assert colour(result.images[0].data) == (255, 165, 0)
    assert told["url"].startswith(service.url("searxng")) and told["page"].startswith("https://")
    assert datetime.now(UTC) - datetime.fromisoformat(told["fetched"]) < timedelta(minutes=1)
    assert told["sha256"] == result.images[0].sha256 and told["source"] and told["licence"]
    assert json.loads(json.dumps(told)) == told


def test_commons_tells_author_licence_and_a_caption_without_markup(service: SearchService) -> None:
    told = tool(service, "commons").run(QUERY).provenance
    assert (told["author"], told["licence"], told["source"]) == ("Ann", "CC BY-SA 4.0", "Wikimedia Commons")
    assert told["caption"] == "Golden Gate Bridge, seen & photographed"


def test_an_engine_that_names_no_licence_is_told_so(service: SearchService) -> None:
    assert tool(service, "brave").run(QUERY).provenance["licence"] == "unknown"


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_found_is_the_calls_own_failure(service: SearchService, engine: str) -> None:
    service.known = []
    with pytest.raises(CallFailed, match="no picture found for 'a photo of the Golden Gate Bridge': ask in other"):
        tool(service, engine).run(QUERY)


def html(handler: Handler) -> None:
    handler.answer(200, b"<!doctype html><title>Just a moment...</title>", Content_Type="text/html")


def half(handler: Handler) -> None:
    handler.answer(200, b'{"results": [{"title": "Go')


def cut_off(handler: Handler) -> None:
    handler.answer(200, b'{"results": [', Content_Length="9000")
    handler.close_connection = True


def other_json(handler: Handler) -> None:
    handler.answer(200, ["results", 7])


def odd_entries(handler: Handler) -> None:
    handler.answer(200, {key: [None, 5, "x"] for key in ("results", "images_results", "query")})


def nested(handler: Handler) -> None:
    handler.answer(200, b"[" * 200_000)


def slow(handler: Handler) -> None:
    time.sleep(2.5)
    handler.good()


def drip(handler: Handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(60):
        handler.wfile.write(b" ")
        time.sleep(0.05)


def flood(handler: Handler) -> None:
    handler.answer(200, b" " * (5 << 20))


def error(handler: Handler) -> None:
    handler.answer(500, {"error": "oops"})


def elsewhere(handler: Handler) -> None:
    handler.answer(302, b"", Location="http://169.254.169.254/latest/meta-data/")


def silent(handler: Handler) -> None:
    handler.close_connection = True


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "misbehaviour",
    [html, half, cut_off, other_json, odd_entries, nested, drip, flood, error, elsewhere, silent],
    ids=lambda m: m.__name__,
)
def test_an_engine_that_misbehaves_is_infrastructure_and_the_next_call_works(
    service: SearchService, engine: str, misbehaviour: Misbehaviour
) -> None:
    searching = tool(service, engine, timeout_s=0.5)
    service.behaviours = [misbehaviour]
    started = time.monotonic()
    with pytest.raises(ServiceFailed, match=rf"^search: {engine} at 127\.0\.0\.1 ") as failed:
        searching.run(QUERY)
    assert time.monotonic() - started < 3 and SECRET not in str(failed.value) and len(str(failed.value)) < 300
    assert searching.run(QUERY).images


def test_a_slow_engine_is_given_up_in_time(service: SearchService) -> None:
    service.behaviours = [slow]
    with pytest.raises(ServiceFailed, match="no complete answer in time"):
        tool(service, "brave", timeout_s=0.5).run(QUERY)


def test_an_engine_that_is_down_is_infrastructure(service: SearchService) -> None:
    searching = tool(service, "searxng")
    service.shutdown()
    service.server_close()
    with pytest.raises(ServiceFailed, match=r"searxng at 127\.0\.0\.1 did not answer: no connection"):
        searching.run(QUERY)


def refuses(status: int, **headers: str) -> Misbehaviour:
    return lambda handler: handler.answer(status, {"error": "too many requests"}, **headers)


@pytest.mark.parametrize(("engine", "status"), [(engine, 429) for engine in ENGINES] + [("searxng", 503)])
def test_an_engine_that_has_had_enough_is_asked_again_when_it_says(
    service: SearchService, engine: str, status: int
) -> None:
    service.behaviours = [refuses(status, Retry_After="0.5")]
    started = time.monotonic()
    assert tool(service, engine).run(QUERY).images
    assert time.monotonic() - started >= 0.5 and len(service.searches()) == 2


def test_an_engine_that_wants_to_be_left_alone_longer_is_not_asked_by_anyone(service: SearchService) -> None:
    service.behaviours = [refuses(429, Retry_After="600")]
    searching = tool(service, "searxng")
    started = time.monotonic()
    for _ in range(3):
        with pytest.raises(ServiceFailed, match=r"may not be asked for another (600|599) s"):
            searching.run(QUERY)
    assert time.monotonic() - started < 2 and len(service.searches()) == 1


def test_commons_that_lags_is_left_alone(service: SearchService) -> None:
    lag = {"error": {"code": "maxlag", "info": "Waiting for a database"}}
    service.behaviours = [lambda handler: handler.answer(200, lag, Retry_After="1")]
    assert tool(service, "commons").run(QUERY).images
    service.behaviours = [lambda handler: handler.answer(200, {"error": {"code": "badvalue", "info": "no"}})]
    with pytest.raises(ServiceFailed, match="the error 'badvalue'"):
        tool(service, "commons").run(QUERY)


def test_braves_spent_month_is_waited_for(service: SearchService) -> None:
    spent = {"X_RateLimit_Remaining": "1, 0", "X_RateLimit_Reset": "1, 1419704"}
    service.behaviours = [refuses(429, **spent)]
    with pytest.raises(ServiceFailed, match="another 3600 s: its quota is used up"):
        tool(service, "brave").run(QUERY)


def test_searxng_whose_engines_are_silent_has_not_found_nothing(service: SearchService) -> None:
    silence = {"results": [], "unresponsive_engines": [["google images", "timeout"], ["bing images", "CAPTCHA"]]}
    service.behaviours = [lambda handler: handler.answer(200, silence)]
    with pytest.raises(ServiceFailed, match=r"no answer from its engines \(2 of them"):
        tool(service, "searxng").run(QUERY)


def test_a_key_that_is_refused_is_named_and_not_told(service: SearchService) -> None:
    for engine, variable in KEYS.items():
        service.behaviours = [refuses(401)]
        with pytest.raises(ServiceFailed, match=f"see the key in {variable}") as failed:
            tool(service, engine).run(QUERY)
        assert SECRET not in str(failed.value)
    service.behaviours = [refuses(403)]
    with pytest.raises(ServiceFailed, match="may not offer JSON"):
        tool(service, "searxng").run(QUERY)


def test_the_key_goes_to_the_engine_alone(service: SearchService) -> None:
    for engine in ENGINES:
        told = tool(service, engine).run(QUERY).provenance
        assert SECRET not in json.dumps(told)
    sent = [a for a in service.searches() if SECRET in json.dumps(a)]
    assert [a["path"] for a in sent] == ["/images/search", "/search.json"]
    assert not [a for a in service.seen if a["path"].startswith("/pictures/") and SECRET in json.dumps(a)]


def test_a_missing_key_and_a_key_in_the_clear_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="the url of brave must be https, as its key is sent there"):
        SearchTool("brave", url="http://search.example.org")
    monkeypatch.delenv("BRAVE_API_KEY")
    with pytest.raises(ValueError, match="set the environment variable BRAVE_API_KEY"):
        SearchTool("brave")
    with pytest.raises(ValueError, match="searxng needs its `url`"):
        SearchTool("searxng")
    with pytest.raises(ValueError, match="must read https://HOST"):
        SearchTool("commons", url="ftp://example.org")


def test_the_next_candidate_is_taken_when_one_is_refused(service: SearchService) -> None:
    service.known = [BRIDGE | {"colour": bad} for bad in ("gone", "page", "down")] + [BRIDGE, FOG]
    for engine in ENGINES:
        result = tool(service, engine).run(QUERY)
        assert result.provenance["title"] == "Golden Gate Bridge" and colour(result.images[0].data) == (255, 165, 0)


def test_links_that_lead_to_nothing_are_the_calls_failure_and_a_dead_net_is_not(service: SearchService) -> None:
    service.known = [BRIDGE | {"colour": "gone"}, BRIDGE | {"colour": "down"}]
    with pytest.raises(CallFailed, match=r"none of the 2 pictures found for .* could be taken; of the last: "):
        tool(service, "brave").run(QUERY)
    service.known = [BRIDGE | {"colour": "down"}]
    with pytest.raises(ServiceFailed, match="none of the 1 pictures"):
        tool(service, "brave").run(QUERY)


def test_links_to_private_addresses_are_not_followed(service: SearchService) -> None:
    with pytest.raises(CallFailed, match=r"the address of 127\.0\.0\.1 is not on the public internet"):
        SearchTool("searxng", url=service.url("searxng"), downloader=downloader(allowed=public)).run(QUERY)
    assert all(a["path"] == "/search" for a in service.seen)


def test_links_that_are_no_links_are_left_out(service: SearchService) -> None:
    links = ["data:image/png;base64,AAAA", "", None, 7, "javascript:alert(1)", "file:///etc/passwd"]
    results = [{"url": "javascript:alert(1)", "title": "Golden Gate Bridge", "img_src": link} for link in links]
    service.behaviours = [lambda handler: handler.answer(200, {"results": results})]
    with pytest.raises(CallFailed, match="no picture found"):
        tool(service, "searxng").run(QUERY)


def test_an_answer_is_kept_for_a_while(service: SearchService) -> None:
    searching = tool(service, "brave", cache_s=0.5)
    for query in ("golden gate", "golden  gate ", "golden gate"):
        assert searching.run({"query": query}).images
    assert len(service.searches()) == 1
    time.sleep(0.6)
    searching.run({"query": "golden gate"})
    assert len(service.searches()) == 2


def test_the_quota_is_kept_by_calls_that_come_at_once(service: SearchService) -> None:
    searching = tool(service, "brave", quota="3/second")
    started = time.monotonic()
    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(lambda n: searching.run({"query": f"bridge {n}"}).images, range(6)))
    assert time.monotonic() - started >= 1 and len(service.searches()) == 6


def test_commons_is_told_who_asks_and_is_not_given_its_operators(service: SearchService) -> None:
    tool(service, "commons", contact="ops@example.org").run({"query": 'gate insource:/.*/ "x" | -bridge'})
    (asked,) = service.searches()
    assert asked["headers"]["User-Agent"] == "llmi/0.1 (ops@example.org)"
    assert asked["gsrsearch"].split(" filetype:")[0].replace(" ", "") == "gateinsource.x-bridge"


def test_several_pictures_are_different_ones(service: SearchService) -> None:
    service.known = [BRIDGE, BRIDGE, FOG]
    result = tool(service, "brave", top=3).run(QUERY)
    assert len(result.images) == 2 and len(result.provenance["others"]) == 1


def test_a_call_costs_what_the_config_says(service: SearchService) -> None:
    assert tool(service, "brave", dollars=0.005).cost(QUERY) == 0.005


# Ranking


def test_order_decides_among_equals_and_a_small_picture_loses() -> None:
    hits = [Hit("Bridge", side=100), Hit("Bridge", author="first"), Hit("Bridge", author="second"), Hit("Fog")]
    assert [h.author or h.title for h in ranked("a bridge", hits)] == ["first", "second", "Bridge", "Fog"]


def test_words_in_scripts_without_spaces_are_found() -> None:
    assert ranked("金门大桥", [Hit("雾"), Hit("美国金门大桥的照片")])[0].title == "美国金门大桥的照片"


def test_a_strangers_text_is_one_short_line() -> None:
    assert text("<p>a&lt;b\n <script>x</script>") == "a<b x"
    assert text(None) == text(7) == "" and len(text("<" * 10**6)) <= 300


# Throttle


@pytest.mark.parametrize("quota", ["", "fast", "3", "1/fortnight"])
def test_a_quota_that_is_none_is_refused(quota: str) -> None:
    with pytest.raises(ValueError, match="a quota must read as '1/second; 2000/month'"):
        Throttle(quota)


def test_every_part_of_a_quota_counts() -> None:
    throttle = Throttle("100/second; 2/hour")
    for _ in range(2):
        throttle.wait(time.monotonic() + 1)
    with pytest.raises(Busy) as busy:
        throttle.wait(time.monotonic() + 1)
    assert 3500 < busy.value.after_s <= 3600


def test_refusals_that_say_nothing_are_waited_for_twice_as_long_each_time() -> None:
    throttle = Throttle("100/second")
    pauses = []
    for _ in range(8):
        throttle._until = 0.0
        throttle.refused({})
        with pytest.raises(Busy) as busy:
            throttle.wait(time.monotonic())
        pauses.append(round(busy.value.after_s))
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]


def test_what_an_answer_asks_is_understood() -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert asked_pause({"Retry-After": "2.5"}) == 2.5
    assert 25 < asked_pause({"Retry-After": later}) <= 30
    assert asked_pause({"Retry-After": "soon"}) == asked_pause({}) == 0
    assert asked_pause({"Retry-After": "Mon, 01 Jan 1990 00:00:00 GMT"}) == 0
    assert asked_pause({"X-RateLimit-Remaining": "0, 5", "X-RateLimit-Reset": "1, 900"}) == 1
