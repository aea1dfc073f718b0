"""Counting rules: exact values of the published formulas, and tool measures that nothing missing can raise."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.rules import accurate, coverage, right_calls, rule, rule_strict, tool_precision, tool_reward
from tests.rewards.drafts import BARS, FLAG, GOLD, GREY, STAR, Draft, Tag


@pytest.mark.parametrize(
    ("images", "image_num", "training", "strict"),
    [
        (0, -1, 1, 1),
        (1, -1, 0, 0),
        (0, 0, 1, 1),
        (7, 0, 1, 1),
        (0, 99, 0, 0),
        (1, 99, 1, 1),
        (120, 99, 1, 1),
        (0, 3, 0, 0),
        (1, 3, 1 / 3, 0),
        (2, 3, 2 / 3, 0),
        (3, 3, 1, 1),
        (4, 3, 0.7, 0),
        (5, 3, 0.4, 0),
        (6, 3, 0.1, 0),
        (7, 3, 0, 0),
        (30, 3, 0, 0),
    ],
)
def test_rules_have_the_published_values(images: int, image_num: int, training: float, strict: float) -> None:
    assert rule(images, image_num) == pytest.approx(training)
    assert rule_strict(images, image_num) == strict


@pytest.mark.parametrize(("images", "image_num"), [(-1, 0), (0, -2)])
def test_counts_that_cannot_be_are_refused(images: int, image_num: int) -> None:
    with pytest.raises(ValueError, match="counts start at 0"):
        rule(images, image_num)
    with pytest.raises(ValueError, match="counts start at 0"):
        rule_strict(images, image_num)


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(-1, 120))
def test_rules_lie_in_0_to_1_and_the_strict_one_is_1_only_where_the_other_is(images: int, image_num: int) -> None:
    assert 0 <= rule(images, image_num) <= 1
    assert (rule_strict(images, image_num) == 1) == (rule(images, image_num) == 1)


def draft(*tags: Tag, image_num: int = 1, tools: tuple[str, ...] = ()) -> Draft:
    return Draft("Some question", ("Some prose.", *tags), image_num, tools)


FAILED, INVALID = replace(FLAG, status="failed"), replace(FLAG, status="invalid")


@pytest.mark.parametrize(
    ("case", "right"),
    [
        (draft(FLAG, tools=("search",)), True),
        (draft(tools=("search",)), False),
        (draft(FAILED, tools=("search",)), False),
        (draft(FLAG, FAILED, tools=("search",)), False),
        (draft(FLAG, INVALID, tools=("search",)), False),
        (draft(STAR, tools=("search",)), False),
        (draft(FLAG, STAR, tools=("search",)), True),
        (draft(FLAG, tools=("search", "code")), False),
        (draft(FLAG, BARS, tools=("search", "code")), True),
        (draft(image_num=-1), True),
        (draft(FLAG, image_num=-1), False),
        (draft(FAILED, image_num=-1), False),
        (draft(image_num=0), True),
        (draft(FLAG, image_num=0), True),
        (draft(INVALID, image_num=0), False),
        (draft(image_num=99), False),
        (draft(FLAG, image_num=99), True),
        (draft(image_num=2), False),
    ],
)
def test_a_document_is_accurate_if_all_tags_ran_and_every_required_tool_was_used(case: Draft, right: bool) -> None:
    assert accurate(case.render()) is right


@pytest.mark.parametrize("name", GOLD)
def test_gold_documents_are_accurate(name: str) -> None:
    doc = GOLD[name].render()
    assert accurate(doc)
    assert (coverage(doc), tool_precision(doc), right_calls(doc), tool_reward(doc)) == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("tags", "tools", "r_tool"),
    [
        ((FLAG,), ("search",), 1.0),
        ((FAILED,), ("search",), 0.5),
        ((FAILED, FLAG), ("search",), 0.75),
        ((), ("search",), 0.0),
        ((STAR,), ("search",), 0.0),
        # weights: code .4, edit .3, search .2, diffusion .1
        ((BARS,), ("code", "diffusion"), 0.8),
        ((FLAG,), ("search", "edit"), 0.4),
        ((FLAG, BARS, STAR, GREY), ("search", "code", "diffusion", "edit"), 1.0),
        ((FLAG, BARS, STAR), ("search", "code", "diffusion", "edit"), 0.7),
        ((replace(FLAG, source="music"),), ("music", "diffusion"), 0.5),
    ],
)
def test_r_tool_weighs_the_required_tools(tags: tuple[Tag, ...], tools: tuple[str, ...], r_tool: float) -> None:
    assert tool_reward(draft(*tags, tools=tools).render()) == pytest.approx(r_tool)


def test_a_tool_that_was_never_called_is_no_success() -> None:
    assert tool_reward(draft(tools=("code",)).render()) == 0


def test_without_required_tools_r_tool_is_accuracy() -> None:
    assert tool_reward(draft(image_num=-1).render()) == 1
    assert tool_reward(draft(FLAG, image_num=-1).render()) == 0


@pytest.mark.parametrize(
    ("tags", "tools", "image_num", "precision", "right"),
    [
        ((), (), -1, 1.0, 1.0),
        ((), ("search",), 1, 0.0, 1.0),
        ((FLAG,), ("search",), 1, 1.0, 1.0),
        ((FLAG, STAR), ("search",), 1, 0.5, 0.5),
        ((FLAG, FAILED), ("search",), 1, 1.0, 0.5),
        ((INVALID,), ("search",), 1, 1.0, 0.0),
        ((FLAG,), (), -1, 0.0, 0.0),
        ((FLAG,), (), 0, 1.0, 1.0),
    ],
)
def test_precision_counts_wanted_calls_and_right_calls_those_that_ran_too(
    tags: tuple[Tag, ...], tools: tuple[str, ...], image_num: int, precision: float, right: float
) -> None:
    doc = draft(*tags, image_num=image_num, tools=tools).render()
    assert tool_precision(doc) == precision
    assert right_calls(doc) == right
