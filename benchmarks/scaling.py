"""Test-time scaling: reward against what is spent, for each stage alone and for all together, on held-out prompts.

    llmi bench scaling 'policy={path: runs/tiny/policy, system_prompt: none}'

Every setting begins with the same first answer to each prompt, so that differences are the stages' own. The reward is
the run's (default, strict), which knows what the prompt requires; the stages do not.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from actors.engine import Engine
from agent.answer import Document
from agent.render import Made
from agent.scaling import STAGES, scaled
from agent.workshop import Tools, Workshop, call_key
from cluster.config import Config, ConfigError
from cluster.console import say
from cluster.generate import local_judges, local_tools, quiet, writer_of
from cluster.servers import tool_specs
from corpus import prompts
from replay.record import Blob, Prompt
from rewards.expected import rendered
from rewards.hybrid import MOST_IMAGES, score
from rewards.judges.rubric import RubricImageJudge, RubricTextJudge
from rewards.rules import count_images

OVERRIDES = ("prompts.heldout_count=60",)
SIZES = (2, 4, 8)
AT_ONCE = 16  # prompts
SETTINGS = {name: (name,) for name in STAGES[1:]} | {"all": STAGES}


def run(config: Config) -> dict[str, float]:
    """Means over the prompts: `reward`, `accuracy`, `tokens`, `calls` and `judged` of each setting and size."""
    if config.policy.path is None:
        raise ConfigError("bench scaling needs a trained policy: policy={path: runs/tiny/policy, system_prompt: none}")
    return asyncio.run(_run(config, config.policy.path))


async def _run(config: Config, policy: str) -> dict[str, float]:
    with quiet():
        engine = Engine(policy, 0, config.rollout.engine)
        await engine.start()
    source = config.prompts.heldout or config.prompts.train
    asked = prompts.load(source, "heldout", config.prompts.heldout_count, config.seed, known=config.tools).prompts
    try:
        with local_tools(config) as local:
            bench = _Bench(config, engine, _Remembered(local), asked)
            results = await bench.measure("one", 1, ())
            for name, stages in SETTINGS.items():
                for n in SIZES:
                    results |= await bench.measure(f"{name}_{n}", n, stages)
            return results
    finally:
        engine.close()


class _Remembered:
    """Tools that run equal calls once, as the tool servers do; the stages are charged for each all the same."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._made: dict[str, asyncio.Future[Made]] = {}

    async def run(self, tool: str, params: Mapping[str, Any], images: Sequence[Blob]) -> Made:
        key = f"{call_key(tool, params)} {[image.sha256 for image in images]}"
        if key not in self._made:
            self._made[key] = asyncio.ensure_future(self._tools.run(tool, params, images))
        return await asyncio.shield(self._made[key])


class _Bench:
    def __init__(self, config: Config, engine: Engine, tools: Tools, asked: Sequence[Prompt]) -> None:
        self._config, self._tools, self._asked = config, tools, asked
        self._writer, self._judges = writer_of(config, engine), local_judges(config)
        self._specs = tool_specs(config)

    async def measure(self, name: str, n: int, stages: Sequence[str]) -> dict[str, float]:
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(number: int, prompt: Prompt) -> dict[str, float]:
            async with gate:
                return await self._one(number, prompt, n, stages)

        rows = await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(self._asked)))
        means = {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}
        say(f"{name:14} " + "  ".join(f"{key} {value:.3f}" for key, value in means.items()))
        return {f"{key}_{name}": value for key, value in means.items()}

    async def _one(self, number: int, prompt: Prompt, n: int, stages: Sequence[str]) -> dict[str, float]:
        messages = [{"role": "user", "content": prompt.question}]
        given = [Blob(data) for data in prompt.images]
        parts = (self._writer, self._tools, self._judges, self._specs, self._config.render.document_s)
        shop = Workshop(messages, given, *parts, number * 100_000)
        reward, accurate = _worth(await scaled(shop, n, stages), prompt)
        spent = {key: float(getattr(shop.spent, key)) for key in ("tokens", "calls", "judged")}
        return {"reward": reward, "accuracy": accurate, **spent}


def _worth(document: Document, prompt: Prompt) -> tuple[float, float]:
    """Strict reward and tool accuracy, which know what the prompt requires."""
    doc = replace(rendered(document), image_num=prompt.image_num, tools=prompt.tools)
    image = RubricImageJudge().judge(doc) if 0 < count_images(doc) <= MOST_IMAGES else None
    found = score(doc, RubricTextJudge().judge(doc), image)
    return found.reward_strict, float(found.accurate)
