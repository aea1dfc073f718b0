"""The tool and judge servers of a config as Ray Serve applications; and what an actor or replica asks Ray for."""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray import serve

from actors.serving import JudgeServer, ToolServer, judge_app, tool_app
from agent.spec import ToolSpec
from cluster.config import Autoscaling, Config, JudgePool, Learner, Resources, ToolPool
from tools.base import spec_of

#: Idle threads sleep at once, so that a node's processes do not fight for its cores.
SHARED_CORES = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
#: A learner's tensors without a GPU: one heap that is never given back. Pages fresh from the kernel took a seventh of a
#: step, because large tensors are otherwise mapped anew each time.
KEPT_HEAP = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
#: Keeps libraries quiet.
ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(1 << 30),  # pictures of a call; gRPC's own limit is 4 MiB
    "THP_MEM_ALLOC_ENABLE": "1",  # PyTorch takes fresh memory in huge pages where the kernel has them
}


SERVE_S = 120.0
HEALTH_S = 5.0  # between two checks of a replica; three that fail end it
DRAIN_S = 10.0  # a replica that is stopped may take as long to end its calls
#: How Serve follows the number of calls: it looks at the last seconds, adds replicas soon and takes them away late.
SCALING = {"look_back_period_s": 15.0, "upscale_delay_s": 5.0, "downscale_delay_s": 60.0}


class RunFailed(RuntimeError):
    """The run cannot go on; the message says who waited for whom, or what broke."""


def deploy(config: Config, pool: str) -> list[str]:
    """Start the tool and judge servers of a config as Serve applications; returns their names."""
    if ray.util.get_current_placement_group() is not None:  # Serve must not end with the trial that came first
        ray.get(ray.remote(num_cpus=0, scheduling_strategy="DEFAULT")(_start_serve).remote(), timeout=SERVE_S)
    _start_serve()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    targets = [serve.RunTarget(app, name=name, route_prefix=None) for name, app in applications(config, pool).items()]
    try:
        serve.run_many(targets)
    except RuntimeError as error:
        raise RunFailed(f"a tool or judge server of pool {pool!r} did not start: {error}") from error
    return [target.name for target in targets]


def applications(config: Config, pool: str) -> dict[str, Any]:
    """The tool and judge servers of a config by the names of their applications."""
    tools = {tool_app(pool, name): _tool(name, p) for name, p in config.tools.items()}
    return tools | {judge_app(pool, name): _judge(p) for name, p in judges(config).items()}


def _start_serve() -> None:
    serve.start(proxy_location="Disabled", http_options={"host": "127.0.0.1"})


def tool_specs(config: Config) -> dict[str, ToolSpec]:
    """The protocol's tools: those that the config serves."""
    return {name: spec_of(name, p.use or name, p.options) for name, p in config.tools.items()}


def _tool(name: str, pool: ToolPool) -> Any:
    size: dict[str, Any] = {"num_replicas": pool.replicas}
    if scale := pool.autoscaling:
        size = {"autoscaling_config": autoscaling(scale)}
    server: Any = ToolServer
    return server.options(max_queued_requests=pool.queue, **size, **_shared(pool)).bind(
        name, pool.use or name, pool.options, pool.concurrency, pool.timeout_s
    )


def autoscaling(scale: Autoscaling) -> dict[str, Any]:
    """As Serve takes it."""
    size = {"min_replicas": scale.min, "max_replicas": scale.max, "target_ongoing_requests": scale.target}
    return {**size, **SCALING}


def _judge(pool: JudgePool) -> Any:
    server: Any = JudgeServer
    return server.options(num_replicas=pool.replicas, **_shared(pool)).bind(
        pool.judge, pool.options, pool.concurrency, pool.timeout_s
    )


def _shared(pool: ToolPool | JudgePool) -> dict[str, Any]:
    return {
        "max_ongoing_requests": pool.concurrency,
        "ray_actor_options": actor_options(pool),
        "health_check_period_s": HEALTH_S,
        "health_check_timeout_s": 60,
        "graceful_shutdown_timeout_s": min(pool.timeout_s, DRAIN_S),
        "graceful_shutdown_wait_loop_s": 0.1,
    }


def judges(config: Config) -> dict[str, JudgePool]:
    return {"text": config.judges.text, "image": config.judges.image}


def actor_options(asked: Resources, threads: int = 1, alone: bool = False) -> dict[str, Any]:
    """What an actor asks Ray for; one that works `alone` lets its idle threads spin, which is 2.6 times as fast."""
    variables = ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)} | ({} if alone else SHARED_CORES)
    return {
        "num_cpus": asked.cpus,
        "num_gpus": asked.gpus,
        "resources": dict(asked.resources),
        "runtime_env": {"env_vars": variables},
    }


def learner_options(asked: Learner, threads: int, alone: bool = False) -> dict[str, Any]:
    """`actor_options` of an actor that trains."""
    options = actor_options(asked, threads, alone)
    if not asked.gpus:
        options["runtime_env"]["env_vars"] |= KEPT_HEAP
    return options
