"""`llmi generate`: one document from the shell."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from agent.protocol import format_call
from agent.scaling import STAGES
from tests.integration.by_heart import by_heart
from tests.integration.ray_head import ROOT
from tests.security.bad_pictures import picture, png_bomb

QUESTION = "Make my picture grey, and show two bars."
BARS = format_call("code", "Two bars", {"code": "plt.bar(['a', 'b'], [1, 2])"})
GREY = format_call("edit", "It is grey", {"img_index": 0, "prompt": "make it grey"})
TEXT = f"It loses its colours.\n{GREY}\nAnd these are the bars.\n{BARS}\nThat is all."

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return by_heart(tmp_path_factory.mktemp("policy"), QUESTION, TEXT)


def generate(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster.cli", "generate", QUESTION, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)


@pytest.mark.slow
def test_a_document_with_all_its_stages_and_calls_as_json(policy: Path, tmp_path: Path) -> None:
    mine, out = tmp_path / "mine.png", tmp_path / "out.json"
    mine.write_bytes(picture())
    done = generate("--model", policy, "--image", mine, "--scale", "2", "--seed", "1", "-o", out)
    assert done.returncode == 0, done.stderr
    row = json.loads(out.read_text())
    assert row["text"] == TEXT and [call["status"] for call in row["calls"]] == ["ok", "ok"]
    assert [stage["name"] for stage in row["scaling"]] == list(STAGES)
    assert len(row["images"]) == 3 and row["calls"][0]["provenance"]["origins"] == [{"given": 0}]
    assert "candidates: " in done.stderr and "[2] code: Two bars done in " in done.stderr


@pytest.mark.slow
def test_a_page_and_markdown_with_a_folder_told_of_as_they_are_written(policy: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.png"
    mine.write_bytes(picture())
    for kind, says in ((".html", "<!DOCTYPE html>"), (".md", "![Picture 1 given")):
        done = generate("--model", policy, "--image", mine, "-o", tmp_path / f"out{kind}")
        assert done.returncode == 0 and "That is all." in done.stdout and "<imgen>" not in done.stdout
        assert done.stderr.index("[1] edit: It is grey ...") < done.stderr.index("[2] code: Two bars ...")
        assert (tmp_path / f"out{kind}").read_text().startswith(says)
    assert len(list((tmp_path / "out.images").iterdir())) == 3


def test_a_picture_that_is_a_bomb_and_a_file_of_no_kind_are_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png_bomb())
    for args, said in ((["--image", bomb, "-o", "x.html"], "pixels"), (["-o", "x.pdf"], "end it in .html, .md, .json")):
        done = generate("--model", tmp_path, *args)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
