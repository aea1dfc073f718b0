"""The ref tool: the same bytes again, in the protocol as any other tool."""

import asyncio

import pytest

from agent.protocol import format_call
from agent.render import Made, render
from agent.spec import PUBLISHED
from replay.record import Blob
from tools.base import CallFailed, load
from tools.ref import RefTool

PICTURE = Blob(b"any bytes at all", "image/webp")


def test_the_picture_comes_back_byte_for_byte_with_its_type():
    result = RefTool().run({"img_index": 0}, [PICTURE])
    assert result.images == (PICTURE,) and result.provenance == {"of": [PICTURE.sha256]}


def test_without_a_picture_the_call_is_at_fault():
    with pytest.raises(CallFailed, match="no picture to show"):
        RefTool().run({"img_index": 0}, [])


def test_it_is_built_in_but_not_one_of_the_published_tools():
    assert load("ref") is RefTool and "ref" not in PUBLISHED


def test_where_its_spec_is_in_the_protocol_a_document_shows_the_given_picture():
    specs = {"ref": RefTool.spec}

    async def run(name, params, images):
        result = RefTool().run(params, images)
        return Made(result.images, result.provenance)

    text = "Look: " + format_call("ref", "the source", {"img_index": 0})
    outcomes, made = asyncio.run(render(text, [PICTURE], run, specs))
    assert [o.status for o in outcomes] == ["ok"] and made == [PICTURE]
    assert asyncio.run(render(text, [PICTURE], run))[0][0].status == "invalid"
