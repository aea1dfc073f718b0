"""Verdicts a second of a model judge on vLLM, and the time to score a step of documents beside generating them.

Plain is one document after the other without a prefix cache; batched is all at once, with it. Both engines are in this
process and take turns, each with documents it has not seen. The model is `judges.text.options.engine.model`; without
it, a tiny one with random weights, whose constrained answers are the hardest to keep readable.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from actors.engine import Engine as Policy
from cluster.config import Config
from cluster.console import say
from rewards.base import JudgeFailed, Rendered
from rewards.judges.model import ModelJudge
from rewards.judges.tiny import build

OVERRIDES: tuple[str, ...] = ()
ROUNDS = 3
STEP, PLAIN = 64, 8  # documents of a step, and of a round of the slow way
TOKENS = 128  # of a document that is generated


def run(config: Config) -> dict[str, float]:
    """Returns medians of verdicts/s, the median ratio, and the failures among all verdicts."""
    engine = _engine(config)
    plain = ModelJudge("text", engine={**engine, "enable_prefix_caching": False, "max_num_seqs": 1})
    batched = ModelJudge("text", engine={**engine, "max_num_seqs": STEP})
    found: list[tuple[float, float]] = []
    failures = 0
    try:
        for turn in range(ROUNDS + 1):
            slow, failed = _speed(plain, _documents(f"plain {turn}", PLAIN), 1)
            fast, failed_too = _speed(batched, _documents(f"batched {turn}", STEP), STEP)
            failures += failed + failed_too
            if turn:  # the first turn warms both up
                say(f"round {turn}  plain {slow:.2f} verdicts/s  batched {fast:.2f} verdicts/s")
                found.append((slow, fast))
    finally:
        plain.close()
        batched.close()
    score_s = STEP / statistics.median(fast for _, fast in found)
    generate_s = asyncio.run(_generate(engine))
    return {
        "batched_vs_plain": statistics.median(fast / slow for slow, fast in found),
        "parse_failures": float(failures),
        "score_vs_generate": score_s / generate_s,
        "plain_verdicts_per_s": statistics.median(slow for slow, _ in found),
        "batched_verdicts_per_s": statistics.median(fast for _, fast in found),
        "score_s": score_s,
        "generate_s": generate_s,
    }


def _engine(config: Config) -> dict[str, Any]:
    asked = config.judges.text.options.get("engine")
    if asked:
        return {"timeout_s": 600.0} | dict(asked)
    return {"model": build(Path(config.folder) / "judge"), "dtype": "float32", "timeout_s": 600.0}


def _documents(name: str, count: int) -> list[Rendered]:
    return [Rendered(f"What is Peru, {name}?", f"Peru is land {i}. " * 6, [], 0, ()) for i in range(count)]


def _speed(judge: ModelJudge, docs: Sequence[Rendered], at_once: int) -> tuple[float, int]:
    """Verdicts a second, and how many there are not."""

    def failed(doc: Rendered) -> bool:
        try:
            judge.judge(doc)
        except JudgeFailed as error:
            say(str(error))
            return True
        return False

    started = time.monotonic()
    with ThreadPoolExecutor(at_once) as threads:
        failures = sum(threads.map(failed, docs))
    return len(docs) / (time.monotonic() - started), failures


async def _generate(engine: dict[str, Any]) -> float:
    """Seconds in which the same model writes a step of documents."""
    options = {key: value for key, value in engine.items() if key not in ("model", "timeout_s")}
    policy = Policy(engine["model"], 0, options | {"max_num_seqs": STEP})
    await policy.start()
    sampling = {"max_tokens": TOKENS, "min_tokens": TOKENS, "temperature": 1.0}
    started = time.monotonic()
    await asyncio.gather(
        *(policy.complete(f"step-{i}", policy.prompt_ids(f"What is Peru {i}?"), sampling) for i in range(STEP))
    )
    seconds = time.monotonic() - started
    policy.close()
    return seconds
