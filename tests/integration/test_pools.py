"""Pools of tool servers on the real Serve: a crowd, deaths, sickness, large pictures, autoscaling, and the metrics."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import ray
from ray import serve

from actors.serving import Outage, ToolClient, tool_app
from agent.render import Made
from cluster import servers
from cluster.config import Config
from cluster.pools import init_ray
from replay.record import Blob

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

MOODY = '''
import os, time
from pathlib import Path
from agent.spec import ToolSpec
from replay.record import Blob
from tools.base import CallFailed, ToolResult

class Moody:
    """A tool that does what its call says."""
    spec = ToolSpec("moody", {"do": str, "n": int}, "for tests")

    def __init__(self, folder):
        self.folder, self.broken = Path(folder), False

    def run(self, params, images):
        do, n = params["do"], params["n"]
        if do == "sleep":
            time.sleep(n / 1000)
        if do == "die once" and not (marker := self.folder / "died").exists():
            marker.touch()
            os._exit(1)
        if do == "die":
            os._exit(1)
        if do == "refuse":
            raise CallFailed("not in the mood")
        if do == "break":
            self.broken = True
        if do == "large":
            return ToolResult((images[0],), {"pid": os.getpid()})
        return ToolResult((Blob(b"x" * max(n, 1)),), {"pid": os.getpid()})

    def check(self):
        if self.broken:
            raise RuntimeError("broken for good")

    def cost(self, params):
        return 0.25

    def close(self):
        (self.folder / f"closed-{os.getpid()}").touch()
'''

TOOLS: dict[str, Any] = {
    "plain": {"concurrency": 4, "timeout_s": 20},
    "narrow": {"concurrency": 2, "queue": 3, "timeout_s": 30},
    "grows": {"concurrency": 4, "autoscaling": {"min": 1, "max": 3, "target": 1}},
}


@ray.remote(num_cpus=0.01)
class Caller:
    """Calls as a renderer does, from a process with the same environment."""

    def __init__(self) -> None:
        self._clients: dict[str, ToolClient] = {}

    async def call(self, tool: str, *calls: tuple[str, int], images: tuple[Blob, ...] = ()) -> list[Made | Outage]:
        client = self._clients.setdefault(tool, ToolClient("test", tool, TOOLS[tool].get("timeout_s", 30)))
        made = (client.run({"do": do, "n": n}, images) for do, n in calls)
        return await asyncio.gather(*made, return_exceptions=True)  # type: ignore[return-value]


Call = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("moody")


@pytest.fixture(scope="module")
def call(folder: Path) -> Iterator[Call]:
    """Run calls of one of `TOOLS` at once."""
    (folder / "moody_llmi.py").write_text(MOODY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.getcwd()]))
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setattr(servers, "HEALTH_S", 0.5)
        patch.setattr(servers, "SCALING", servers.SCALING | {"upscale_delay_s": 1.0})
        init_ray()
        shared = {"use": "moody_llmi:Moody", "cpus": 0.01, "options": {"folder": str(folder)}}
        config = Config.model_validate(
            {
                "name": "pools",
                "policy": {"path": "unused"},
                "tools": {name: shared | tool for name, tool in TOOLS.items()},
                "judges": {
                    k: {"judge": "rewards.judges.rubric:RubricTextJudge", "cpus": 0.01} for k in ("text", "image")
                },
                "learner": {"steps": 1, "prompts_per_step": 1, "samples_per_prompt": 2, "lr": 1},
            }
        )
        servers.deploy(config, "test")
        cls: Any = Caller
        caller = cls.options(runtime_env={"env_vars": servers.ENVIRONMENT}).remote()
        yield lambda *args, **kwargs: ray.get(caller.call.remote(*args, **kwargs), timeout=200)
        ray.shutdown()


def test_large_pictures_go_in_and_come_out(call: Call) -> None:
    large = Blob(os.urandom(9 << 20))
    (made,) = call("plain", ("large", 0), images=(large,))
    assert made.images == (large,)


def test_a_crowd_is_refused_at_the_door_and_comes_in_later(call: Call) -> None:
    made = call("narrow", *(("sleep", 100 + k) for k in range(24)))
    assert all(m.images for m in made)
    assert len(_metric("llmi_failures_total", stage="tool 'narrow'", kind="refused")) == 1


def test_a_replica_that_dies_costs_at_most_the_call_that_kills_it(call: Call) -> None:
    (made,) = call("plain", ("die once", 1))
    assert made.images
    (outage,) = call("plain", ("die", 1))
    assert isinstance(outage, Outage) and str(outage).startswith("tool 'plain' ")
    (made,) = call("plain", ("sleep", 7))
    assert made.images


def test_a_tool_that_is_broken_for_good_is_replaced(call: Call) -> None:
    (before,) = call("plain", ("break", 1))
    deadline, pids = time.monotonic() + 100, {before.provenance["pid"]}
    for n in range(10**6):
        (made,) = call("plain", ("sleep", n % 50))
        if isinstance(made, Made):
            pids.add(made.provenance["pid"])
        if len(pids) > 1:
            break
        assert time.monotonic() < deadline, "the broken replica still answers after 100 s"
        time.sleep(0.2)


def test_replicas_come_with_the_calls(call: Call) -> None:
    deadline, n = time.monotonic() + 100, 1000
    while _replicas("grows") < 2:
        call("grows", *(("sleep", n + k) for k in range(12)))
        n += 12
        assert time.monotonic() < deadline, "still one replica after 100 s of 12 calls at once"


def test_calls_failures_hits_and_cost_of_a_tool_are_metrics(call: Call) -> None:
    call("plain", *(("refuse", k) for k in range(3)))
    for _ in range(5):
        call("plain", ("sleep", 60))
    stage = "tool 'plain'"
    assert _metric("llmi_failures_total", stage=stage, kind="call")[0] >= 3
    assert sum(_metric("llmi_cache_hits_total", stage=stage)) >= 4
    assert sum(_metric("llmi_cost_dollars_total", stage=stage)) >= 0.25
    assert sum(_metric("llmi_seconds_count", stage=stage)) >= 8
    assert min(_metric("llmi_under_way", stage=stage)) >= 0


def test_a_replica_that_is_stopped_closes_its_tool(call: Call, folder: Path) -> None:
    (made,) = call("narrow", ("sleep", 1))
    serve.delete(tool_app("test", "narrow"))
    assert (folder / f"closed-{made.provenance['pid']}").exists()


def _replicas(tool: str) -> int:
    (deployment,) = serve.status().applications[tool_app("test", tool)].deployments.values()
    return sum(deployment.replica_states.values())


def _metric(name: str, **labels: str) -> list[float]:
    """Values of a metric on Ray's endpoint for Prometheus, one a process that exports it; it may come late."""
    node = ray.nodes()[0]
    deadline = time.monotonic() + 60
    while True:
        text = urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=20).read()
        lines = [line for line in text.decode().splitlines() if line.startswith(f"ray_{name}{{")]
        wanted = [line for line in lines if all(f'{key}="{value}"' in line for key, value in labels.items())]
        if wanted:
            return [float(re.sub(r".*\} (\S+).*", r"\1", line)) for line in wanted]
        assert time.monotonic() < deadline, f"no {name} with {labels}; there are: {lines}"
        time.sleep(1.0)
