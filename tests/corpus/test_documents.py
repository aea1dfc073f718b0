import ast
from collections import Counter
from random import Random

import pytest

from agent.protocol import Call, Text, check_references, parse
from corpus.documents import PIECES, TOOLS, cold_start, gold, wrong_plan
from corpus.grammar import prompts
from replay.record import Prompt
from rewards.base import CallOutcome, Rendered
from rewards.judges.rubric import RubricTextJudge

PROMPTS = [p for split in ("train", "heldout", "unseen") for p in prompts(300, 1, split)]
COLD = cold_start(1200, 2)


def calls(prompt: Prompt, document: str) -> list[Call]:
    """The calls of a document, all of which must be valid."""
    segments = check_references(parse(document), len(prompt.images))
    assert all(isinstance(s, Call | Text) for s in segments), document
    return [s for s in segments if isinstance(s, Call)]


def accurate(prompt: Prompt, document: str) -> bool:
    used = {c.source for c in calls(prompt, document)}
    return set(prompt.tools) <= used if prompt.tools else not used


def test_the_gold_document_follows_the_plan() -> None:
    for p in PROMPTS:
        made = calls(p, gold(p, Random(0)))
        assert tuple(c.source for c in made) == p.tools
        assert len(made) == max(0, p.image_num)


def test_the_gold_document_satisfies_the_text_judge() -> None:
    judge = RubricTextJudge()
    for p in PROMPTS[300:600]:
        document = gold(p, Random(0))
        made = [CallOutcome(c.source, c.description, c.params, c.start, c.end, "ok") for c in calls(p, document)]
        verdict = judge.judge(Rendered(p.question, document, made, p.image_num, p.tools))
        assert sum(verdict.scores.values()) >= 8, (p.question, document, verdict.reasons)


def test_the_gold_document_asks_each_tool_for_what_the_question_says() -> None:
    for p in PROMPTS:
        for call in calls(p, gold(p, Random(0))):
            if call.source == "search":
                assert call.params["query"] == p.meta["query"]
            elif call.source == "diffusion":
                assert call.params["prompt"] == p.meta["scene"]
            elif call.source == "edit":
                assert call.params == {"img_index": 0, "prompt": p.meta["change"]}


def test_the_gold_chart_has_the_numbers_and_labels_of_the_question() -> None:
    for p in (p for p in PROMPTS if "code" in p.tools):
        (code,) = (c.params["code"] for c in calls(p, gold(p, Random(0))) if c.source == "code")
        bars = next(n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call) and n.args[1:])
        labels, values = map(ast.literal_eval, bars.args)
        assert labels == p.meta["labels"].split(",")
        assert values == [int(v) for v in p.meta["values"].split(",")]


def test_documents_begin_with_prose_that_does_not_tell_the_plan() -> None:
    first = {p.id: {gold(p, Random(i)).split("\n")[0] for i in range(9)} for p, _ in COLD}
    assert all(document.split("\n")[0] in first[p.id] for p, document in COLD)


def test_every_document_has_prose_after_its_last_tag_and_none_announces_an_image() -> None:
    for _, document in COLD:
        lines = document.split("\n")
        prose = [line for line in lines if "<imgen>" not in line]
        assert len(lines) >= 2 and "<imgen>" not in lines[-1]
        assert not any(word in line.lower() for line in prose for word in ("here is", "image", "picture", ":"))


@pytest.mark.parametrize("right", [0.0, 0.25, 0.5, 1.0])
def test_the_cold_start_is_right_as_often_as_it_is_told(right: float) -> None:
    documents = cold_start(900, 4, right)
    assert sum(accurate(p, d) for p, d in documents) / 900 == pytest.approx(right, abs=0.05 if 0 < right < 1 else 0)


def test_the_cold_start_is_right_about_half_of_the_time_in_every_class() -> None:
    right: Counter[str] = Counter(p.meta["class"] for p, d in COLD if accurate(p, d))
    assert all(0.38 <= n / 200 <= 0.62 for n in right.values()) and len(right) == 6


def test_no_wrong_plan_is_frequent_and_all_are_valid() -> None:
    rng = Random(0)
    for p in PROMPTS[:60]:
        plans = Counter(wrong_plan(p, rng) for _ in range(400))
        assert max(plans.values()) / 400 <= 0.35
        assert p.tools not in plans and {len(plan) for plan in plans} - {0} == {1, 2, 3}
        assert all(set(plan) <= set(TOOLS) for plan in plans)
        assert p.images or all(plan[:1] != ("edit",) for plan in plans)


def test_the_cold_start_uses_every_tool_also_where_it_is_wrong() -> None:
    wrong = Counter(c.source for p, d in COLD if not accurate(p, d) for c in calls(p, d))
    assert set(wrong) == set(TOOLS) and min(wrong.values()) > 50


def test_the_cold_start_comes_of_training_prompts_only() -> None:
    held = {p.question for p in PROMPTS[300:]}
    assert all(p.id.startswith("train-") and p.question not in held for p, _ in COLD)


def test_a_seed_gives_the_same_cold_start_again_and_another_seed_another() -> None:
    assert cold_start(60, 2) == COLD[:60]
    assert cold_start(60, 3) != COLD[:60]


def test_the_pieces_are_in_most_tags_and_make_documents_much_shorter() -> None:
    text = "".join(d for _, d in COLD)
    assert all(text.count(piece) > 50 for piece in PIECES)
    assert sum(text.count(piece) * len(piece) for piece in PIECES) > 0.3 * len(text)


def test_documents_are_short() -> None:
    assert sum(len(d) for _, d in COLD) / len(COLD) < 260
    assert max(len(gold(p, Random(0))) for p in PROMPTS) < 480


@pytest.mark.parametrize("right", [-0.1, 1.5])
def test_a_share_that_is_no_probability_is_refused(right: float) -> None:
    with pytest.raises(ValueError, match="right must lie between 0 and 1"):
        cold_start(6, 0, right)


def test_a_prompt_that_is_not_of_the_grammar_has_no_gold_document() -> None:
    with pytest.raises(ValueError, match="prompt 'a' holds no values of slots"):
        gold(Prompt(id="a", question="Show me the moon."), Random(0))
