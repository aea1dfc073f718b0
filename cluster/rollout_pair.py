"""A rollout worker with its store, and the same engine alone: what `llmi bench rollout` compares."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import ray

from actors.engine import Engine
from actors.feeder import group_rows
from actors.rollout import RolloutWorker
from actors.store import StoreActor, StoreClient
from actors.weights import WeightHub, Weights
from cluster.config import Config, ConfigError
from cluster.console import say
from cluster.pools import PING_S, SERVICE, START_S, init_ray
from cluster.servers import RunFailed, actor_options
from corpus import prompts

DOCUMENTS = 500  # that the tokenizer of a policy with random weights is trained on


@ray.remote
class BareEngine:
    """An engine that is handed its requests.

    Args:
        model: folder or hub name.
        options: vLLM's engine arguments.
        sampling: vLLM's SamplingParams; `seed` comes with each request.
    """

    def __init__(self, model: str, options: Mapping[str, Any], sampling: Mapping[str, Any]) -> None:
        self._engine, self._sampling = Engine(model, 0, options), dict(sampling)

    async def start(self) -> None:
        await self._engine.start()

    async def tokens_per_s(self, rows: list[dict[str, Any]]) -> float:
        """Write all rows at once."""
        asked = [(r["trajectory"], self._engine.prompt_ids(r["question"]), {"seed": r["seed"]}) for r in rows]
        started = time.monotonic()
        done = await asyncio.gather(*(self._engine.complete(n, ids, self._sampling | seed) for n, ids, seed in asked))
        return sum(len(out.token_ids) for out in done) / (time.monotonic() - started)


class RolloutPair:
    """Both, each in a process of its own, idle but for the one whose turn it is.

    Args:
        config: of the run whose policy, sampling and engine options are taken.
        groups, samples: prompts a turn, and answers to each.
    """

    def __init__(self, config: Config, groups: int, samples: int) -> None:
        self._config, self._samples = config, samples
        self._prompts = prompts.load(config.prompts.train, "train", groups, config.seed, known=config.tools).prompts

    def __enter__(self) -> RolloutPair:
        c = self._config
        model = c.policy.path or random_policy(c)
        init_ray()
        say("starting a rollout worker and an engine alone")
        length = c.rollout.max_tokens
        sampling = {
            "max_tokens": length,
            "ignore_eos": True,
            "temperature": c.rollout.temperature,
            "top_p": c.rollout.top_p,
        }
        service, options = actor_options(SERVICE), actor_options(c.rollout, c.rollout.threads)
        shard = _made(StoreActor, service, f"{c.folder}/replay")
        self._store = StoreClient([shard])
        hub = _made(WeightHub, service)
        ray.get(hub.publish.remote(Weights(0)), timeout=PING_S)
        self._worker = _made(
            RolloutWorker,
            options,
            self._store,
            hub,
            model=model,
            concurrency=c.rollout.concurrency,
            sampling=sampling,
            system="",
            engine=c.rollout.engine,
            name="rollout-0",
        )
        self._engine = _made(BareEngine, options, model, c.rollout.engine, sampling)
        self._actors = [self._worker, self._engine, hub, shard]
        ray.get([self._worker.ping.remote(), self._engine.start.remote()], timeout=START_S)
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            ray.kill(actor)

    def worker(self, turn: int) -> float:
        """Tokens a second from the moment the prompts are in the store until all answers are."""
        purpose, rows = f"turn-{turn}", self._rows(turn)
        started, open_, tokens = time.monotonic(), rows.num_rows, 0
        self._store.now(self._store.put("pending", rows))
        while open_:
            claim = self._store.now(
                self._store.claim(
                    "generated", limit=open_, lease_s=START_S, columns=["token_ids"], purpose=purpose, wait_s=5.0
                )
            )
            if claim is not None:
                open_ -= claim.rows.num_rows
                tokens += sum(map(len, claim.rows.column("token_ids")))
            elif time.monotonic() - started > START_S:
                raise RunFailed(
                    f"waited {START_S:g} s for {rows.num_rows} answers of the rollout worker; {open_} are open"
                )
            else:
                ray.get(self._worker.ping.remote(), timeout=PING_S)  # raises what ended it
        return tokens / (time.monotonic() - started)

    def engine(self, turn: int) -> float:
        """Tokens a second of the engine alone with the same requests."""
        return ray.get(self._engine.tokens_per_s.remote(self._rows(turn).to_pylist()), timeout=START_S)

    def _rows(self, turn: int) -> pa.Table:
        seed = self._config.seed + turn
        groups = (group_rows(p, f"turn-{turn}", i, self._samples, seed)[0] for i, p in enumerate(self._prompts))
        return pa.concat_tables(groups)


def random_policy(config: Config) -> str:
    """A policy of the config's size with random weights."""
    from corpus.documents import cold_start
    from learners.sft import build_policy

    if config.policy.tiny is None:
        raise ConfigError("the benchmark needs policy.path or policy.tiny")
    folder = f"{config.folder}/policy"
    texts = (f"{prompt.question}\n{text}" for prompt, text in cold_start(DOCUMENTS, config.seed))
    build_policy(folder, texts, **config.policy.tiny.model_dump(), seed=config.seed)
    return folder


def _made(cls: Any, options: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    return cls.options(**options).remote(*args, **kwargs)
