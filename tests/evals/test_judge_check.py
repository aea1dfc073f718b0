"""Instruments of trust, measured on judges whose faults are known, and the built-in judges on planted flaws."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evals.judge_check import check, direct
from evals.pairs import Pair, PairsError, document, load
from evals.planted import pairs
from rewards.base import Rendered, Verdict
from rewards.judges.rubric import RubricImageJudge, RubricTextJudge

PLANTED = pairs()
TAG = "<imgen>{'source': 'search', 'description': 'x', 'params': {'query': 'x'}}</imgen>"


def of(judge: str) -> list[Pair]:
    return [pair for pair in PLANTED if pair.judge == judge]


def marked(mark: float) -> Verdict:
    return Verdict({"text": mark})


def plain(*texts: tuple[str, str]) -> list[Pair]:
    return [Pair("text", "x", document("q", better, []), document("q", worse, [])) for better, worse in texts]


def test_the_built_in_set_has_every_flaw_that_is_known() -> None:
    assert {pair.flaw for pair in PLANTED} == {
        *("wrong number", "wrong picture", "clipped chart", "blank chart", "announced image", "code fence"),
        *("missing image", "repeated pictures", "off-topic text", "padding", "flattery of the judge"),
        *("instructions in text", "instructions in an image"),
    }


def test_text_of_a_document_never_gives_orders_to_the_built_in_judges() -> None:
    assert check(direct(RubricTextJudge()), of("text")).by_flaw["instructions in text"] == 1.0
    assert check(direct(RubricImageJudge()), of("image")).by_flaw["instructions in an image"] == 1.0


def test_the_built_in_text_judge_sees_every_planted_flaw() -> None:
    trust = check(direct(RubricTextJudge()), of("text"))
    assert trust.by_flaw == dict.fromkeys(trust.by_flaw, 1.0)
    assert (trust.failures, trust.position_bias, trust.flips, trust.self_consistency) == (0, 0, 0, 1)


def test_the_built_in_image_judge_sees_every_planted_flaw() -> None:
    trust = check(direct(RubricImageJudge()), of("image"))
    assert trust.by_flaw == dict.fromkeys(trust.by_flaw, 1.0)


def test_a_judge_that_obeys_is_found_out() -> None:
    def obedient(docs: list[Rendered]) -> list[Verdict]:
        return [marked(5 if "5" in doc.text or "highest score" in doc.text else 3) for doc in docs]

    assert check(obedient, of("text")).by_flaw["instructions in text"] == 0.0


def test_a_judge_that_prefers_the_first_of_a_batch_has_a_position_bias() -> None:
    trust = check(lambda docs: [marked(4), marked(3)], plain(("a", "b"), ("c", "d")))
    assert (trust.position_bias, trust.flips, trust.agreement) == (1.0, 1.0, 1.0)


def test_a_judge_that_likes_length_leans_to_it_by_as_much_as_it_is_wrong() -> None:
    both_ways = plain(("a", "aaaa"), ("aaaa", "a"))
    assert check(lambda docs: [marked(1 + len(d.text)) for d in docs], both_ways).length_bias == 0.5
    assert check(lambda docs: [marked(5 - len(d.text)) for d in docs], both_ways).length_bias == -0.5
    assert check(lambda docs: [marked(3) for _ in docs], both_ways).length_bias == 0.0


def test_a_judge_that_counts_pictures_leans_to_them() -> None:
    flag = next(iter(PLANTED[0].better.blobs.values()))
    bare, pictured = document("q", "text", []), document("q", f"text {TAG}", [flag])
    trust = check(lambda docs: [marked(1.0 + len(d.calls)) for d in docs], [Pair("text", "x", bare, pictured)])
    assert trust.image_count_bias == 1.0


def test_a_judge_that_changes_its_mind_is_inconsistent() -> None:
    turns = iter([5, 1, 1, 5, 5, 1])  # in order, again, turned round
    trust = check(lambda docs: [marked(next(turns)), marked(next(turns))], plain(("a", "b")), repeats=2)
    assert trust.self_consistency == 0.0


def test_calibration_is_the_gap_between_claimed_and_kept() -> None:
    sure = check(lambda docs: [marked(5 if d.text == "good" else 1) for d in docs], plain(("good", "bad")))
    wrong = check(lambda docs: [marked(1 if d.text == "good" else 5) for d in docs], plain(("good", "bad")))
    toss = check(lambda docs: [marked(3) for _ in docs], plain(("good", "bad")))
    assert (sure.calibration_error, wrong.calibration_error, toss.calibration_error) == (0, 1, 0)


def test_a_judge_that_fails_is_counted_and_decides_nothing() -> None:
    trust = check(lambda docs: ["down"] * len(docs), plain(("a", "b")), repeats=1)
    assert (trust.failures, trust.agreement, trust.self_consistency) == (4, None, None)


def test_a_file_of_pairs_is_read_with_its_pictures(tmp_path: Path) -> None:
    flag = next(iter(PLANTED[0].better.blobs.values()))
    (tmp_path / "flag.png").write_bytes(flag.data)
    better = {"text": f"see {TAG}", "pictures": ["flag.png"], "provenance": [{"title": "Flag"}]}
    row = {"judge": "text", "flaw": "none", "question": "q", "image_num": 1, "better": better, "worse": {"text": "see"}}
    (tmp_path / "p.jsonl").write_text(f"\n{json.dumps(row)}\n")
    (pair,) = load(tmp_path / "p.jsonl")
    assert pair.better.calls[0].images == (flag.sha256,)
    assert pair.better.calls[0].provenance == {"title": "Flag"}
    assert not pair.worse.calls


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no pair"),
        ("\n\n", "holds no pair"),
        ('\n{"judge": "text"', "line 2 is no pair"),
        ("[]", "line 1 is no pair: it is not a JSON object"),
        (
            '{"judge": "smell", "question": "q", "better": {"text": ""}, "worse": {"text": ""}}',
            "not one of text, image",
        ),
        ('{"judge": "text", "question": "q", "better": {"text": ""}}', "line 1 is no pair: 'worse' is missing"),
        (
            '{"judge": "text", "question": "q", "better": {"text": "", "pictures": ["none.png"]}, "worse": {}}',
            "line 1 is no pair: .*none.png",
        ),
    ],
)
def test_a_bad_file_of_pairs_is_refused_by_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(PairsError, match=message):
        load(tmp_path / "p.jsonl")


def test_a_file_of_pairs_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PairsError, match="cannot read the pairs"):
        load(tmp_path / "none.jsonl")
