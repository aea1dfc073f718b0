"""What the tool servers cost, and whether the sandbox and the downloader hold.

All tools are real Serve deployments. A chart is drawn by the server and, in turn, by a fresh Python process that
imports the same libraries. The document's eight calls take a second each, and three of them wait for one another. The
server's overhead is that of a call over the same call of the tool in this process. No call is made twice, so that
nothing comes from a cache. The attacks are those of `tests/security`; after each an honest call must work.
"""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from actors.serving import ToolClient
from agent.protocol import format_call
from agent.render import Made, Rendering
from cluster.config import Config
from cluster.console import say
from cluster.pools import serving
from cluster.servers import tool_specs
from replay.record import Blob
from tools.code import CodeTool
from tools.edit import EditTool
from tools.picture import encode

ROUNDS = 50  # charts beside fresh processes
CHARTS, AT_ONCE = 96, 8  # of the rate, and how many calls wait for the server at a time
PAIRS = 300  # calls through the server and without it
DOCUMENTS = 5
CHAIN = 3  # calls of the document of which each needs the one before

_WAITING = "{{use: 'cluster.slow_servers:Waiting', options: {{tool: {0}, seconds: 1.0}}}}"
OVERRIDES = (
    "tools={"
    + ", ".join(f"{name}: {_WAITING.format(name)}" for name in ("search", "diffusion", "code", "edit"))
    + ", chart: {use: code, concurrency: 2}, alter: {use: edit}}",
)

#: What the zygote has imported too (tools/zygote.py), at the same size.
FRESH = """
import sys
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from PIL import Image
plt.rcParams.update({"figure.figsize": (4.8, 3.2), "figure.dpi": 72})
"""
SAVE = "\nplt.savefig(sys.stdout.buffer, format='png')"
CHART = """
years = np.arange(2015, 2025)
plt.plot(years, np.cumsum(years % {n} + 1), marker="o", label="sold")
plt.bar(years, years % 7, color="lightgrey", label="returned")
plt.title("Year {n} of a shop")
plt.xlabel("year")
plt.ylabel("pieces")
plt.legend()
"""


def run(config: Config) -> dict[str, float]:
    """Returns how many times as long a fresh process takes for a chart (`chart_vs_fresh_python`, median of the rounds'
    ratios), charts/s of calls that come at once, seconds of a document beyond its longest chain (median), milliseconds
    of a call beyond those of its tool (median), and how many attacks were tried and contained.
    """
    with serving(config) as pool:
        results = asyncio.run(_measured(config, pool))
    tried, contained = attacks()
    return results | {"attacks_tried": float(tried), "attacks_contained": float(contained)}


async def _measured(config: Config, pool: str) -> dict[str, float]:
    clients = {name: ToolClient(pool, name, tool.timeout_s) for name, tool in config.tools.items()}
    served, fresh = await _charts(clients["chart"])
    rate = await _rate(clients["chart"])
    beyond = [await _document(config, clients, n) for n in range(DOCUMENTS)]
    overhead = await _overhead(clients["alter"])
    say(f"document {statistics.median(beyond):.2f} s beyond its chain  server {overhead:.1f} ms beyond its tool")
    return {
        "chart_vs_fresh_python": statistics.median(f / s for s, f in zip(served, fresh, strict=True)),
        "charts_per_s": rate,
        "document_overhead_s": statistics.median(beyond),
        "server_overhead_ms": overhead,
        "chart_s": statistics.median(served),
        "fresh_python_s": statistics.median(fresh),
    }


async def _charts(client: ToolClient) -> tuple[list[float], list[float]]:
    """Seconds of a chart by the server and by a fresh process, in turn; the first of each warms up."""
    served, fresh = [], []
    for n in range(ROUNDS + 1):
        code = CHART.format(n=n + 2)
        started = time.perf_counter()
        made = await client.run({"code": code}, [])
        between = time.perf_counter()
        subprocess.run([sys.executable, "-c", FRESH + code + SAVE], stdout=subprocess.PIPE, check=True, timeout=100)
        served.append(between - started)
        fresh.append(time.perf_counter() - between)
        _whole(made)
    say(f"chart {statistics.median(served[1:]):.3f} s  fresh Python {statistics.median(fresh[1:]):.3f} s")
    return served[1:], fresh[1:]


async def _rate(client: ToolClient) -> float:
    """Charts a second of calls that come `AT_ONCE` at a time."""
    places = asyncio.Semaphore(AT_ONCE)

    async def draw(n: int) -> Made:
        async with places:
            return await client.run({"code": CHART.format(n=n + 1000)}, [])

    started = time.perf_counter()
    for made in await asyncio.gather(*map(draw, range(CHARTS))):
        _whole(made)
    rate = CHARTS / (time.perf_counter() - started)
    say(f"{rate:.1f} charts/s")
    return rate


async def _document(config: Config, clients: Mapping[str, ToolClient], n: int) -> float:
    """Seconds beyond `CHAIN` that the calls of a document take: four that need nothing, a chain of three, and one that
    changes the user's picture.
    """

    async def call(tool: str, params: Mapping[str, Any], images: Sequence[Blob]) -> Made:
        return await clients[tool].run(params, images)

    def edit(index: int, what: str) -> str:
        return format_call("edit", what, {"img_index": index, "prompt": f"{what} {n}"})

    text = (
        format_call("search", "a map", {"query": f"map {n}"})  # picture 1, as the user's is 0
        + format_call("diffusion", "a scene", {"prompt": f"scene {n}"})
        + format_call("code", "a chart", {"code": f"chart({n})"})
        + edit(1, "grey")  # picture 4
        + edit(4, "blurred")
        + format_call("search", "a flag", {"query": f"flag {n}"})
        + format_call("diffusion", "a face", {"prompt": f"face {n}"})
        + edit(0, "brighter")
    )
    async with Rendering([Blob(b"the user's")], call, tool_specs(config)) as rendering:
        started = time.perf_counter()
        rendering.feed(text)
        calls, _ = await rendering.finish(60.0)
        took = time.perf_counter() - started
    if [outcome.status for outcome in calls] != ["ok"] * 8:
        raise RuntimeError(f"the document's calls ended {[(c.status, c.reason) for c in calls]}")
    return took - CHAIN


async def _overhead(client: ToolClient) -> float:
    """Median milliseconds by which a call of the server is longer than the same of its tool."""
    picture = Blob(encode(Image.linear_gradient("L").resize((320, 240)).convert("RGB")))
    tool, beyond = EditTool(), []
    for n in range(PAIRS + 10):
        params = {"img_index": 0, "prompt": f"rotate by {n + 1} degrees"}
        started = time.perf_counter()
        made = await client.run(params, [picture])
        between = time.perf_counter()
        tool.run(params, [picture])
        beyond.append(2 * between - started - time.perf_counter())
        _whole(made)
    return 1000 * statistics.median(beyond[10:])


def _whole(made: Made) -> None:
    if not made.images:
        raise RuntimeError(f"a call of the benchmark failed: {made.failure}")


def attacks() -> tuple[int, int]:
    """How many attacks on the sandbox and on the downloader were tried, and how many were contained."""
    sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests lie in the tree, and are not installed
    from tests.security import code_attacks, web_attacks
    from tests.security.bad_pictures import picture
    from tests.security.hostile_web import Web, sends

    tried: dict[str, str | None] = {}
    tool, web = CodeTool(timeout_s=code_attacks.TIMEOUT_S, memory_mib=512), Web()
    web.behaviours["honest"] = sends(picture)
    try:
        honest = tool.run({"code": code_attacks.HONEST}).images[0]
        with code_attacks.Bait() as bait:
            for name in code_attacks.ATTACKS:
                tried[f"code: {name}"] = code_attacks.contained(name, tool, bait, honest)
        for attack in web_attacks.ATTACKS:
            wrong = web_attacks.contained(attack, web)
            web_attacks.downloader().picture(web.url("honest"))
            tried[f"download: {attack.name}"] = wrong
    finally:
        tool.close()
        web.close()
    for name, wrong in tried.items():
        if wrong:
            say(f"not contained: {name}: {wrong}")
    say(f"{sum(wrong is None for wrong in tried.values())} of {len(tried)} attacks contained")
    return len(tried), sum(wrong is None for wrong in tried.values())
