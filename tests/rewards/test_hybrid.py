"""The hybrid sum: exact published numbers, and one test for each known hole that the default closes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.base import CallOutcome, JudgeFailed, Rendered, Verdict
from rewards.components import KINDS
from rewards.hybrid import IMAGE_CRITERIA, score, wants_image_verdict
from rewards.judges.rubric import RubricImageJudge, RubricTextJudge
from tests.rewards.drafts import CAT, GOLD, judged


def call(source: str = "search", status: str = "ok", images: int = 1, at: int = 0) -> CallOutcome:
    made = tuple(f"{source}{at}-{i}" for i in range(images)) if status == "ok" else ()
    return CallOutcome(source, "", {}, at, at + 1, status, "", made)


def doc(*calls: CallOutcome, image_num: int = 1, tools: tuple[str, ...] = ("search",)) -> Rendered:
    return Rendered("question", "answer", calls, image_num, tools)


def text(t: float = 5, i: float = 5) -> Verdict:
    return Verdict({"text": t, "image_tags": i})


def image(*scores: float) -> Verdict:
    return Verdict(dict(zip(IMAGE_CRITERIA, scores or (5, 5, 5), strict=True)))


def searches(n: int) -> list[CallOutcome]:
    return [call(at=i) for i in range(n)]


@pytest.mark.parametrize(
    ("v", "n", "text_verdict", "image_verdict", "multimodal", "expected"),
    [
        (1, 1, text(5, 5), image(5, 5, 5), False, 1.0),
        (1, 1, text(1, 1), image(1, 1, 1), False, 0.2),
        # R_llm = ((1.4 * 3 + 0.6 * 2) / 2 - 1) / 4 = 0.425, R_mllm = (4 - 1) / 4 = 0.75
        (1, 1, text(3, 2), image(3, 4, 5), False, 0.2 + 0.3 * 0.75 + 0.5 * 0.425),
        # R_llm = ((1.5 * 3 + 0.5 * 2) / 2 - 1) / 4 = 0.4375
        (1, 1, text(3, 2), image(3, 4, 5), True, 0.2 + 0.3 * 0.75 + 0.5 * 0.4375),
        (1, 2, text(5, 5), image(5, 5, 5), False, 0.2 * 0.5 + 0.3 * 0.5 + 0.5),
        (3, 1, text(5, 5), image(5, 5, 5), False, 0.2 * 0.4 + 0.3 * 0.4 + 0.5),
        (0, -1, text(5, 5), None, False, 1.0),
        (1, -1, text(5, 5), image(5, 5, 5), False, 0.5),
        (0, 99, text(5, 5), None, False, 0.5),
        (0, 0, text(5, 5), None, False, 1.0),
        (2, 0, text(5, 5), image(4, 4, 4), False, 0.2 + 0.3 * 0.75 + 0.5),
        (10, 99, text(5, 5), image(5, 5, 5), False, 1.0),
        (11, 99, text(5, 5), image(5, 5, 5), False, 0.7),
        (11, 99, text(5, 5), None, False, 0.7),
    ],
)
def test_the_published_reward_has_the_published_numbers(
    v: int, n: int, text_verdict: Verdict, image_verdict: Verdict | None, multimodal: bool, expected: float
) -> None:
    got = score(doc(*searches(v), image_num=n), text_verdict, image_verdict, "published", multimodal)
    assert got.reward == pytest.approx(expected)


@pytest.mark.parametrize(
    ("case", "text_verdict", "image_verdict", "expected", "strict"),
    [
        (doc(call()), text(), image(), 1.0, 1.0),
        (doc(call()), text(4, 4), image(4, 4, 4), 0.85, 0.85),
        (doc(call()), text(1, 1), image(1, 1, 1), 0.4, 0.4),
        (doc(call("code")), text(), image(), 0.2, 0.2),
        (doc(call(), call("code", at=1)), text(), image(), 0.7 * 0.6, 0.0),
        (doc(call(), call("code", "failed", at=1)), text(), image(), 0.6, 0.6),
        (doc(call(), image_num=2, tools=("search", "code")), text(), image(), 0.5 * 0.6, 0.0),
        (doc(call(status="failed")), text(), None, 0.0, 0.0),
        (doc(image_num=-1, tools=()), text(), None, 1.0, 1.0),
        (doc(image_num=-1, tools=()), text(1, 5), None, 0.4 + 0.6 * 0.3, 0.4 + 0.6 * 0.3),
        (doc(call(), image_num=-1, tools=()), text(), image(), 0.0, 0.0),
        (doc(call(status="failed"), image_num=-1, tools=()), text(), None, 0.2, 0.2),
    ],
)
def test_the_default_reward_follows_its_formula(
    case: Rendered, text_verdict: Verdict, image_verdict: Verdict | None, expected: float, strict: float
) -> None:
    got = score(case, text_verdict, image_verdict)
    assert got.reward == pytest.approx(expected)
    assert got.reward_strict == pytest.approx(strict)


def test_the_strict_reward_is_the_same_whatever_the_policy_is_trained_on() -> None:
    case = doc(call(), call("code", at=1), image_num=2)
    assert len({score(case, text(4, 3), image(2, 3, 4), kind).reward_strict for kind in KINDS}) == 1
    assert score(case, text(4, 3), image(2, 3, 4), "published").reward != score(case, text(4, 3), image(2, 3, 4)).reward


def test_hole_text_only_is_the_optimum_where_pictures_are_free() -> None:
    bare, pictured = doc(image_num=0, tools=()), doc(call(), image_num=0, tools=())
    assert score(bare, text(), None, "published").reward == 1.0
    assert score(bare, text(), None).reward == pytest.approx(0.8)
    assert score(pictured, text(), image(5, 5, 5)).reward == pytest.approx(1.0)
    assert score(pictured, text(), image(2, 2, 2)).reward > score(bare, text(), None).reward


@pytest.mark.parametrize("image_num", [1, 3, 99])
def test_hole_required_pictures_may_be_left_out(image_num: int) -> None:
    bare = doc(image_num=image_num)
    assert score(bare, text(), None, "published").reward == pytest.approx(0.5)
    assert score(bare, text(), None).reward == 0


@pytest.mark.parametrize("status", ["pending", "lost", ""])
def test_hole_a_tool_outage_is_charged_to_the_policy(status: str) -> None:
    with pytest.raises(ValueError, match="only ok, failed, invalid are scored"):
        score(doc(call(status=status)), text(), image())


@pytest.mark.parametrize("value", [None, 0, 0.5, 5.5, -1, float("nan"), float("inf"), "5"])
def test_hole_a_failed_judge_is_charged_to_the_policy(value: object) -> None:
    with pytest.raises(JudgeFailed, match=r"text judge gave .* wanted a number from 1 to 5"):
        score(doc(call()), Verdict({"text": 5, "image_tags": value}), image())  # type: ignore[dict-item]
    with pytest.raises(JudgeFailed, match="image judge gave"):
        score(doc(call()), text(), image(value, 5, 5))  # type: ignore[arg-type]
    with pytest.raises(JudgeFailed, match="no image verdict"):
        score(doc(call()), text(), None)


def test_hole_the_image_judge_never_sees_the_users_pictures() -> None:
    changed = GOLD["edit"]
    untouched = changed.with_tags(lambda tag: replace(tag, made=(CAT,)))
    assert judged(untouched).reward < judged(changed).reward - 0.05


def test_hole_a_tool_that_was_never_called_is_a_success() -> None:
    parts = score(doc(), text(), None).components
    assert (parts["r_tool"], parts["coverage"], parts["fit"]) == (0, 0, 0)


def test_hole_the_wrong_tool_costs_nothing() -> None:
    right, wrong = doc(call()), doc(call("diffusion"))
    assert score(wrong, text(), image(), "published").reward == score(right, text(), image(), "published").reward
    assert score(wrong, text(), image()).reward <= 0.2 * score(right, text(), image()).reward


def test_calling_every_tool_does_not_pay_where_any_number_of_pictures_will_do() -> None:
    spray = [call(tool, at=i) for i, tool in enumerate(("search", "code", "diffusion", "edit"))]
    assert score(doc(*spray, image_num=99), text(), image()).reward == pytest.approx(0.4)


def test_a_picture_for_half_of_the_required_tools_gets_credit_in_between() -> None:
    need = {"image_num": 2, "tools": ("search", "code")}
    none = score(doc(call("edit"), call("edit", at=1), **need), text(), image()).reward  # type: ignore[arg-type]
    half = score(doc(call(), call("edit", at=1), **need), text(), image()).reward  # type: ignore[arg-type]
    both = score(doc(call(), call("code", at=1), **need), text(), image()).reward  # type: ignore[arg-type]
    assert 0 < none < half < both == pytest.approx(1.0)


def test_a_verdict_on_a_document_without_pictures_is_not_read() -> None:
    for kind in KINDS:
        bare = doc(image_num=0)
        assert score(bare, text(), image(1, 1, 1), kind).reward == score(bare, text(), None, kind).reward


def test_the_image_judge_is_asked_where_its_verdict_is_read() -> None:
    assert [wants_image_verdict(doc(*searches(v))) for v in (0, 1, 10, 11)] == [False, True, True, False]
    assert not wants_image_verdict(doc(call(status="failed")))


def test_an_unknown_kind_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="unknown reward kind 'best': known are default, published"):
        score(doc(), text(), None, "best")


def test_components_name_everything_that_the_sums_are_made_of() -> None:
    parts = score(doc(call(), call("code", at=1)), text(4, 3), image(2, 3, 4)).components
    assert parts == pytest.approx(
        {
            "rule": 0.7,
            "rule_strict": 0.0,
            "text": 4,
            "image_tags": 3,
            "image_quality": 2,
            "task_relevance": 3,
            "text_image_relevance": 4,
            "r_llm": 0.675,
            "r_mllm": 0.5,
            "r_mllm_published": 0.5,
            "missed": 0.0,
            "r_tool": 1.0,
            "coverage": 1.0,
            "precision": 0.5,
            "fit": 0.5,
            "images": 2,
            "calls": 2,
        }
    )


marks = st.floats(1, 5)
calls = st.lists(
    st.builds(
        call,
        st.sampled_from(["search", "code", "edit", "diffusion"]),
        st.sampled_from(["ok", "failed", "invalid"]),
        st.integers(1, 3),
        st.integers(0, 99),
    ),
    max_size=6,
)
documents = st.builds(
    lambda made, image_num, tools: doc(*made, image_num=image_num, tools=tuple(tools)),
    calls,
    st.sampled_from([-1, 0, 1, 2, 5, 99]),
    st.sets(st.sampled_from(["search", "code", "edit"]), max_size=3),
)


@settings(deadline=None)
@given(documents, marks, marks, st.tuples(marks, marks, marks), st.sampled_from(sorted(KINDS)), st.booleans())
def test_rewards_lie_in_0_to_1(
    case: Rendered, t: float, i: float, m: tuple[float, float, float], kind: str, multimodal: bool
) -> None:
    got = score(case, text(t, i), image(*m), kind, multimodal)
    assert 0 <= got.reward <= 1 + 1e-9
    assert 0 <= got.reward_strict <= 1 + 1e-9
    assert all(isinstance(value, float) for value in got.components.values())


@settings(deadline=None)
@given(
    documents, st.tuples(marks, marks, marks, marks, marks), st.integers(0, 4), marks, st.sampled_from(sorted(KINDS))
)
def test_no_better_mark_of_a_judge_lowers_a_reward(
    case: Rendered, low: tuple[float, ...], place: int, mark: float, kind: str
) -> None:
    high = tuple(max(value, mark) if i == place else value for i, value in enumerate(low))
    before, after = (score(case, text(*m[:2]), image(*m[2:]), kind) for m in (low, high))
    assert after.reward >= before.reward - 1e-9
    assert after.reward_strict >= before.reward_strict - 1e-9


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_a_better_rule_raises_the_reward_of_the_same_calls(n: int, a: int, b: int) -> None:
    first, second = (score(doc(*searches(v), image_num=n), text(), image()) for v in (a, b))
    if first.components["rule"] < second.components["rule"] and max(a, b) <= 10:
        assert first.reward < second.reward
        assert first.reward_strict <= second.reward_strict


@pytest.mark.parametrize("kind", KINDS)
def test_the_gold_documents_score_through_the_whole_chain(kind: str) -> None:
    for draft in GOLD.values():
        case = draft.render()
        got = score(case, RubricTextJudge().judge(case), RubricImageJudge().judge(case), kind)
        assert got.accurate
        assert got.reward >= 0.85
