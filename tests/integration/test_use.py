"""From use to a better policy: what a service keeps is gathered into a store, and a run goes on from it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from agent.service.api import build
from cluster.config import Config
from cluster.gather import gather
from cluster.train import train
from replay.view import View
from tests.agent.service.scripted import Scripted, service

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.usefixtures("local_ray")
def test_a_run_goes_on_from_the_questions_and_thumbs_of_a_service(tiny: Callable[..., Config], tmp_path: Path) -> None:
    async def use() -> None:
        app = build(service(tmp_path / "service", Scripted(), learn=True))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://llmi") as http:
            for i, thumb in enumerate(("up", "down", "up")):
                made = await http.post("/v1/documents", json={"prompt": f"Show the flag of Peru, {i}.", "learn": True})
                await http.post(f"/v1/documents/{made.json()['id']}/feedback", json={"thumb": thumb})

    asyncio.run(use())
    store = str(tmp_path / "store")
    assert gather(str(tmp_path / "service"), store, 4).rated == 3
    config = tiny("used", f"train.store={store}")
    summary = train(config)
    assert summary["steps"] == 2 and summary["trajectories_lost"] == 0 and summary["trajectories_trained"] == 24
    view = View(f"{config.folder}/replay")
    trained = [name for name, (status, _) in view.ends("train").items() if status == "trained"]
    rows = view.get(trained, ["question", "worker", "reward"]).to_pylist()
    served = {row["question"]: row["reward"] for row in rows if row["worker"] == "service"}
    thumbs = {f"Show the flag of Peru, {i}.": reward for i, reward in enumerate((1.0, 0.0, 1.0))}
    assert served and served.items() <= thumbs.items()
    for question in served:  # the others of its group are the run's own
        assert [row["worker"] for row in rows if row["question"] == question].count("rollout-0") == 3
