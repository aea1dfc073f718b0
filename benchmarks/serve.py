"""The service under load: its times, its speed beside the bare engine's, and what starting tools early saves.

The times and errors are those of the tiny agent with its tools, as clients see them over HTTP. Speed is that of a model
of 110 M parameters with random weights and no tools: the service and an engine of its own process take turns with the
same requests. Early dispatch is measured with a real tool server that takes 1 s, on a text that takes 4 s.
"""

from __future__ import annotations

import asyncio
import socket
import statistics
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import ray
from ray import serve as ray_serve

from actors.serving import ToolClient
from agent.answer import write
from agent.protocol import format_call
from agent.render import Made
from cluster.cold_start import starting_policy
from cluster.config import Config, ServedPolicy, TinyPolicy, ToolPool
from cluster.console import say
from cluster.pools import START_S, init_ray
from cluster.rollout_pair import BareEngine, random_policy
from cluster.serve import application
from cluster.serve_load import documents, tokens_per_s
from cluster.servers import actor_options, deploy
from cluster.slow_servers import Painter
from corpus import prompts
from replay.record import Blob

OVERRIDES = (
    "sft.documents=3200",
    "serve.requests_per_minute=1000000",
    "serve.documents_at_once=1000",
)
HOST = "127.0.0.1"
CLIENTS = {1: 8, 8: 4, 32: 3}  # clients -> documents of each
SOAK_CLIENTS, SOAK_S = 32, 60.0
ROUNDS = 3
AT_ONCE, TOKENS = 8, 96  # requests of a round of the large model, and tokens of each
LARGE = TinyPolicy(vocab_size=2048, hidden_size=960, layers=10, heads=15)
TEXT_S, TOOL_S, PIECES = 4.0, 1.0, 40


def run(config: Config) -> dict[str, float]:
    """Medians of the times in ms, `errors_32` of 32 clients in a minute, both speeds and their ratio, and the share of
    the time after the last token that is saved.
    """
    init_ray()
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    results = _times(config, port) | _speed(config, port)
    return results | _early(config)


def _times(config: Config, port: int) -> dict[str, float]:
    policy = ServedPolicy(model=starting_policy(config, f"{config.folder}/start"))
    source = config.prompts.heldout or config.prompts.train
    asked = prompts.load(source, "heldout", 240, config.seed, known=config.tools).prompts
    results: dict[str, float] = {}
    with application(config, {"tiny": policy}, {}, HOST, port) as url:
        documents(url, asked, 8, each=4)  # loads the tools
        for clients, each in CLIENTS.items():
            seen = [s for s in documents(url, asked, clients, each=each) if not s.problem]
            results[f"first_token_ms_{clients}"] = 1000 * statistics.median(s.first_s for s in seen)
            results[f"document_ms_{clients}"] = 1000 * statistics.median(s.whole_s for s in seen)
            say(f"{clients} clients: {results}")
        soak = documents(url, asked, SOAK_CLIENTS, seconds=SOAK_S)
        problems = [s.problem for s in soak if s.problem]
        say(f"{len(soak)} documents in {SOAK_S:g} s, {len(problems)} went wrong {problems[:3]}")
    return results | {"errors_32": float(len(problems)), "documents_per_s_32": len(soak) / SOAK_S}


def _speed(config: Config, port: int) -> dict[str, float]:
    large = config.model_copy(
        update={
            "name": f"{config.name}-large",
            "policy": config.policy.model_copy(update={"path": None, "tiny": LARGE}),
            "rollout": config.rollout.model_copy(update={"max_tokens": TOKENS}),
            "tools": {},
        }
    )
    model, c = random_policy(large), large.rollout
    sampling = {"max_tokens": TOKENS, "temperature": c.temperature, "top_p": c.top_p}
    cls: Any = BareEngine
    engine = cls.options(**actor_options(c, c.threads)).remote(model, c.engine, sampling)
    ratios, speeds = [], []
    try:
        with application(large, {"large": ServedPolicy(model=model)}, {}, HOST, port) as url:
            ray.get(engine.start.remote(), timeout=START_S)
            for turn in range(ROUNDS + 1):
                rows = _rows(turn)
                bare = ray.get(engine.tokens_per_s.remote(rows), timeout=START_S)
                served = tokens_per_s(url, rows, TOKENS)
                say(f"round {turn}  engine {bare:.0f} tokens/s  service {served:.0f} tokens/s")
                if turn:  # the first turn warms both up
                    ratios.append(served / bare)
                    speeds.append((served, bare))
    finally:
        ray.kill(engine)
    return {
        "service_vs_engine": statistics.median(ratios),
        "service_tokens_per_s": statistics.median(served for served, _ in speeds),
        "engine_tokens_per_s": statistics.median(bare for _, bare in speeds),
    }


def _rows(turn: int) -> list[dict[str, Any]]:
    return [
        {"trajectory": f"{turn}/{i}", "question": f"Tell me of number {i}.", "seed": 1000 * turn + i}
        for i in range(AT_ONCE)
    ]


def _early(config: Config) -> dict[str, float]:
    tool = ToolPool(use=f"{Painter.__module__}:{Painter.__name__}", options={"seconds": TOOL_S}, concurrency=3)
    pool = f"{config.name}-slow"
    apps = deploy(config.model_copy(update={"tools": {"paint": tool}}), pool)
    try:
        return asyncio.run(_after_the_text(ToolClient(pool, "paint", 30.0)))
    finally:
        for app in apps:
            ray_serve.delete(app, _blocking=False)


async def _after_the_text(client: ToolClient) -> dict[str, float]:
    waits: dict[str, list[float]] = {"early": [], "late": []}
    for turn in range(ROUNDS + 1):
        for n, (who, found) in enumerate(waits.items()):
            seconds = await _wait(client, 10 * turn + n, early=who == "early")
            if turn:
                found.append(seconds)
    early, late = (statistics.median(found) for found in waits.values())
    return {"early_dispatch_saving": 1 - early / late, "after_text_early_s": early, "after_text_late_s": late}


async def _wait(client: ToolClient, number: int, early: bool) -> float:
    """Seconds from the last token to the finished document; not `early`: tools start when the text is whole."""
    calls = [format_call("paint", "a wall", {"prompt": f"wall {number}", "seed": k}) for k in range(3)]
    pieces = ["some words "] * PIECES
    for k, call in enumerate(calls, 1):
        pieces[PIECES * k // 4 - 1] += call
    ended = 0.0

    async def written() -> AsyncIterator[str]:
        nonlocal ended
        for piece in pieces:
            await asyncio.sleep(TEXT_S / PIECES)
            if early:
                yield piece
        ended = time.monotonic()
        if not early:
            yield "".join(pieces)

    async def paint(tool: str, params: Mapping[str, Any], images: Sequence[Blob]) -> Made:
        return await client.run(params, images)

    document = await write("Paint.", written(), (), paint, {"paint": Painter.spec})
    assert [c.status for c in document.calls] == ["ok"] * 3, document.calls
    return time.monotonic() - ended
