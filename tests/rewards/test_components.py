"""Terms of a reward: what their sum is, and what is refused."""

from __future__ import annotations

import pytest

from rewards.components import DEFAULT, PUBLISHED, Term, check, total


def test_the_published_terms_are_the_papers_sum() -> None:
    assert total(PUBLISHED, {"rule": 0.5, "r_mllm_published": 0.75, "r_llm": 0.425}) == pytest.approx(
        0.2 * 0.5 + 0.3 * 0.75 * 0.5 + 0.5 * 0.425
    )


def test_the_default_terms_are_its_product() -> None:
    parts = {"rule": 0.7, "fit": 0.5, "r_llm": 0.6, "r_mllm": 0.25}
    assert total(DEFAULT, parts) == pytest.approx(0.7 * (0.2 + 0.8 * 0.5) * (0.4 + 0.4 * 0.6 + 0.2 * 0.25))


def test_a_range_may_point_downwards_and_keeps_what_lies_outside() -> None:
    cost = {"calls": Term(1.0, range=(4.0, 2.0))}
    assert [total(cost, {"calls": n}) for n in (1.0, 2.0, 3.0, 4.0, 9.0)] == [1, 1, 0.5, 0, 0]


def test_a_mark_of_pictures_adds_nothing_where_there_is_no_picture() -> None:
    assert total({"image_quality": Term(1.0, range=(1, 5)), "rule": Term(0.5)}, {"rule": 1.0}) == 0.5


def test_a_gate_on_a_component_that_the_document_lacks_is_an_error() -> None:
    with pytest.raises(ValueError, match="gate 'process' of component 'rule' is missing"):
        total({"rule": Term(1.0, {"process": 0.0})}, {"rule": 1.0})


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({}, "at least one term"),
        ({"ruel": Term(1.0)}, "unknown component 'ruel'; did you mean 'rule'"),
        ({"rule": Term(float("nan"))}, "weight nan: give a finite number"),
        ({"rule": Term(float("inf"))}, "weight inf"),
        ({"rule": Term(1.0, {"fitt": 0.0})}, "unknown gate of component 'rule': 'fitt'; did you mean 'fit'"),
        ({"rule": Term(1.0, {"images": 0.0})}, "cannot have the gate 'images'"),
        ({"rule": Term(1.0, {"fit": 1.5})}, "floor 1.5"),
        ({"rule": Term(1.0, range=(1.0, 1.0))}, "two different finite numbers"),
    ],
)
def test_terms_that_cannot_be_summed_are_refused_in_one_sentence(terms: dict[str, Term], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(terms)
