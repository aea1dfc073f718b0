"""A publisher and an engine that takes its weights by one path or the other: what `llmi bench weights` times."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from safetensors.torch import load_file

from actors.engine import Engine
from actors.weights import Publisher, Puller, WeightHub
from cluster.config import Config
from cluster.console import say
from cluster.pools import PING_S, SERVICE, START_S, init_ray
from cluster.rollout_pair import random_policy
from cluster.servers import actor_options
from replay.folders import fetched

PATHS = ("shm", "object_store")


@dataclass(frozen=True)
class Taken:
    """When an engine's process had mapped new weights, and generated with them again (`time.monotonic`)."""

    mapped_at: float
    done_at: float
    pause_s: float


@ray.remote
class Taker:
    """An engine that takes the next weights when it is told to.

    Args:
        hub: handle.
        model: folder.
        options: vLLM's engine arguments.
    """

    def __init__(self, hub: Any, model: str, options: Mapping[str, Any]) -> None:
        self._hub, self._engine = hub, Engine(model, -1, options)
        # Whoever is on no node of the publisher's gets everything through the object store.
        self._pullers = {"shm": Puller(hub), "object_store": Puller(hub, "elsewhere")}

    async def start(self) -> None:
        await self._engine.start()

    async def take(self, version: int, path: str) -> Taken:
        """Wait for this version, and generate with it."""
        _, weights = await self._hub.newer.remote(version - 1 if version else None, PING_S)
        async with self._pullers[path].pull(weights) as buckets:
            pause_s = await self._engine.update(buckets, weights.version)
            return Taken(self._engine.mapped_at, time.monotonic(), pause_s)


class WeightPaths:
    """The publisher is in this process; hub and engine are in processes of their own on the same node."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def __enter__(self) -> WeightPaths:
        c = self._config
        model = c.policy.path or random_policy(c)
        self._weights = {
            n: t for file in sorted(Path(fetched(model)).glob("*.safetensors")) for n, t in load_file(file).items()
        }
        self.nbytes = sum(t.nbytes for t in self._weights.values())
        self._copies = {n: torch.zeros_like(t) for n, t in self._weights.items()}
        self._version = -1
        init_ray()
        say(f"starting an engine for {self.nbytes / 1e6:.0f} MB of weights")
        hub = WeightHub.options(**actor_options(SERVICE)).remote()  # type: ignore[attr-defined]
        options = actor_options(c.rollout, c.rollout.threads)
        self._taker = Taker.options(**options).remote(hub, model, c.rollout.engine)  # type: ignore[attr-defined]
        self._actors = [self._taker, hub]
        self._publisher = Publisher(hub)
        ray.get(self._taker.start.remote(), timeout=START_S)
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            ray.kill(actor)

    def publish(self, path: str) -> tuple[float, float, float]:
        """Seconds from the first tensor until the engine's process has mapped all, until it generates with them, and
        of its pause."""
        self._version += 1
        taking = self._taker.take.remote(self._version, path)
        time.sleep(0.2)  # it waits at the hub by now
        started = time.monotonic()
        self._publisher.publish(self._version, self._weights.items)
        taken: Taken = ray.get(taking, timeout=START_S)
        return taken.mapped_at - started, taken.done_at - started, taken.pause_s

    def memcpy(self) -> float:
        """Seconds that copying the same tensors takes, from warm memory to warm memory."""
        started = time.monotonic()
        for name, tensor in self._weights.items():
            self._copies[name].copy_(tensor)
        return time.monotonic() - started
