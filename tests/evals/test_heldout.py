from typing import Any

import pytest

from evals.heldout import class_of, noise, summarise


def row(tools: list[str], calls: int, accurate: bool, reward: float | None) -> dict[str, Any]:
    return {"tools": tools, "calls": [{}] * calls, "accurate": accurate, "reward_strict": reward}


def test_a_prompt_is_of_the_kind_of_its_tools() -> None:
    assert [class_of({"tools": t}) for t in ([], ["code"], ["code", "edit"])] == ["none", "code", "several"]


def test_means_are_taken_over_scored_documents_and_by_kind() -> None:
    summary = summarise(
        [
            row(["code"], 1, True, 1.0),
            row(["code"], 2, True, 0.5),  # a call too many: accurate, but not the exact plan
            row(["code"], 1, False, 0.0),
            row([], 0, True, 0.9),
            row([], 0, False, None),  # never scored
        ]
    )
    assert (summary["documents"], summary["unscored"]) == (4, 1)
    assert (summary["reward"], summary["tool_accuracy"], summary["exact_plan"]) == (0.6, 0.75, 0.5)
    code = summary["by_class"]["code"]
    assert (code["documents"], code["reward"], code["tool_accuracy"]) == (3, 0.5, 2 / 3)
    assert code["exact_plan"] == 1 / 3


def test_no_documents_are_no_error() -> None:
    assert summarise([]) == {
        "documents": 0, "unscored": 0, "reward": 0.0, "tool_accuracy": 0.0, "exact_plan": 0.0, "by_class": {},
    }  # fmt: skip


def test_the_noise_of_a_difference_is_that_of_both_means() -> None:
    assert noise([0.0, 1.0] * 50, [0.5] * 100) == pytest.approx(0.05025, abs=1e-5)
    assert noise([0.0, 1.0] * 50, [0.0, 1.0] * 50) == pytest.approx(0.05025 * 2**0.5, abs=1e-5)
