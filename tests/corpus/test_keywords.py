import pytest

from corpus.grammar import prompts
from corpus.keywords import measure, predict


@pytest.mark.parametrize(
    ("question", "tools"),
    [
        ("Show me the flag of Kenya.", {"search"}),
        ("Draw a red star at the top over a sea.", {"diffusion"}),
        ("Show me 3 apples and 5 pears as bars.", {"code"}),
        ("Here is my photo of a cat: make it grey.", {"edit"}),
        ("Show me the flag of Kenya and also 3 apples and 5 pears in bars.", {"search", "code"}),
        ("Describe the flag of Kenya.", set()),
        ("", set()),
    ],
)
def test_plain_questions_are_understood(question: str, tools: set[str]) -> None:
    assert predict(question) == tools


@pytest.mark.parametrize("split", ["train", "heldout", "unseen"])
def test_the_rule_does_not_solve_the_prompts_but_is_no_straw_man(split: str) -> None:
    assert 0.5 <= measure(prompts(600, 0, split))["exact_plan"] <= 0.8


def test_a_plan_with_a_tool_too_many_is_accurate_but_not_exact() -> None:
    prompt = next(p for p in prompts(600, 0, "train") if p.tools == ("search",) and predict(p.question) > {"search"})
    assert measure([prompt]) == {"tool_accuracy": 1.0, "exact_plan": 0.0}


def test_measuring_without_prompts_is_refused() -> None:
    with pytest.raises(ValueError, match="no prompts"):
        measure([])
