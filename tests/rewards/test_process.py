"""Scores of single calls."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from PIL import Image, ImageDraw

from replay.record import Blob
from rewards.base import JudgeFailed, Rendered
from rewards.hybrid import score
from rewards.judges.rubric import RubricImageJudge, RubricTextJudge
from rewards.process import call_scores
from tests.rewards.drafts import CAT, GOLD, Draft, Tag, png


def chart(clipped: bool) -> Blob:
    image = Image.new("RGB", (200, 120), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((60, 30, 90, 100), fill="blue")
    draw.rectangle((120, 60, 230 if clipped else 150, 100), fill="blue")
    return png(image)


def one(draft: Draft, **change: object) -> list[float]:
    return call_scores(draft.with_tags(lambda tag: replace(tag, **change)).render())


def test_a_found_picture_scores_by_how_its_title_fits_the_query() -> None:
    assert one(GOLD["search"]) == [1.0]
    assert one(GOLD["search"], provenance={"title": "Giraffe"}) == [0.0]


def test_an_edit_that_changed_nothing_was_not_obeyed() -> None:
    assert one(GOLD["edit"]) == [1.0]
    assert one(GOLD["edit"], made=(CAT,)) == [0.0]
    assert one(GOLD["edit"], made=(CAT,), provenance={"of": [CAT.sha256]}) == [0.0]


def test_a_clipped_chart_and_each_warning_halve_a_charts_score() -> None:
    whole, clipped = chart(False), chart(True)
    assert one(GOLD["code"], made=(whole,)) == [1.0]
    assert one(GOLD["code"], made=(clipped,)) == [0.5]
    assert one(GOLD["code"], made=(whole,), provenance={"warnings": ["labels overlap"]}) == [0.5]
    assert one(GOLD["code"], made=(clipped,), provenance={"warnings": ["labels overlap", "no title"]}) == [0.125]


@pytest.mark.parametrize("status", ["failed", "invalid"])
def test_a_call_that_made_nothing_scores_nothing(status: str) -> None:
    assert one(GOLD["several"], status=status) == [0.0, 0.0]


def test_a_corrupt_picture_scores_nothing() -> None:
    assert one(GOLD["diffusion"], made=(Blob(b"no picture"),)) == [0.0]


def test_a_picture_that_is_not_at_hand_is_no_fault_of_the_policy() -> None:
    with pytest.raises(JudgeFailed, match="is not among the document's blobs"):
        call_scores(replace(GOLD["code"].render(), blobs={}))


def judged(doc: Rendered, process: bool) -> dict[str, float]:
    verdicts = RubricTextJudge().judge(doc), RubricImageJudge().judge(doc)
    return score(doc, *verdicts, process=process).components


def test_scores_of_calls_are_components_only_where_they_are_asked_for() -> None:
    doc = GOLD["several"].render()
    plain, full = judged(doc, False), judged(doc, True)
    assert set(full) - set(plain) == {"process", "call/0", "call/1"}
    assert full["process"] == pytest.approx((full["call/0"] + full["call/1"]) / 2)
    assert {k: full[k] for k in plain} == plain


def test_a_document_that_needs_no_call_and_made_none_has_done_its_part() -> None:
    assert judged(GOLD["none"].render(), True)["process"] == 1.0


def test_a_tag_that_is_only_a_gif_opens_as_well() -> None:
    data = io.BytesIO()
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((16, 16, 48, 48), fill="red")
    image.save(data, "GIF")
    tag = Tag("code", {"code": "plt.plot([1])"}, made=(Blob(data.getvalue(), "image/gif"),))
    assert call_scores(Draft("Plot.", ("A plot.", tag), 1, ("code",)).render()) == [1.0]
