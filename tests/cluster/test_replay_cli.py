"""`llmi replay`: what it prints and writes, and one clear line where it cannot."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cluster import cli
from replay.record import SCHEMAS, Blob, version
from replay.store import Store

TAG = "<imgen>{'source': 'edit'}</imgen>"
TEXT = f"See \x1b[31mthis:\n{TAG}\nand that:\n{TAG}\n**Done.**"


def picture(colour: str) -> Blob:
    data = io.BytesIO()
    Image.new("RGB", (3, 2), colour).save(data, "PNG")
    return Blob(data.getvalue())


GIVEN, MADE = picture("red"), picture("blue")


def put(store: Store, stage: str, blob: Blob, **values: Any) -> None:
    for i in range(2):
        key = {"trajectory": f"train-000004/{i}", "group": "train-000004", "attempt": 0, "turn": 0}
        row = {name: None for name in SCHEMAS[stage].names} | key | values
        assert store.put(stage, pa.Table.from_pylist([row], SCHEMAS[stage]), [blob]) == ["ok"]


def call(nth: int, **values: Any) -> dict[str, Any]:
    start = [TEXT.index(TAG), TEXT.rindex(TAG)][nth]
    defaults = {"source": "edit", "description": "a <b>blue</b> box", "params": '{"prompt": "blue"}'}
    return defaults | {"start": start, "end": start + len(TAG), "seconds": 0.25, "provenance": "{}"} | values


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with one trained group of two, and one evaluation's group that waits."""
    monkeypatch.setenv("COLUMNS", "200")
    store = Store(tmp_path / "run" / "replay")
    prompt = {"order": 4, "seed": 1, "question": "Make my <i>box</i> blue", "given": [GIVEN.sha256], "tools": ["edit"]}
    put(store, "pending", GIVEN, purpose="train", image_num=1, samples=2, **prompt)
    versions = [version(1, 7), version(1, 8)]
    tokens = {"prompt_ids": [5], "token_ids": [1, 2], "logprobs": [-0.5, -1.0], "mask": [1, 0], "versions": versions}
    put(store, "generated", GIVEN, text=TEXT, finish="stop", worker="rollout-0", seconds=1.5, **tokens)
    made = call(0, status="ok", reason="", images=[MADE.sha256])
    put(store, "rendered", MADE, calls=[made, call(1, status="failed", reason="no such box", images=[])], finished=True)
    put(store, "scored", GIVEN, reward=0.5, reward_strict=0.25, accurate=True, components=[("rule", 1.0)])
    claim = store.claim("scored", limit=1, lease_s=9, columns=[], by_group=True)
    assert claim is not None
    store.ack(claim.token, {t: ("trained", "") for t in claim.trajectories}, step=1)
    row = {name: None for name in SCHEMAS["pending"].names} | {"purpose": "before", "attempt": 0, "turn": 0}
    row |= {"trajectory": "before-000000/0", "group": "before-000000", "question": "And you?"}
    store.put("pending", pa.Table.from_pylist([row], SCHEMAS["pending"]))
    store.close()
    return tmp_path / "run"


@pytest.fixture
def llmi(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command line; gives exit status, what it printed, and what it said of errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["llmi", "replay", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        code = stopped.value.code
        return int(code or 0), *capsys.readouterr()

    return run


def words(line: str) -> list[str]:
    return line.replace("│", " ").split()


def test_ls_counts_groups_and_trajectories_of_each_purpose(run_folder: Path, llmi: Any) -> None:
    code, out, _ = llmi("ls", run_folder)
    assert code == 0
    before, train = (words(line) for line in out.splitlines() if line.startswith("│"))
    assert before == ["before", "1", "0", "0", "1", "pending"]
    assert train == ["train", "1", "1", "1", "2", "trained", "1.7", "to", "1.8"]


@pytest.mark.parametrize("form", ["{}", "{}/", "{}/replay", "file://{}", "file://{}/replay"])
def test_a_run_folder_and_its_store_are_both_a_store(run_folder: Path, llmi: Any, form: str) -> None:
    code, out, _ = llmi("ls", form.format(run_folder))
    assert code == 0 and "2 trained" in out


def test_reading_leaves_the_store_as_it_is_and_needs_no_lock(run_folder: Path, llmi: Any) -> None:
    store = Store(run_folder / "replay")
    before = {p: p.stat().st_mtime_ns for p in run_folder.rglob("*")}
    assert llmi("ls", run_folder)[0] == llmi("show", run_folder, "train-000004")[0] == 0
    assert {p: p.stat().st_mtime_ns for p in run_folder.rglob("*")} == before
    store.close()


def test_show_says_all_that_is_known_of_a_trajectory(run_folder: Path, llmi: Any) -> None:
    code, out, _ = llmi("show", run_folder, "train-000004/1")
    assert code == 0
    for said in (
        "train-000004/1  trained",
        "Make my <i>box</i> blue",
        "1 picture, edit",
        f"{GIVEN.sha256} image/png {len(GIVEN.data)} bytes",
        f"{MADE.sha256} image/png {len(MADE.data)} bytes",
        "2 tokens, 1 charged, after 1 of the prompt; log-prob sum -1.500; policy 1.7, 1.8",
        "edit failed in 0.25 s: no such box",
        '{"prompt": "blue"}',
        "0.5 (strict 0.25), right tools",
        "rule 1",
    ):
        assert said in out
    assert "train-000004/0" not in out
    assert "\x1b" not in out, "an answer must not steer the terminal"


def test_show_gives_one_json_object_of_a_trajectory_or_a_group(run_folder: Path, llmi: Any) -> None:
    one = json.loads(llmi("show", run_folder, "train-000004/1", "--json")[1])
    assert one["text"] == TEXT and one["status"] == "trained" and one["components"] == {"rule": 1.0}
    assert one["calls"][0]["images"] == [{"sha256": MADE.sha256, "mime": "image/png", "bytes": len(MADE.data)}]
    assert (one["tokens"], one["logprob_sum"], one["versions"]) == (2, -1.5, ["1.7", "1.8"])
    group = json.loads(llmi("show", run_folder, "train-000004", "--json")[1])
    assert [t["trajectory"] for t in group["trajectories"]] == ["train-000004/0", "train-000004/1"]


def test_show_tells_of_a_prompt_that_has_no_answer_yet(run_folder: Path, llmi: Any) -> None:
    code, out, _ = llmi("show", run_folder, "before-000000/0")
    assert code == 0 and "before-000000/0  pending" in out and "And you?" in out


def test_export_goes_by_the_suffix(run_folder: Path, tmp_path: Path, llmi: Any) -> None:
    for name in ("a.parquet", "a.jsonl", "a.html"):
        code, out, _ = llmi("export", run_folder, tmp_path / name)
        assert code == 0 and f"2 trajectories in {tmp_path / name}" in out
    assert pq.read_table(tmp_path / "a.parquet")["status"].to_pylist() == ["trained", "trained"]
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["reward"] for line in lines] == [0.25, 0.25]


def test_export_takes_format_purpose_limit_and_least_reward(run_folder: Path, tmp_path: Path, llmi: Any) -> None:
    assert llmi("export", run_folder, tmp_path / "a.data", "--format", "sft", "--limit", 1, "--min-reward", 0.2)[0] == 0
    [line] = (tmp_path / "a.data").read_text().splitlines()
    assert json.loads(line)["trajectory"] == "train-000004/1"
    assert llmi("export", run_folder, tmp_path / "b.parquet", "--purpose", "before")[0] == 0
    assert pq.read_table(tmp_path / "b.parquet")["question"].to_pylist() == ["And you?"]


def test_the_page_shows_documents_and_trusts_nothing(run_folder: Path, tmp_path: Path, llmi: Any) -> None:
    llmi("export", run_folder, tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert page.count('<img src="data:image/png;base64,') == 3, "the given one once, and one in each document"
    assert "Make my &lt;i&gt;box&lt;/i&gt; blue" in page
    assert "<strong>Done.</strong>" in page and "no such box" in page and "policy 1.7, 1.8" in page
    assert "<b>blue" not in page and "&lt;imgen" not in page and "<script" not in page


def test_what_waits_has_a_place_on_the_page(run_folder: Path, tmp_path: Path, llmi: Any) -> None:
    llmi("export", run_folder, tmp_path / "a.html", "--purpose", "before")
    page = (tmp_path / "a.html").read_text()
    assert "And you?" in page and "pending" in page and "No answer." in page


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["ls", "{}/nowhere"], 1, "there is no replay store in"),
        (["show", "{}", "train-00004/1"], 2, "no trajectory or group 'train-00004/1'; the nearest is train-000004/1"),
        (["export", "{}", "{}/a.html", "--purpose", "trian"], 2, "no purpose 'trian'; it has before, train"),
        (["export", "{}", "{}/a.docx"], 2, "end it in .parquet, .jsonl, .html, or say --format"),
        (["export", "{}", "{}", "--format", "sft"], 2, "exists; remove it or choose another name"),
        (["export", "{}", "{}/no/a.html"], 2, "there is no folder"),
        (["export", "{}", "{}/a.jsonl", "--min-reward", "2"], 2, "no reward is at least 2, lower --min-reward"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(
    run_folder: Path, llmi: Any, arguments: list[str], code: int, line: str
) -> None:
    got, _, said = llmi(*(a.format(run_folder) for a in arguments))
    assert got == code
    assert said.startswith("llmi: ") and line in said and said.count("\n") == 1
