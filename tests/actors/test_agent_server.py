from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from actors.agent_server import MAX_IMAGES, Ask, illustrate
from actors.serving import Outage
from agent.protocol import format_call
from agent.render import Made
from agent.spec import PUBLISHED
from replay.record import Blob


def picture(kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(out, kind)
    return out.getvalue()


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def ask(**body: Any) -> Ask:
    return Ask.model_validate({"prompt": "Show it."} | body)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_comes_as_base64_or_as_a_data_url(kind: str) -> None:
    text, mime = base64_of(picture(kind)), f"image/{kind.lower()}"
    assert ask(images=[text, f"data:image/x;base64,{text}"]).images == [Blob(picture(kind), mime)] * 2


@pytest.mark.parametrize(
    ("body", "where", "reason"),
    [
        ({"prompt": ""}, "prompt", "blank"),
        ({"prompt": " \n"}, "prompt", "blank"),
        ({"prompt": None}, "prompt", "valid string"),
        ({"prompt": "half \ud83d"}, "prompt", "surrogates not allowed"),
        ({"promt": "Show it."}, "promt", "Extra inputs"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"images": "x"}, "images", "valid list"),
        ({"images": [7]}, "images.0", "a data URL"),
        ({"images": ["*"]}, "images.0", "no PNG, JPEG, WEBP picture"),
        ({"images": ["data:image/svg+xml,<svg/>"]}, "images.0", "no PNG, JPEG, WEBP picture"),
        ({"images": [base64_of(b"GIF89a")]}, "images.0", "no PNG, JPEG, WEBP picture"),
        ({"images": [base64_of(picture()[:-30])]}, "images.0", "no PNG, JPEG, WEBP picture"),
        ({"images": [base64_of(picture("GIF"))]}, "images.0", "no PNG, JPEG, WEBP picture"),
        ({"images": [base64_of(picture())] * (MAX_IMAGES + 1)}, "images", "at most 16"),
    ],
)
def test_a_body_that_cannot_be_answered_says_where_and_why(body: dict[str, Any], where: str, reason: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ask(**body)
    (problem,) = caught.value.errors()
    assert ".".join(map(str, problem["loc"])) == where and reason in problem["msg"]


async def run(tool: str, params: Mapping[str, Any], images: Sequence[Blob]) -> Made:
    if tool == "search":
        raise Outage("tool 'search' is gone")
    if tool == "diffusion":
        return Made(failure="no such scene")
    return Made((images[0] if images else Blob(picture()),), {"figures": 1, "odd": {1}})


async def test_every_call_is_told_of_and_an_outage_costs_its_own_picture_alone() -> None:
    text = "\n".join(
        [
            format_call("code", "bars", {"code": "plt.bar([1], [2])"}),
            format_call("search", "a tower", {"query": "tower"}),
            format_call("diffusion", "a cat", {"prompt": "cat"}),
            format_call("edit", "the given one", {"img_index": 0, "prompt": "make it grey"}),
            "<imgen>{'source': 'code'}</imgen>",
            "Words <b>stay</b> words.",
        ]
    )
    given = Blob(picture("JPEG"), "image/jpeg")
    document = await illustrate("What? " * 100, text, [given], run, PUBLISHED)
    assert document.text == text
    assert [c.status for c in document.calls] == ["ok", "failed", "failed", "ok", "invalid"]
    assert [c.reason for c in document.calls[1:3]] == ["tool 'search' is gone", "no such scene"]
    assert document.calls[3].images == [given.sha256]
    assert set(document.images) == {Blob(picture()).sha256, given.sha256}
    assert document.images[given.sha256] == f"data:image/jpeg;base64,{base64_of(given.data)}"
    assert "search - tool &#x27;search&#x27; is gone" in document.html and "<b>" not in document.html
    assert '"odd"' in document.model_dump_json(fallback=str)


async def test_an_empty_answer_is_a_document_without_calls() -> None:
    document = await illustrate("Nothing?", "", [], run, PUBLISHED)
    assert (document.text, document.calls, document.images) == ("", [], {})
    assert "<h1>Nothing?</h1>" in document.html
