"""`llmi judge check`: what it reports, and one clear line where it cannot."""

import json
import sys
from pathlib import Path

import pytest

from cluster import cli
from cluster.judge import EXAMPLE as TINY
from rewards.base import JudgeFailed, Rendered, Verdict


class LikesLength:
    """A judge with a known fault."""

    name, sees_images = "length", False

    def judge(self, doc: Rendered) -> Verdict:
        """The longer, the better."""
        return Verdict({"text": 1 + min(4.0, len(doc.text) / 400)})


class Down:
    """A judge that never answers."""

    name, sees_images = "down", False

    def judge(self, doc: Rendered) -> Verdict:
        """Fails."""
        raise JudgeFailed("nobody listens at http://localhost:9")


def llmi(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["llmi", "judge", "check", *args])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def use(judge: type) -> str:
    return f"judges.text.judge={__name__}:{judge.__name__}"


EXAMPLE = str(TINY)


def test_the_built_in_judges_are_checked_on_the_built_in_pairs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert llmi(monkeypatch, "--json", "--repeats", "1") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"]["agreement"] == 1 and found["image"]["agreement"] > 0.9
    assert found["text"]["failures"] == found["image"]["failures"] == 0


def test_a_judge_that_likes_length_is_found_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert llmi(monkeypatch, EXAMPLE, use(LikesLength), "--judge", "text") == 0
    out = capsys.readouterr().out
    assert "length bias" in out and "padding" in out and "image" in out
    assert llmi(monkeypatch, EXAMPLE, use(LikesLength), "--judge", "text", "--json") == 0
    assert json.loads(capsys.readouterr().out)["text"]["length_bias"] > 0.3


def test_a_judge_that_is_down_is_an_error_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert llmi(monkeypatch, EXAMPLE, use(Down)) == 1
    assert capsys.readouterr().err == (
        "llmi: no pair has all its verdicts of the text judge: nobody listens at http://localhost:9\n"
    )


def test_a_file_of_pairs_is_used_instead_of_the_built_in_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    row = {
        "judge": "text",
        "question": "What is a fig?",
        "better": {"text": "A fig is a fruit."},
        "worse": {"text": ""},
    }
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    assert llmi(monkeypatch, "--json", "--pairs", str(tmp_path / "pairs.jsonl")) == 0
    found = json.loads(capsys.readouterr().out)
    assert (list(found), found["text"]["pairs"], found["text"]["by_flaw"]) == (["text"], 1, {"other": 1.0})
    assert llmi(monkeypatch, "--judge", "image", "--pairs", str(tmp_path / "pairs.jsonl")) == 2
    assert "holds no pair for the image judge" in capsys.readouterr().err


@pytest.mark.parametrize("judge", ["no.such:Judge", "rewards.judges.rubric:None_", "json"])
def test_a_judge_that_is_none_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], judge: str
) -> None:
    assert llmi(monkeypatch, EXAMPLE, f"judges.text.judge={judge}") == 2
    err = capsys.readouterr().err
    said = f"llmi: {EXAMPLE}: judges.text.judge: {judge!r} cannot be imported: "
    assert err.startswith(said) and err.count("\n") == 1


def test_an_option_that_a_judge_does_not_take_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert llmi(monkeypatch, EXAMPLE, use(Down), "judges.text.options={marks: 1}") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"llmi: judges.text: cannot make the judge '{__name__}:Down': ") and err.count("\n") == 1
