"""Tools and judges that answer garbage, nothing or late, behind the real Serve: no document is lost, none is blamed."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from actors.feeder import group_rows
from actors.renderer import MAX_OUTAGES
from agent.protocol import format_call
from cluster.config import Config
from cluster.pools import Pools, init_ray
from replay.record import SCHEMAS, Prompt

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

#: A package outside the tree that offers a tool by entry point, and judges by name. All of them misbehave on request.
OUTSIDE = '''
import time
from agent.spec import ToolSpec
from replay.record import Blob
from rewards.base import JudgeFailed, Verdict
from tools.base import CallFailed, ToolResult

class Moody:
    """A tool that does what its `mood` parameter says."""
    spec = ToolSpec("moody", {"mood": str}, "for tests")
    broken = 0

    def run(self, params, images):
        mood = params["mood"]
        if mood == "garbage":
            return "no picture, sorry"
        if mood == "empty":
            return ToolResult(())
        if mood == "late":
            time.sleep(200)
        if mood == "refuse":
            raise CallFailed("not in the mood")
        if mood == "once" and not Moody.broken:
            Moody.broken = 1
            raise OSError("the disk hiccuped")
        return ToolResult((Blob(b"picture of " + mood.encode()),), {"title": mood})

class Patient:
    """A tool that needs another call's picture, and its time."""
    spec = ToolSpec("patient", {"img_index": int}, "for tests", ("img_index",))

    def run(self, params, images):
        time.sleep(0.8)
        return ToolResult((Blob(images[0].data + b"!"),))

class Judge:
    """A judge that does what the document's text says."""
    name, sees_images = "moody", False

    def judge(self, doc):
        if "judge: nothing" in doc.text:
            return None
        if "judge: garbage" in doc.text:
            return Verdict({"text": "five stars", "image_tags": 3.0})
        if "judge: refuse" in doc.text:
            raise JudgeFailed("cannot read this")
        if "judge: crash" in doc.text:
            raise ZeroDivisionError("oops")
        return Verdict({"text": 4.0, "image_tags": 4.0, "image_quality": 3.0, "task_relevance": 3.0,
                        "text_image_relevance": 3.0})
'''


def moody(mood: str) -> str:
    return format_call("moody", "d", {"mood": mood})


DOCUMENT_S = 8.0
#: Each call within its time, and all of them not within the document's: what is there in time is not made again.
LONG = moody("good") + "".join(format_call("patient", "d", {"img_index": i}) for i in range(12))

#: document -> (how it must end, part of the reason).
DOCUMENTS = {
    "": ("scored", ""),
    "plain words": ("scored", ""),
    f"fine {moody('good')} and {moody('well')}": ("scored", ""),
    f"refused {moody('refuse')} but {moody('good')}": ("scored", ""),
    f"cut off {moody('good')} <imgen>{{'source': 'moody', 'descr": ("scored", ""),
    f"hiccup {moody('once')}": ("scored", ""),
    f"garbage {moody('garbage')}": ("dropped_data", "without a picture"),
    f"empty {moody('empty')}": ("dropped_data", "without a picture"),
    f"late {moody('late')}": ("dropped_data", "did not answer in 1 s"),
    f"long {LONG}": ("scored", ""),
    "judge: nothing": ("set_aside_judge", "answered NoneType"),
    "judge: garbage": ("set_aside_judge", "wanted a number from 1 to 5"),
    "judge: refuse": ("set_aside_judge", "cannot read this"),
    "judge: crash": ("set_aside_judge", "oops"),
}


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install the outside package where Ray's workers find it too."""
    (tmp_path / "outside_llmi.py").write_text(OUTSIDE)
    info = tmp_path / "outside_llmi-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-llmi\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[llmi.tools]\nmoody = outside_llmi:Moody\npatient = outside_llmi:Patient\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.getcwd()]))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    ray.shutdown()
    sys.modules.pop("outside_llmi", None)


def test_every_document_ends_and_only_its_own_failures_are_its_own(outside: None, tmp_path: Path) -> None:
    config = Config.model_validate(
        {
            "name": "moody",
            "run_dir": str(tmp_path),
            "policy": {"path": "unused"},
            "tools": {name: {"timeout_s": 1, "concurrency": 32} for name in ("moody", "patient")},
            "render": {"document_s": DOCUMENT_S},
            "judges": {k: {"judge": "outside_llmi:Judge", "timeout_s": 20} for k in ("text", "image")},
            "learner": {"steps": 1, "prompts_per_step": 1, "samples_per_prompt": 2, "lr": 1},
        }
    )
    Path(config.folder).mkdir()
    init_ray()
    pools = Pools(config, "unused", 0, None)
    pools.start(("render", "score"))
    for order, text in enumerate(DOCUMENTS):
        _write(pools.store, order, text)
    ends = _wait(pools)
    for name, (text, (status, reason)) in zip(sorted(ends), DOCUMENTS.items(), strict=True):
        assert ends[name][0] == status, (text, ends[name])
        assert reason in ends[name][1], (text, ends[name])
    calls = pools.store.now(pools.store.get(sorted(ends), ["calls"]))["calls"].to_pylist()
    assert [c["status"] for c in calls[3]] == ["failed", "ok"]
    assert calls[3][0]["reason"] == "not in the mood"
    assert [c["status"] for c in calls[4]] == ["ok", "invalid"]
    assert [c["status"] for c in calls[list(DOCUMENTS).index(f"long {LONG}")]] == ["ok"] * 13
    totals = ray.get(pools.renderers[0].ping.remote())
    assert totals["infrastructure"] == 3 * MAX_OUTAGES + 1  # ... and the long document's first try
    pools.stop()


def _write(store: Any, order: int, text: str) -> None:
    """A document as a rollout worker would have put it."""
    rows, _ = group_rows(Prompt(str(order), "what?"), "train", order, 1, 0)
    store.now(store.put("pending", rows))
    [row] = rows.to_pylist()
    generated = {n: row.get(n) for n in SCHEMAS["generated"].names}
    generated |= {"text": text, "finish": "stop", "versions": [0], "token_ids": [1], "logprobs": [0.0], "mask": [1]}
    store.now(store.put("generated", pa.Table.from_pylist([generated], SCHEMAS["generated"])))


def _wait(pools: Pools) -> dict[str, tuple[str, str]]:
    deadline = time.monotonic() + 240
    while len(ends := pools.store.now(pools.store.ends("train"))) < len(DOCUMENTS):
        pools.watch()
        assert time.monotonic() < deadline, f"after 240 s only these ended: {ends}"
        time.sleep(0.5)
    return ends
