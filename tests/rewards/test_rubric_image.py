"""The rubric image judge: pictures that are broken, blank, tiny, repeated, unchanged or beside the point."""

from __future__ import annotations

import io
from dataclasses import replace

import matplotlib
import pytest
from matplotlib.figure import Figure
from PIL import Image

from replay.record import Blob
from rewards.base import JudgeFailed, Verdict
from rewards.judges.rubric import RubricImageJudge
from tests.rewards.drafts import BARS, CAT, FLAG, GOLD, STAR, Draft, Tag, picture, png

matplotlib.use("Agg")
LOWEST = {"image_quality": 1, "task_relevance": 1, "text_image_relevance": 1}
HIGHEST = dict.fromkeys(LOWEST, 5)


def judge(draft: Draft) -> Verdict:
    return RubricImageJudge().judge(draft.render())


def with_pictures(name: str, *blobs: Blob) -> Draft:
    return GOLD[name].with_tags(lambda tag: replace(tag, made=blobs))


def saved(image: Image.Image, form: str, **options: object) -> Blob:
    data = io.BytesIO()
    image.save(data, form, **options)
    return Blob(data.getvalue(), f"image/{form.lower()}")


def chart(draw: bool) -> Blob:
    figure = Figure()
    axes = figure.subplots()
    axes.set_title("Fruit")
    if draw:
        axes.scatter([1, 2, 3], [3, 5, 2], s=10)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return Blob(data.getvalue())


@pytest.mark.parametrize("name", ["search", "diffusion", "code", "edit"])
def test_gold_pictures_get_high_marks(name: str) -> None:
    assert min(judge(GOLD[name]).scores.values()) > 4


@pytest.mark.parametrize("name", ["none", "search"])
def test_a_document_without_pictures_gets_the_lowest_marks(name: str) -> None:
    bare = replace(GOLD[name], parts=("Only text.",))
    assert judge(bare).scores == LOWEST


def test_more_than_ten_pictures_get_the_lowest_marks_unseen() -> None:
    made = tuple(picture(size=(40 + i, 40)) for i in range(11))
    assert judge(with_pictures("search", *made[:10])).scores["image_quality"] == 5
    doc = with_pictures("search", *made).render()
    assert RubricImageJudge().judge(replace(doc, blobs={})).scores == LOWEST


def test_a_missing_picture_is_the_judges_failure() -> None:
    doc = GOLD["search"].render()
    with pytest.raises(JudgeFailed, match=r"picture [0-9a-f]{12} is not among the document's blobs"):
        RubricImageJudge().judge(replace(doc, blobs={}))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a picture",
        picture().data[:60],
        picture(size=(300, 200)).data[:-300],
        b"\x89PNG\r\n\x1a\n" + bytes(200),
        saved(Image.effect_noise((64, 64), 90), "JPEG").data[:200],
        picture().data[:40] + bytes(8) + picture().data[48:],
    ],
)
def test_a_corrupt_picture_gets_the_lowest_marks_with_a_reason(data: bytes) -> None:
    verdict = judge(with_pictures("search", Blob(data)))
    assert verdict.scores == LOWEST
    assert "picture 1 cannot be opened" in verdict.reasons["image_quality"]


def test_a_picture_of_absurd_size_is_not_decoded() -> None:
    bomb = saved(Image.new("1", (9000, 9000)), "PNG")
    assert "too large to open" in judge(with_pictures("search", bomb)).reasons["image_quality"]


def test_a_corrupt_picture_spoils_only_its_own_share() -> None:
    verdict = judge(with_pictures("search", picture(), Blob(b"broken")))
    assert verdict.scores["image_quality"] == 3


@pytest.mark.parametrize("colour", ["white", "black", (12, 99, 200)])
def test_a_blank_picture_gets_the_lowest_marks(colour: str | tuple[int, int, int]) -> None:
    verdict = judge(with_pictures("diffusion", png(Image.new("RGB", (64, 64), colour))))
    assert verdict.scores == LOWEST
    assert "shows little or nothing" in verdict.reasons["image_quality"]


def test_a_nearly_uniform_picture_gets_low_marks() -> None:
    pale = picture().data
    faint = Image.open(io.BytesIO(pale)).convert("L").point(lambda v: 200 + v // 32)
    assert 1 < judge(with_pictures("diffusion", png(faint))).scores["image_quality"] < 2


def test_axes_without_data_are_blank_and_a_few_points_are_not() -> None:
    assert judge(with_pictures("code", chart(draw=False))).scores == LOWEST
    assert judge(with_pictures("code", chart(draw=True))).scores["image_quality"] == 5


@pytest.mark.parametrize(("side", "mark"), [(1, 1), (4, 1.5), (16, 3), (32, 5), (64, 5)])
def test_tiny_pictures_get_low_quality(side: int, mark: float) -> None:
    assert judge(with_pictures("search", picture(size=(side, side)))).scores["image_quality"] <= mark


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"])
def test_pictures_of_all_modes_open(mode: str) -> None:
    disc = Image.open(io.BytesIO(picture().data))
    deep = disc.convert("I").point(lambda level: level * 256 + 0).convert("I;16")
    blob = saved(deep if mode == "I;16" else disc.convert(mode), "JPEG" if mode == "CMYK" else "PNG")
    assert judge(with_pictures("search", blob)).scores["image_quality"] > 1


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_pictures_of_all_formats_open(form: str) -> None:
    disc = Image.open(io.BytesIO(picture(size=(600, 400)).data))
    assert judge(with_pictures("search", saved(disc, form))).scores == HIGHEST


def test_a_fully_transparent_picture_is_blank() -> None:
    clear = Image.open(io.BytesIO(picture().data)).convert("RGBA")
    clear.putalpha(0)
    assert judge(with_pictures("search", png(clear))).scores == LOWEST


def test_the_same_picture_twice_is_worth_less_than_two() -> None:
    again = replace(GOLD["search"], parts=(*GOLD["search"].parts, FLAG))
    verdict = judge(again)
    assert verdict.scores["image_quality"] == pytest.approx(1 + 4 * 1.25 / 2)
    assert verdict.reasons["image_quality"] == "picture 2 was shown before"


def test_the_same_picture_in_other_bytes_is_the_same_picture() -> None:
    other = replace(FLAG, made=(saved(Image.open(io.BytesIO(FLAG.made[0].data)), "PNG", compress_level=1),))
    assert other.made[0].sha256 != FLAG.made[0].sha256
    verdict = judge(replace(GOLD["search"], parts=(*GOLD["search"].parts, other)))
    assert verdict.reasons["image_quality"] == "picture 2 was shown before"


def test_a_chart_that_is_cut_off_is_half_as_good() -> None:
    bars = Image.new("RGB", (300, 200), "white")
    bars.paste("blue", (100, 60, 180, 200))
    verdict = judge(with_pictures("code", png(bars)))
    assert (verdict.scores["image_quality"], verdict.scores["task_relevance"]) == (3, 5)
    assert verdict.reasons["image_quality"] == "picture 1 is cut off at its rim"


@pytest.mark.parametrize(
    ("title", "mark"), [("Flag of Kenya", 5), ("Flag of Peru", 3), ("Map of Kenya", 3), ("Giraffe", 1)]
)
def test_a_found_picture_is_judged_by_its_title(title: str, mark: float) -> None:
    found = GOLD["search"].with_tags(lambda tag: replace(tag, provenance={"title": title}))
    assert judge(found).scores["task_relevance"] == mark


def test_a_found_picture_without_title_or_caption_is_judged_by_its_query() -> None:
    assert judge(GOLD["search"].with_tags(lambda tag: replace(tag, provenance={}))).scores == HIGHEST


def test_text_image_relevance_falls_if_the_prose_is_about_something_else() -> None:
    parts = ("The weather will be fine this week.", FLAG)
    verdict = judge(replace(GOLD["search"], parts=parts))
    assert verdict.scores["text_image_relevance"] == 1
    assert verdict.scores["task_relevance"] == 5


def test_an_edit_that_changes_nothing_misses_the_task() -> None:
    again = saved(Image.open(io.BytesIO(CAT.data)), "PNG", compress_level=1)
    assert again.sha256 != CAT.sha256
    verdict = judge(with_pictures("edit", again))
    assert verdict.scores["task_relevance"] == 1
    assert verdict.reasons["task_relevance"] == "picture 1 is not changed"


def test_an_edit_to_another_size_is_a_change() -> None:
    larger = png(Image.open(io.BytesIO(CAT.data)).resize((160, 120)))
    assert judge(with_pictures("edit", larger)).scores["task_relevance"] > 3


def test_an_edit_of_an_earlier_picture_must_differ_from_it() -> None:
    edit = Tag("edit", {"img_index": 0, "prompt": "a red star in grey"}, "a red star in grey", made=STAR.made)
    other = replace(edit, made=(picture("grey"),))
    parts = GOLD["diffusion"].parts
    same, changed = (replace(GOLD["diffusion"], parts=(*parts, tag)) for tag in (edit, other))
    assert judge(same).scores["task_relevance"] < judge(changed).scores["task_relevance"]


def test_a_users_broken_picture_does_not_stop_the_judge() -> None:
    assert min(judge(replace(GOLD["edit"], given=(Blob(b"broken"), CAT))).scores.values()) > 4


def test_pictures_of_failed_calls_are_not_looked_at() -> None:
    assert judge(GOLD["code"].with_tags(lambda _: replace(BARS, status="failed"))).scores == LOWEST


def test_verdicts_are_the_same_every_time() -> None:
    assert judge(GOLD["several"]) == judge(GOLD["several"])
