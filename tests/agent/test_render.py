"""Running a document's calls."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from agent.protocol import format_call
from agent.render import CallOutcome, Made, render
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
