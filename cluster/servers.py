"""The tool and judge servers of a config as Ray Serve applications; and what an actor or replica asks Ray for."""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray import serve

from actors.serving import JudgeServer, ToolServer, judge_app, tool_app
from agent.spec import ToolSpec
from cluster.config import Config, JudgePool, Resources, ToolPool
from tools.base import load

#: Idle threads sleep at once, so that a node's processes do not fight for its cores.
SHARED_CORES = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
#: Keeps libraries quiet.
ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


SERVE_S = 120.0


class RunFailed(RuntimeError):
    """The run cannot go on; the message says who waited for whom, or what broke."""


def deploy(config: Config, pool: str) -> list[str]:
    """Start the tool and judge servers of a config as Serve applications; returns their names."""
    if ray.util.get_current_placement_group() is not None:  # Serve must not end with the trial that came first
        ray.get(ray.remote(num_cpus=0, scheduling_strategy="DEFAULT")(_start_serve).remote(), timeout=SERVE_S)
    _start_serve()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    targets = [_target(tool_app(pool, name), ToolServer, p, name) for name, p in config.tools.items()] + [
        _target(judge_app(pool, name), JudgeServer, p, p.judge) for name, p in judges(config).items()
    ]
    try:
        serve.run_many(targets)
    except RuntimeError as error:
        raise RunFailed(f"a tool or judge server of pool {pool!r} did not start: {error}") from error
    return [target.name for target in targets]


def _start_serve() -> None:
    serve.start(proxy_location="Disabled", http_options={"host": "127.0.0.1"})


def tool_specs(config: Config) -> dict[str, ToolSpec]:
    """The protocol's tools: those that the config serves."""
    classes: dict[str, Any] = {name: load(name) for name in config.tools}
    return {name: cls.spec for name, cls in classes.items()}


def _target(app: str, server: Any, pool: ToolPool | JudgePool, what: str) -> serve.RunTarget:
    deployment = server.options(
        num_replicas=pool.replicas,
        max_ongoing_requests=pool.concurrency,
        ray_actor_options=actor_options(pool),
        health_check_timeout_s=60,
        graceful_shutdown_timeout_s=2,
    )
    return serve.RunTarget(deployment.bind(what, pool.options, pool.concurrency), name=app, route_prefix=None)


def judges(config: Config) -> dict[str, JudgePool]:
    return {"text": config.judges.text, "image": config.judges.image}


def actor_options(asked: Resources, threads: int = 1, alone: bool = False) -> dict[str, Any]:
    """What an actor asks Ray for; one that works `alone` lets its idle threads spin, which is 2.6 times as fast."""
    variables = ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)} | ({} if alone else SHARED_CORES)
    return {
        "num_cpus": asked.cpus,
        "num_gpus": asked.gpus,
        "resources": asked.resources or None,
        "runtime_env": {"env_vars": variables},
    }
