"""A judge whose model reads pictures, on a real vLLM engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from replay.record import Blob
from rewards.base import Verdict
from tests.rewards.drafts import Draft, Tag, picture
from tests.rewards.seeing import build, install_torchvision, judged, process_with

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(400)]

RED, BLUE, BROKEN = picture("red"), picture("blue"), Blob(b"\x89PNG\r\n\x1a\n")


def document(*pictures: Blob, given: tuple[Blob, ...] = ()) -> Draft:
    parts = [part for one in pictures for part in (Tag("diffusion", {}, made=(one,)), " And then: ")]
    return Draft("Draw what I say.", ("Look: ", *parts), -1, given=given)


DOCUMENTS = {
    "red": document(RED),
    "red again": document(RED),
    "blue": document(BLUE),
    "red, blue": document(RED, BLUE),
    "blue, red": document(BLUE, RED),
    "red; given red": document(RED, given=(RED,)),
    "red; given blue": document(RED, given=(BLUE,)),
    "broken": document(BROKEN),
    "nothing": document(),
    "sixty": document(*[RED, BLUE] * 30),
}


def test_pictures_of_a_document_and_of_the_user_reach_the_model_each_in_its_place(tmp_path: Path) -> None:
    install_torchvision(tmp_path / "torchvision")
    with process_with(tmp_path / "torchvision") as child:
        model = child.submit(build, tmp_path / "model").result(120)
        documents = [draft.render() for draft in DOCUMENTS.values()]
        verdicts = child.submit(judged, model, documents).result(240)
    found: dict[str, Verdict] = dict(zip(DOCUMENTS, verdicts, strict=True))
    for verdict in found.values():
        assert set(verdict.scores) == {"image_quality", "task_relevance", "text_image_relevance"}
        assert all(1 <= score <= 5 for score in verdict.scores.values())
    told = {name: tuple(round(score, 4) for score in verdict.scores.values()) for name, verdict in found.items()}
    assert told["red"] == told["red again"]
    pairs = [("red", "blue"), ("red, blue", "blue, red"), ("red; given red", "red; given blue"), ("red", "broken")]
    for one, other in pairs:
        assert told[one] != told[other], f"{one} and {other} look alike to the model: {told}"
