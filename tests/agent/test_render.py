"""Running a document's calls."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.protocol import format_call
from agent.render import CallOutcome, Made, Rendering, render
from agent.spec import PUBLISHED, ToolSpec
from replay.record import CALL, Blob


async def fake(tool: str, params: Mapping[str, Any], images: Sequence[Blob]) -> Made:
    if params.get("query") == "nothing":
        return Made(failure="no picture is about 'nothing'")
    what = params.get("query") or params.get("prompt") or params.get("code")
    return Made((Blob(f"{tool}:{what}:{b''.join(i.data for i in images)!r}".encode()),), {"tool": tool})


def search(query: str) -> str:
    return format_call("search", "d", {"query": query})


def edit(index: int) -> str:
    return format_call("edit", "d", {"img_index": index, "prompt": "grey"})


def run(text: str, given: Sequence[Blob] = (), call: Any = fake) -> Any:
    return asyncio.run(render(text, given, call))


def test_an_empty_document_has_no_calls() -> None:
    assert run("") == ([], [])


def test_every_call_has_its_outcome_in_order() -> None:
    calls, made = run(f"a {search('x')} b {search('nothing')} c <imgen>rubbish</imgen> d {search('y')}")
    assert [c.status for c in calls] == ["ok", "failed", "invalid", "ok"]
    assert [c.images[0] for c in calls if c.images] == [b.sha256 for b in made]
    assert calls[1].reason == "no picture is about 'nothing'"


def test_an_edit_is_given_the_users_picture_and_earlier_ones() -> None:
    calls, made = run(f"{edit(0)}{search('x')}{edit(2)}", [Blob(b"mine")])
    assert [c.status for c in calls] == ["ok"] * 3
    assert b"mine" in made[0].data
    assert b"search:x" in made[2].data


def test_an_edit_that_points_forward_is_invalid() -> None:
    calls, _ = run(f"{edit(0)}{search('x')}")
    assert calls[0].status == "invalid"
    assert calls[1].status == "ok"


def test_an_edit_of_a_picture_that_failed_fails_with_that_reason() -> None:
    calls, _ = run(f"{search('nothing')}{edit(0)}{search('x')}")
    assert [c.status for c in calls] == ["failed", "failed", "ok"]
    assert "picture 0 does not exist" in calls[1].reason


def test_a_document_cut_off_inside_a_tag_keeps_its_other_calls() -> None:
    calls, _ = run(f"{search('x')} and <imgen>{{'source': 'search', 'desc")
    assert [c.status for c in calls] == ["ok", "invalid"]


def test_calls_that_do_not_depend_on_each_other_run_at_the_same_time() -> None:
    running, most = 0, 0

    async def slow(*args: Any) -> Made:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return await fake(*args)

    run(search("a") + search("b") + edit(1), call=slow)
    assert most == 2


def test_an_infrastructure_failure_ends_the_rendering() -> None:
    async def down(*_: Any) -> Made:
        raise ConnectionError("down")

    with pytest.raises(ConnectionError):
        run(search("a") + edit(0), call=down)


def test_an_outcome_survives_the_form_in_which_the_store_keeps_it() -> None:
    call = CallOutcome(
        "code", "Ein Säulendiagramm", {"code": "plot()"}, 3, 40, "ok", "", ("ab",), {"licence": "MIT"}, 0.5
    )
    assert CallOutcome.of_row(call.row()) == call
    assert set(call.row()) == {field.name for field in CALL}


# While the text is being written


async def in_pieces(pieces: Sequence[str], given: Sequence[Blob] = (), call: Any = fake) -> Any:
    async with Rendering(given, call) as rendering:
        for piece in pieces:
            rendering.feed(piece)
            await asyncio.sleep(0)
        return await rendering.finish()


PARTS = [
    search("x"),
    search("nothing"),
    edit(0),
    edit(1),
    edit(2),
    "<imgen>",
    "</imgen>",
    "<imgen>{'source': 'code'",
    "a",
]


@settings(deadline=None)
@given(st.lists(st.sampled_from(PARTS), max_size=8).map("".join), st.lists(st.integers(0, 400)))
def test_a_document_read_in_pieces_is_the_same_wherever_it_is_cut(text: str, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    calls, made = asyncio.run(in_pieces(pieces, [Blob(b"mine")]))
    whole, all_made = run(text, [Blob(b"mine")])
    assert [replace(c, seconds=0) for c in calls] == [replace(c, seconds=0) for c in whole]
    assert made == all_made


async def test_a_call_begins_as_soon_as_its_tag_closes() -> None:
    begun: list[str] = []

    async def note(tool: str, params: Mapping[str, Any], images: Sequence[Blob]) -> Made:
        begun.append(params.get("query", tool))
        return await fake(tool, params, images)

    async with Rendering([], note) as rendering:
        rendering.feed(search("x")[:-1])
        await asyncio.sleep(0.01)
        assert begun == []
        rendering.feed(">" + edit(0))
        await asyncio.sleep(0.01)
        assert begun == ["x", "edit"]
        rendering.feed("and some more text")
        assert [c.status for c in (await rendering.finish())[0]] == ["ok", "ok"]


async def test_a_document_that_runs_out_of_time_keeps_what_was_made() -> None:
    async def stuck(tool: str, params: Mapping[str, Any], images: Sequence[Blob]) -> Made:
        if params.get("query") == "stuck":
            await asyncio.sleep(60)
        return await fake(tool, params, images)

    text = search("x") + search("stuck") + edit(1) + edit(0)
    async with Rendering([], stuck) as rendering:
        rendering.feed(text)
        calls, made = await rendering.finish(timeout_s=0.2)
    assert [c.status for c in calls] == ["ok", "failed", "failed", "ok"]
    assert calls[1].reason == calls[2].reason == "the document's 0.2 s were over before this call ended"
    assert len(made) == 2 and (calls[1].start, calls[1].end) == (len(search("x")), len(search("x") + search("stuck")))


async def test_a_rendering_that_is_given_up_leaves_no_call_running() -> None:
    ended = asyncio.Event()

    async def stuck(*_: Any) -> Made:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()
        raise AssertionError

    with pytest.raises(ConnectionError):
        async with Rendering([], stuck) as rendering:
            rendering.feed(search("x"))
            await asyncio.sleep(0)
            raise ConnectionError("the engine died")
    assert ended.is_set()


# Where pictures come from


async def told(tool: str, params: Mapping[str, Any], images: Sequence[Blob]) -> Made:
    facts: dict[str, dict[str, Any]] = {
        "search": {"maker": "commons", "title": params.get("query"), "author": "A", "licence": "CC0", "score": 3.2},
        "edit": {"maker": "pillow", "operations": [params.get("prompt")], "of": [i.sha256 for i in images]},
        "code": {},
    }
    return Made((Blob(f"{tool}{params}".encode()),), facts[tool])


def test_a_picture_says_what_it_was_made_from_back_to_the_first() -> None:
    code = format_call("code", "d", {"code": "plot()"})
    calls, _ = run(search("x") + edit(1) + edit(2) + edit(3) + code + edit(0), [Blob(b"mine")], told)
    found = {"maker": "commons", "title": "x", "author": "A", "licence": "CC0"}
    assert "origins" not in calls[0].provenance
    assert calls[1].provenance["origins"] == [found]
    assert calls[2].provenance["origins"] == calls[3].provenance["origins"] == [{"maker": "pillow"}, found]
    assert calls[4].provenance == {"maker": "code"}  # a tool that does not say who it is
    assert calls[5].provenance["origins"] == [{"given": 0}]


def test_a_picture_made_from_several_names_them_all() -> None:
    specs = {**PUBLISHED, "blend": ToolSpec("blend", {"img_index": list[int]}, "mix", ("img_index",))}

    async def blend(tool: str, params: Mapping[str, Any], images: Sequence[Blob]) -> Made:
        if tool == "blend":
            return Made((Blob(b"".join(i.data for i in images)),), {"maker": "mixer"})
        return await told(tool, params, images)

    text = search("x") + search("y") + format_call("blend", "d", {"img_index": [2, 0, 1]})
    calls, made = asyncio.run(render(text, [Blob(b"mine")], blend, specs))
    assert [o.get("title", o.get("given")) for o in calls[2].provenance["origins"]] == ["y", 0, "x"]
    assert made[2].data == made[1].data + b"mine" + made[0].data
