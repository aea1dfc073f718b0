"""Good documents of each class score high, and no way of spoiling one that we know of pays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest
from PIL import Image

from agent.protocol import Call, parse
from corpus import documents, grammar
from rewards.base import CallOutcome, Rendered
from rewards.judges.rubric import RubricTextJudge
from tests.rewards.drafts import FLAG, GOLD, STAR, Draft, Tag, judged, picture, png

OTHER = {"search": "diffusion", "diffusion": "search", "code": "search", "edit": "code"}


def wrong_tool(draft: Draft) -> Draft:
    return draft.with_tags(lambda tag: replace(tag, source=OTHER[tag.source]))


def extra_tag(draft: Draft) -> Draft:
    more = replace(STAR if "diffusion" not in draft.tools else FLAG, made=(picture("cyan"),))
    return replace(draft, parts=(*draft.parts, "\nOne more to look at.\n", more, "\nThat was it."))


def missing_tag(draft: Draft) -> Draft:
    first = draft.tags()[0]
    return replace(draft, parts=tuple(part for part in draft.parts if part is not first))


def invalid_tag(draft: Draft) -> Draft:
    return draft.with_tags(lambda tag: replace(tag, status="invalid"))


def extra_invalid_tag(draft: Draft) -> Draft:
    return replace(draft, parts=(*draft.parts, "\nOne more to look at.\n", replace(STAR, status="invalid")))


def failed_call(draft: Draft) -> Draft:
    return draft.with_tags(lambda tag: replace(tag, status="failed"))


def failed_first(draft: Draft) -> Draft:
    parts = [replace(draft.tags()[0], status="failed"), "\nSo it is tried again.\n", *draft.parts[1:]]
    return replace(draft, parts=(draft.parts[0], *parts))


def announced(draft: Draft) -> Draft:
    return replace(draft, parts=(f"{draft.parts[0]}Here is an image:\n", *draft.parts[1:]))


def fenced(draft: Draft) -> Draft:
    return replace(draft, parts=(f"{draft.parts[0]}```\n", *draft.parts[1:-1], f"\n```{draft.parts[-1]}"))


def off_topic_tag(draft: Draft) -> Draft:
    params: dict[str, dict[str, str | int]] = {
        "search": {"query": "giraffe"},
        "diffusion": {"prompt": "a white boat"},
        "code": {"code": "plt.bar(['cups'], [9])"},
        "edit": {"img_index": 0, "prompt": "blur"},
    }
    found = {"title": "Giraffe", "caption": "A giraffe in the grass."}

    def change(tag: Tag) -> Tag:
        provenance = found if tag.source == "search" else {}
        return replace(tag, params=params[tag.source], description="something else", provenance=provenance)

    return draft.with_tags(change)


def off_topic_text(draft: Draft) -> Draft:
    prose = iter(["The weather will be fine until the week ends.", "\nBring a hat and water.", "\nAnd shoes."])
    return replace(draft, parts=tuple(p if isinstance(p, Tag) else next(prose) for p in draft.parts))


def empty_text(draft: Draft) -> Draft:
    return replace(draft, parts=tuple(draft.tags()))


def repeated_text(draft: Draft) -> Draft:
    prose = str(draft.parts[0]).strip() + " "
    return replace(draft, parts=(prose * 6, *draft.parts[1:]))


def copied_question(draft: Draft) -> Draft:
    return replace(draft, parts=(draft.question, *draft.tags(), draft.question))


def cut_off(draft: Draft) -> Draft:
    return replace(draft, finished=False)


def same_picture_again(draft: Draft) -> Draft:
    return replace(draft, parts=(*draft.parts, "\nOnce more in full.\n", draft.tags()[-1], "\nThat was it."))


def blank_picture(draft: Draft) -> Draft:
    return draft.with_tags(lambda tag: replace(tag, made=(png(Image.new("RGB", (64, 48), "white")),)))


ANY = [extra_tag, extra_invalid_tag, empty_text, repeated_text, cut_off, announced, copied_question]
TAGGED = [
    wrong_tool,
    missing_tag,
    invalid_tag,
    failed_call,
    failed_first,
    fenced,
    off_topic_tag,
    off_topic_text,
    same_picture_again,
    blank_picture,
]
#: What each flaw may reach at most: the choice of tools weighs most.
MOST: dict[Callable[[Draft], Draft], float] = {
    wrong_tool: 0.4,
    extra_tag: 0.6,
    missing_tag: 0.5,
    invalid_tag: 0.1,
    failed_call: 0.1,
    failed_first: 0.75,
}
CASES = [(name, flaw) for name in GOLD for flaw in ANY + (TAGGED if name != "none" else [])]


@pytest.mark.parametrize("name", GOLD)
def test_a_gold_document_scores_at_least_0_85_and_counts_as_accurate(name: str) -> None:
    got = judged(GOLD[name])
    assert got.reward >= 0.85
    assert got.reward_strict == got.reward
    assert got.accurate


@pytest.mark.parametrize(("name", "flaw"), CASES, ids=[f"{name}-{flaw.__name__}" for name, flaw in CASES])
def test_no_flaw_pays(name: str, flaw: Callable[[Draft], Draft]) -> None:
    gold, flawed = judged(GOLD[name]), judged(flaw(GOLD[name]))
    assert flawed.reward < gold.reward - 0.02
    assert flawed.reward_strict < gold.reward_strict - 0.02
    assert flawed.reward <= MOST.get(flaw, 1.0)


@pytest.mark.parametrize("split", ["train", "unseen"])
def test_the_built_in_right_documents_get_high_marks_from_the_text_judge(split: str) -> None:
    for prompt in grammar.prompts(60, 5, split):
        text = documents.gold(prompt, Random(prompt.id))
        tags = [tag for tag in parse(text) if isinstance(tag, Call)]
        calls = [CallOutcome(t.source, t.description, t.params, t.start, t.end, "ok") for t in tags]
        verdict = RubricTextJudge().judge(Rendered(prompt.question, text, calls, prompt.image_num, prompt.tools))
        assert verdict.scores["text"] >= 4, (prompt.question, text, verdict.reasons)
        assert verdict.scores["image_tags"] >= 3, (prompt.question, text, verdict.reasons)
