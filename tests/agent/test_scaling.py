"""Test-time scaling with real tools and rubric judges, and a writer that writes what it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from agent.answer import Document
from agent.export import to_json
from agent.protocol import format_call
from agent.scaling import STAGES, scaled
from agent.workshop import CannotWrite, Draft, Messages, Unjudged, Workshop
from rewards.base import Rendered, Verdict
from rewards.expected import Ask, Expected, expected, rendered
from rewards.judges.rubric import RubricImageJudge, RubricTextJudge
from tools.local import LocalTools

QUESTION = "Show me the flag of Kenya and say what its colours mean."
FLAG = format_call("search", "The flag of Kenya, black, red and green", {"query": "flag of Kenya"})
WORDS = "Kenya's flag has colours that stand for its people, their struggle and the land."
GOOD = f"{WORDS}\n\n{FLAG}\n\nThe shield at its centre guards freedom."
BROKEN = f"{WORDS}\n\n<imgen>{{'source': 'search'}}</imgen>\n\nThe end of it."
NOTHING = f"{WORDS}\n\n{format_call('search', 'A zzyzx', {'query': 'zzyzx'})}\n\nThe end of it."
BARS = format_call("code", "Two bars", {"code": "plt.bar(['a', 'b'], [1, 2]); plt.title('Bars')"})


class Scripted:
    """Writes the answers that it is given, one after another; told and untold ones apart."""

    def __init__(self, answers: Sequence[str], told: Sequence[str] = (), wrote_on: Sequence[str] = ()) -> None:
        self._answers, self._told, self._wrote_on = iter(answers), iter(told), iter(wrote_on)
        self.asked: list[str] = []

    async def write(self, messages: Messages, written: str, seed: int) -> Draft:
        if len(messages) > 1:
            self.asked.append(messages[-1]["content"])
        found = next(self._wrote_on if written else self._told if len(messages) > 1 else self._answers, None)
        if found is None:
            raise CannotWrite("the conversation is too long")
        return Draft(written + found, 10)


@pytest.fixture(scope="module")
def tools() -> Iterator[LocalTools]:
    ways: dict[str, tuple[str, Mapping[str, Any], float]] = {n: (n, {}, 60.0) for n in ("search", "code", "edit")}
    with LocalTools(ways) as tools:
        yield tools


def asks(judge: Any) -> Ask:
    async def ask(doc: Rendered) -> Verdict:
        return judge.judge(doc)

    return ask


JUDGES = Expected(asks(RubricTextJudge()), asks(RubricImageJudge()))


def work(tools: LocalTools, writer: Any, n: int, stages: Sequence[str] = STAGES, judges: Any = JUDGES) -> Document:
    shop = Workshop([{"role": "user", "content": QUESTION}], (), writer, tools, judges, document_s=60)
    return asyncio.run(scaled(shop, n, stages))


def test_malformed_and_failed_candidates_are_dropped_and_the_rest_is_kept(tools: LocalTools) -> None:
    document = work(tools, Scripted([BROKEN, NOTHING, GOOD]), 3, ("candidates", "checks"))
    assert document.text == GOOD and document.failures == 0
    assert document.scaling[1].changed == ("dropped 1 malformed", "dropped 1 with calls that fail")


def test_where_every_candidate_fails_the_one_that_fails_least_is_kept(tools: LocalTools) -> None:
    document = work(tools, Scripted([BROKEN + BROKEN, BROKEN]), 2, ("candidates", "checks"))
    assert document.text == BROKEN


def test_what_most_candidates_call_is_taken_for_what_was_wanted(tools: LocalTools) -> None:
    chart = f"{WORDS}\n\n{BARS}\n\nThe shield at its centre guards freedom."
    assert work(tools, Scripted([chart, GOOD, GOOD]), 3).calls[0].source == "search"
    assert work(tools, Scripted([GOOD, WORDS, WORDS]), 3).calls == ()


def test_the_expected_reward_is_the_mean_over_what_may_have_been_wanted() -> None:
    doc = rendered(Document(QUESTION, WORDS))
    verdict = RubricTextJudge().judge(doc)
    none, one = expected(doc, verdict, None, {(): 1.0}), expected(doc, verdict, None, {("search",): 1.0})
    assert none > one == 0.0 and expected(doc, verdict, None, {(): 0.25, ("search",): 0.75}) == pytest.approx(none / 4)


def test_code_that_fails_is_repaired_from_its_error(tools: LocalTools) -> None:
    wrong = BARS.replace("[1, 2]", "values")
    writer = Scripted([f"{WORDS}\n\n{wrong}\n\nThe end of it."], told=[f"Sorry. {BARS}"])
    document = work(tools, writer, 2, ("candidates", "enhancement"))
    assert document.calls[0].status == "ok" and BARS in document.text and "The end of it." in document.text
    assert "'values' is not defined" in writer.asked[0] and "tag again" in writer.asked[0]
    assert document.scaling[-1].changed[0].startswith("call 1 (code): written anew, score ")


def test_a_chart_with_faults_is_drawn_again_until_the_check_finds_none(tools: LocalTools) -> None:
    crowded = BARS.replace("plt.title('Bars')", "plt.title('Bars'); plt.text(0, 1, 'x' * 200)")
    writer = Scripted([f"{WORDS}\n\n{crowded}\n\nThe end of it."], told=[BARS])
    before = work(tools, Scripted([f"{WORDS}\n\n{crowded}\n\nThe end of it."]), 1)
    assert before.calls[0].provenance["warnings"]
    assert "warnings" not in work(tools, writer, 2, ("candidates", "enhancement")).calls[0].provenance


def test_a_policy_that_takes_no_instructions_writes_on_from_the_place_of_the_failure(tools: LocalTools) -> None:
    writer = Scripted([NOTHING], wrote_on=[f"{FLAG}\n\nThe end of it."])
    document = work(tools, writer, 2, ("candidates", "enhancement"))
    assert document.calls[0].status == "ok" and document.text == f"{WORDS}\n\n{FLAG}\n\nThe end of it."


def test_a_malformed_tag_is_written_again_or_goes(tools: LocalTools) -> None:
    repaired = work(tools, Scripted([BROKEN], told=[FLAG]), 2, ("candidates", "enhancement"))
    assert [c.status for c in repaired.calls] == ["ok"] and repaired.text.count("<imgen>") == 1
    unreadable = BROKEN.replace("{'source': 'search'}", "flag of Kenya")
    without = work(tools, Scripted([unreadable], wrote_on=["The end of it."]), 2, ("candidates", "enhancement"))
    assert without.calls == ()


def test_of_several_hits_the_one_that_fits_is_picked(tools: LocalTools) -> None:
    vague = format_call("search", "The flag of Kenya", {"query": "Kenya"})
    first = work(tools, Scripted([GOOD.replace(FLAG, vague)]), 1)
    picked = work(tools, Scripted([GOOD.replace(FLAG, vague)]), 3, ("candidates", "enhancement"))
    assert "Flag" in picked.calls[0].provenance["title"]
    assert first.calls[0].provenance["title"] == picked.calls[0].provenance["title"] or any(
        "rank" in line for line in picked.scaling[-1].changed
    )


def test_polishing_keeps_the_calls_and_takes_only_what_is_better(tools: LocalTools) -> None:
    poor = f"Flag.\n\n{FLAG}\n\nFlag."
    better = f"{WORDS}\n\n{FLAG}\n\nThe shield at its centre guards freedom."
    assert work(tools, Scripted([poor], told=[better]), 2, ("candidates", "polishing")).text == better
    for worse in ("Flag.", better.replace(FLAG, BARS), f"x {FLAG} x"):
        assert work(tools, Scripted([GOOD], told=[worse]), 2, ("candidates", "polishing")).text == GOOD


def test_what_each_stage_spent_and_changed_is_in_the_documents_json(tools: LocalTools) -> None:
    row = to_json(work(tools, Scripted([GOOD, GOOD, BROKEN]), 3))
    assert [stage["name"] for stage in row["scaling"]] == list(STAGES)
    assert row["scaling"][0]["tokens"] == 30 and row["scaling"][0]["changed"] == ("2 different answers of 3",)
    assert row["scaling"][1]["calls"] == 1 and row["scaling"][2]["judged"] == 1


def test_judges_that_are_down_leave_the_rules(tools: LocalTools) -> None:
    class Down:
        async def score(self, document: Document, plans: object) -> float:
            raise Unjudged("the text judge is down")

    document = work(tools, Scripted([NOTHING, GOOD]), 2, ("candidates", "selection"), Down())
    assert document.text == GOOD and "judged by rules alone: the text judge is down" in document.scaling[-1].changed


def test_a_question_that_is_too_long_says_so(tools: LocalTools) -> None:
    with pytest.raises(CannotWrite, match="too long"):
        work(tools, Scripted([]), 2)
