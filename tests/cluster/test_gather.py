"""From what a service keeps to a store that is trained on."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path

import httpx
import pytest

from agent.service.api import build
from cluster.config import ConfigError
from cluster.gather import Gathered, gather
from replay.verify import verify
from replay.view import View
from tests.agent.service.scripted import TEXT, Scripted, png, service


def used(folder: Path) -> None:
    """A service that was asked five times: praised, blamed, without a word, not to be trained on, and deleted."""

    async def go() -> None:
        app = build(service(folder, Scripted(), learn=True))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://llmi") as http:
            for i, thumb in enumerate(("up", "down", "", "private", "deleted")):
                picture = base64.b64encode(png("blue")).decode()
                body = {"prompt": f"Fish {i}?", "learn": thumb != "private", "images": [picture]}
                made = (await http.post("/v1/documents", json=body)).json()
                where = f"/v1/documents/{made['id']}"
                if thumb in ("up", "down"):
                    await http.post(f"{where}/feedback", json={"thumb": thumb})
                if thumb == "deleted":
                    assert (await http.delete(where)).status_code == 204

    asyncio.run(go())


def test_questions_answers_and_thumbs_become_groups_to_train_on(tmp_path: Path) -> None:
    used(tmp_path / "service")
    store = str(tmp_path / "store")
    assert gather(str(tmp_path / "service"), store, 3) == Gathered(questions=3, answers=3, rated=2)
    assert verify(store).problems == []
    view = View(store)
    assert view.counts("train") == {"pending": 6, "rendered": 1, "scored": 2}
    columns = [
        "question",
        "text",
        "token_ids",
        "logprobs",
        "mask",
        "versions",
        "reward",
        "calls",
        "given",
        "components",
    ]
    rows = {r["question"]: r for r in view.get(sorted(view.find("train", ["scored", "rendered"])), columns).to_pylist()}
    assert [rows[f"Fish {i}?"]["reward"] for i in range(3)] == [1.0, 0.0, None]
    praised = rows["Fish 0?"]
    assert praised["text"] == TEXT and praised["token_ids"] == [3] * 11 == [3 * m for m in praised["mask"]]
    assert praised["versions"] == [0] * 11 and praised["logprobs"] == [-0.5] * 11
    assert set(view.blobs([*praised["given"], *praised["calls"][0]["images"]])) == {
        *praised["given"],
        *praised["calls"][0]["images"],
    }


def test_a_store_that_is_there_is_not_written_over_and_an_empty_service_is_said_so(tmp_path: Path) -> None:
    used(tmp_path / "service")
    gather(str(tmp_path / "service"), str(tmp_path / "store"), 2)
    with pytest.raises(ConfigError, match=r"a replay store in .* already"):
        gather(str(tmp_path / "service"), str(tmp_path / "store"), 2)
    with pytest.raises(ConfigError, match="no service keeps documents"):
        gather(str(tmp_path / "nowhere"), str(tmp_path / "other"), 2)
