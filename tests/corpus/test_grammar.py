import re
from collections import Counter

import pytest

from corpus import grammar, phrases
from corpus.grammar import CHANGES, ITEMS, SPLITS, UNSEEN_SHAPES, phrasings, prompts
from corpus.phrases import CLASSES
from corpus.scenes import SHAPES
from replay.record import Prompt

TRAIN, HELD_OUT, UNSEEN = (prompts(n, 3, split) for n, split in ((2400, "train"), (600, "heldout"), (400, "unseen")))
EVERY = TRAIN + HELD_OUT + UNSEEN


@pytest.mark.parametrize("split", SPLITS)
def test_each_class_is_a_sixth_of_a_split(split: str) -> None:
    counts = Counter(p.meta["class"] for p in prompts(120, 0, split))
    assert counts == dict.fromkeys(CLASSES, 20)


def test_every_batch_of_six_holds_every_class() -> None:
    assert all({p.meta["class"] for p in TRAIN[i : i + 6]} == set(CLASSES) for i in range(0, 2400, 6))


def test_prompts_are_distinct_and_have_ids_of_their_own() -> None:
    assert len({p.id for p in EVERY}) == len({p.question for p in EVERY}) == len(EVERY)


def test_class_tools_and_image_number_agree() -> None:
    for p in EVERY:
        cls = p.meta["class"]
        assert cls == ("several" if len(p.tools) == 2 else p.tools[0] if p.tools else "none")
        assert p.image_num == (len(p.tools) or -1)
        assert len(set(p.tools)) == len(p.tools)


def test_several_tools_come_in_every_pair_that_makes_sense() -> None:
    pairs = {p.tools for p in TRAIN if len(p.tools) == 2}
    made = {("search", "diffusion"), ("search", "code"), ("diffusion", "code")}
    assert pairs == made | {("search", "edit"), ("diffusion", "edit")}


def test_a_picture_comes_along_exactly_where_the_text_says_so() -> None:
    for p in EVERY:
        says = re.search(r"\b(my( own)?|this|the) (photo|snapshot|view)\b(?! club)", p.question) is not None
        assert len(p.images) == says, p.question
    assert any(p.images for p in TRAIN if p.meta["class"] == "none")


def test_given_pictures_are_encoded_pictures() -> None:
    kinds = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF")
    assert all(image.startswith(kinds) for p in EVERY for image in p.images)


def test_there_are_many_phrasings_and_each_is_listed_once() -> None:
    for split, least in (("train", 500), ("heldout", 500), ("unseen", 200)):
        listed = phrasings(split)
        assert len(listed) == len(set(listed)) >= least
        assert {p.cls for p in listed} == set(CLASSES)
    requests = {r for pattern in phrases.TRAIN for r in phrases.expand(pattern.text)}
    assert len(requests) >= 250


def test_no_wording_stands_for_two_classes() -> None:
    texts = Counter(p.text for split in ("train", "unseen") for p in phrasings(split))
    assert max(texts.values()) == 1


def test_the_phrasing_of_every_prompt_is_a_listed_one_of_its_class() -> None:
    seen, unseen = set(phrasings("train")), set(phrasings("unseen"))
    assert all((p.meta["class"], p.meta["phrasing"]) in seen for p in TRAIN + HELD_OUT)
    assert all((p.meta["class"], p.meta["phrasing"]) in unseen for p in UNSEEN)


def test_no_question_is_in_two_splits_whatever_the_seeds() -> None:
    questions = {s: {p.question for seed in range(2) for p in prompts(600, seed, s)} for s in SPLITS}
    assert not questions["train"] & questions["heldout"]
    assert not (questions["train"] | questions["heldout"]) & questions["unseen"]


def test_unseen_prompts_share_no_phrasing_and_no_entity_with_training() -> None:
    def values(some: list[Prompt], *names: str) -> set[str]:
        return {v for p in some for name in names for v in p.meta.get(name, "").split(",") if v}

    seen = TRAIN + HELD_OUT
    for names in (("phrasing",), ("real", "query"), ("scene", "shape"), ("labels",), ("change", "changed")):
        assert values(UNSEEN, *names) and not values(UNSEEN, *names) & values(seen, *names)
    countries = [{w.split(" of ")[-1] for w in values(some, "query") if " of " in w} for some in (seen, UNSEEN)]
    assert not countries[0] & countries[1]


def test_unseen_openers_and_endings_are_never_those_of_training() -> None:
    assert not set(phrases.OPENERS) & set(phrases.UNSEEN_OPENERS)
    assert not set(phrases.ENDINGS) & set(phrases.UNSEEN_ENDINGS)
    assert not {p.text for p in phrases.TRAIN} & {p.text for p in phrases.UNSEEN}
    assert all(not set(seen) & set(unseen) for seen, unseen in (*ITEMS.values(), CHANGES))
    assert set(UNSEEN_SHAPES) < set(SHAPES)


def test_no_question_names_a_tool() -> None:
    name = re.compile(r"\b(search|diffus|cod(e|ing)|edit)", re.IGNORECASE)
    assert not [p.question for p in EVERY if name.search(p.question)]
    assert not [p.text for split in SPLITS for p in phrasings(split) if name.search(p.text)]


def test_every_slot_is_filled_and_its_values_are_in_the_question() -> None:
    for p in EVERY:
        assert not set("{}[]|") & set(p.question)
        for slot in ("real", "scene", "data"):
            assert (f"{{{slot}}}" in p.meta["phrasing"]) == (slot in p.meta)
            assert p.meta.get(slot, "").lower() in p.question.lower()
        for label, value in zip(p.meta.get("labels", "").split(","), p.meta.get("values", "").split(","), strict=True):
            assert f"{value} {label}".strip() in p.question


def test_every_tool_finds_what_it_needs_among_the_values() -> None:
    needs = {"search": "query", "diffusion": "scene", "code": "values", "edit": "change"}
    assert all(needs[tool] in p.meta for p in EVERY for tool in p.tools)


def test_questions_are_short_sentences() -> None:
    for p in EVERY:
        assert len(p.question) <= 190
        assert p.question[0].isupper() or p.question[0].isdigit()
        assert p.question[-1] in ".?"


def test_a_seed_gives_the_same_prompts_again_and_another_seed_others() -> None:
    assert prompts(60, 5, "train") == prompts(60, 5, "train")
    assert prompts(60, 5, "train") == prompts(90, 5, "train")[:60]
    assert not {p.id for p in prompts(60, 5, "train")} >= {p.id for p in prompts(60, 6, "train")}


def test_an_unknown_split_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="unknown split 'test': the grammar has train, heldout, unseen"):
        prompts(6, 0, "test")
    with pytest.raises(ValueError, match="unknown split"):
        phrasings("validation")


def test_more_prompts_than_there_are_is_an_error_that_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    only = UNSEEN[0]
    monkeypatch.setattr(grammar, "_prompt", lambda *_: only)
    with pytest.raises(ValueError, match="6 are too many unseen prompts: the grammar gave 1 distinct ones"):
        prompts(6, 0, "unseen")
