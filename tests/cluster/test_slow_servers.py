from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent.protocol import Call, parse
from agent.render import CallOutcome
from cluster.slow_servers import Critic, Painter, documents, install, prompts
from corpus.prompts import load, save
from rewards.base import Rendered
from rewards.hybrid import score


def test_every_document_has_one_call_that_no_other_has_and_half_are_right() -> None:
    right, seeds = 0, set()
    for question, text in documents(400, seed=0):
        [call] = [s for s in parse(text, {"paint": Painter.spec}) if isinstance(s, Call)]
        made = Painter(0.0).run(call.params, [])
        outcome = CallOutcome("paint", "d", call.params, 0, 1, "ok", "", (made.images[0].sha256,), {}, 0.0)
        doc = Rendered(question, text, [outcome], 1, ("paint",))
        verdict = Critic(0.0).judge(doc)
        reward = score(doc, verdict, verdict).reward
        assert reward in (pytest.approx(0.4), pytest.approx(1.0))
        right += reward > 0.9
        seeds.add(call.params["seed"])
    assert 160 < right < 240 and len(seeds) > 395


def test_they_take_their_time() -> None:
    started = time.monotonic()
    Painter(0.2).run({"prompt": "blue the sky", "seed": 1}, [])
    Critic(0.2).judge(Rendered("Paint the sky.", "", [], 1, ("paint",)))
    assert time.monotonic() - started >= 0.4


def test_the_tool_is_found_as_that_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    install(tmp_path / "package")
    code = "from tools.base import load; print(load('paint').spec.name)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.stdout == "paint\n", done.stderr
    save(prompts(2), tmp_path / "train.parquet")
    assert len(load(str(tmp_path / "train.parquet"), "train", known=("paint",)).prompts) == 64
