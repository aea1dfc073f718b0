"""Builds what a run consists of, says where it goes, watches it, and takes it down.

Tool and judge servers are Serve applications named after the pool; the others are plain actors. Ray restarts a dead
actor; RLlib's `FaultTolerantActorManager` finds it again, and its first ping starts its loop.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray import serve

from actors.feeder import Feeder
from actors.learner import LearnerRank
from actors.renderer import Renderer
from actors.rollout import RolloutWorker
from actors.scorer import Scorer
from actors.serving import JudgeServer, ToolServer, judge_app, tool_app
from actors.store import StoreActor
from actors.weights import WeightHub
from agent.prompt import system_prompt
from agent.spec import ToolSpec
from cluster.config import Config, JudgePool, Resources, ToolPool
from replay.record import Prompt, version
from tools.base import load

SERVICE = Resources(cpus=0.01, gpus=0)  # store, hub and feeder: one small process each
START_S = 300.0  # an actor or a Serve application must be up by then
PING_S = 120.0

#: Keeps a node's processes from fighting for its cores, and quiet.
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "KMP_BLOCKTIME": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


class RunFailed(RuntimeError):
    """The run cannot go on; the message says who waited for whom, or what broke."""


def init_ray() -> bool:
    """Join the cluster that RAY_ADDRESS names (as in a submitted job), or start Ray here; True if it was started."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if ray.is_initialized():
        return False
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
        return False
    ray.init(address="local", include_dashboard=False, object_store_memory=1 << 30, log_to_driver=False)
    return True


def placement(config: Config) -> list[tuple[str, int, Resources]]:
    """(name, how many, what each asks for) of every actor and replica, in the order they start."""
    rows: list[tuple[str, int, Resources]] = [("store", 1, SERVICE), ("hub", 1, SERVICE), ("feeder", 1, SERVICE)]
    rows += [(f"tool {name}", pool.replicas, pool) for name, pool in config.tools.items()]
    rows += [(f"judge {name}", pool.replicas, pool) for name, pool in _judges(config).items()]
    return rows + [
        ("rollout", config.rollout.workers, config.rollout),
        ("render", config.render.workers, config.render),
        ("score", config.score.workers, config.score),
        ("learner", config.learner.ranks, config.learner),
    ]


class Pools:
    """All actors and servers of one run.

    Args:
        config: resolved.
        model: the policy to start from.
        incarnation: which life of the run this is.
        checkpoint: manifest to go on from, or None.
    """

    def __init__(
        self,
        config: Config,
        model: str,
        incarnation: int,
        checkpoint: Mapping[str, Any] | None,
    ) -> None:
        self.config, self._model = config, model
        self._incarnation, self._checkpoint = incarnation, checkpoint
        self._owned: list[str] = []
        self._all: list[Any] = []
        self._manager: Any = None

    def start(self) -> None:
        """Start everything; returns when all are up. Raises RunFailed naming what did not come up."""
        self._start_actors()
        self._start_servers()
        self._up()

    def watch(self) -> dict[str, list[dict[str, float]]]:
        """Ping everyone; how each stage is. Raises RunFailed for what does not come back."""
        self._manager.probe_unhealthy_actors(timeout_seconds=PING_S, mark_healthy=True)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in self._stages}
        results = self._manager.foreach_actor("ping", timeout_seconds=PING_S)
        for result in results.result_or_errors:
            stage = self._stage_of[result.actor_id]
            if result.ok:
                found[stage].append(result.get())
            elif isinstance(cause := result.get(), ray.exceptions.RayTaskError):
                raise RunFailed(f"{stage} failed: {cause.cause!r}") from cause
        return found

    def evaluate(self, purpose: str, prompts: Sequence[Prompt], on_progress: Any = None) -> None:
        """Run a prompt set through rollout, tools and judges; returns when every document has come to an end."""
        ray.get(self.feeder.accept.remote(purpose, list(prompts)), timeout=PING_S)
        deadline, last = time.monotonic() + self.config.stall_s, -1
        while True:
            counts = ray.get(self.store.state.remote(purpose), timeout=PING_S)["counts"]
            open_ = sum(counts.get(s, 0) for s in ("pending", "generated", "rendered"))
            if on_progress:
                on_progress(len(prompts) - open_, len(prompts))
            if not open_:
                return
            if open_ != last:
                deadline, last = time.monotonic() + self.config.stall_s, open_
            if time.monotonic() > deadline:
                raise RunFailed(f"{purpose}: no document moved in {self.config.stall_s:g} s; they stand at {counts}")
            self.watch()
            time.sleep(1.0)

    def focus(self, purpose: str | None) -> None:
        """Make rollout workers take only prompts of this purpose, or any."""
        ray.get([w.focus.remote(purpose) for w in self.rollouts], timeout=PING_S)

    def wait_for_version(self, packed: int) -> None:
        """Wait until every rollout worker has this policy version."""
        deadline = time.monotonic() + PING_S
        while set(versions := ray.get([w.version.remote() for w in self.rollouts], timeout=PING_S)) != {packed}:
            if time.monotonic() > deadline:
                raise RunFailed(f"rollout workers have versions {versions} after {PING_S:g} s, not {packed}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Close the store, end all actors, delete the servers this run owns; a second call does nothing."""
        actors, self._all = self._all, []
        if actors:
            with contextlib.suppress(ray.exceptions.RayError):  # it may be what broke
                ray.get(self.store.close.remote(), timeout=PING_S)
        for actor in actors:
            ray.kill(actor)
        owned, self._owned = self._owned, []
        for app in owned:
            serve.delete(app, _blocking=False)

    # ---- starting ----------------------------------------------------------------------------------------------

    def _start_actors(self) -> None:
        c = self.config
        step = self._checkpoint["step"] if self._checkpoint else 0
        service = actor_options(SERVICE)
        self.store = _actor(StoreActor, **service).remote(str(c.folder / "replay"), step)
        self.hub = _actor(WeightHub, **service).remote()
        self.feeder = _actor(Feeder, **service, max_restarts=-1).remote(
            self.store,
            self.hub,
            source=c.prompts.train,
            count=c.prompts.count,
            samples=c.learner.samples_per_prompt,
            prompts_per_step=c.learner.prompts_per_step,
            max_staleness=c.learner.max_staleness,
            steps=c.learner.steps,
            seed=c.seed,
        )
        self.rollouts = [self._rollout(i) for i in range(c.rollout.workers)]
        self.renderers = [
            _actor(Renderer, **actor_options(c.render), max_restarts=-1).remote(
                self.store,
                self.pool,
                {name: pool.timeout_s for name, pool in c.tools.items()},
                tool_specs(c),
                c.render.concurrency,
            )
            for _ in range(c.render.workers)
        ]
        timeout_s = max(pool.timeout_s for pool in _judges(c).values())
        self.scorers = [
            _actor(Scorer, **actor_options(c.score), max_restarts=-1).remote(
                self.store,
                self.pool,
                timeout_s=timeout_s,
                kind=c.reward.kind,
                multimodal=c.policy.multimodal,
                batch=c.score.concurrency,
            )
            for _ in range(c.score.workers)
        ]
        self.learners = [self._learner(rank) for rank in range(c.learner.ranks)]
        self._stages = {
            "feed": [self.feeder],
            "rollout": self.rollouts,
            "render": self.renderers,
            "score": self.scorers,
            "learn": self.learners,
        }
        self._all = [a for actors in self._stages.values() for a in actors] + [self.store, self.hub]

    def _rollout(self, i: int) -> Any:
        c = self.config
        return _actor(RolloutWorker, **actor_options(c.rollout, c.rollout.threads), max_restarts=-1).remote(
            self.store,
            self.hub,
            model=self._model,
            concurrency=c.rollout.concurrency,
            sampling={
                "max_tokens": c.rollout.max_tokens,
                "temperature": c.rollout.temperature,
                "top_p": c.rollout.top_p,
            },
            system=system_prompt(tool_specs(c)) if c.policy.system_prompt == "protocol" else "",
            engine=c.rollout.engine,
            scratch=f"/dev/shm/llmi-{c.name}",
            name=f"rollout-{i}",
        )

    def _learner(self, rank: int) -> Any:
        c = self.config.learner
        return _actor(LearnerRank, **actor_options(c, c.threads), max_concurrency=8).remote(
            rank,
            c.ranks,
            self.store,
            self.hub,
            model=self._model,
            options={
                "lr": c.lr,
                "betas": c.betas,
                "weight_decay": c.weight_decay,
                "warmup_steps": c.warmup_steps * c.updates_per_step,
                "total_steps": c.steps * c.updates_per_step,
                "schedule": c.schedule,
                "min_lr_ratio": c.min_lr_ratio,
                "grad_clip": c.grad_clip,
                "zero_stage": c.zero_stage,
                "dtype": c.dtype,
                "loss": c.loss,
                "loss_options": c.loss_options,
                "tokens_per_microbatch": c.tokens_per_microbatch,
                "threads": c.threads,
                "deepspeed": c.deepspeed,
            },
            recipe={k: getattr(c, k) for k in _RECIPE}
            | {"shuffled": self.config.reward.shuffled, "seed": self.config.seed},
            folder=str(self.config.folder / "checkpoints"),
            incarnation=self._incarnation,
        )

    def _start_servers(self) -> None:
        """Deploy the tool and judge servers, unless the config attaches to a running pool."""
        if self.config.pool is None:
            self._owned = deploy(self.config, self.pool)

    @property
    def pool(self) -> str:
        return self.config.pool or self.config.name

    def _up(self) -> None:
        from ray.rllib.utils.actor_manager import FaultTolerantActorManager

        tag = self._checkpoint["tag"] if self._checkpoint else None
        (self.config.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        address = self._get(self.learners[0].address.remote(), "learner rank 0")
        if tag is None:
            self._get(self.hub.publish.remote(version(self._incarnation, 0), None), "hub")
        self._get([rank.setup.remote(address, tag) for rank in self.learners], "learner ranks")
        workers = [*self.rollouts, *self.renderers, *self.scorers]
        self._get([w.ping.remote() for w in workers], "rollout, render and score workers")
        actors = [(name, a) for name, group in self._stages.items() if name != "feed" for a in group]
        self._manager = FaultTolerantActorManager([a for _, a in actors], max_remote_requests_in_flight_per_actor=4)
        self._stage_of = dict(enumerate(name for name, _ in actors))

    def begin(self) -> None:
        """Let training start: the feeder accepts prompts, the learner learns."""
        self._get(self.feeder.ping.remote(), "feeder")
        self._get([rank.start.remote() for rank in self.learners], "learner ranks")

    def _get(self, refs: Any, who: str) -> Any:
        try:
            return ray.get(refs, timeout=START_S)
        except ray.exceptions.GetTimeoutError:
            raise RunFailed(
                f"waited {START_S:g} s for {who} to start; `llmi train --dry-run` shows what is asked for"
            ) from None
        except ray.exceptions.RayTaskError as error:
            raise RunFailed(f"{who} failed to start: {error.cause!r}") from error


_RECIPE = ("steps", "prompts_per_step", "updates_per_step", "max_staleness", "advantage", "checkpoint_every", "keep")


def deploy(config: Config, pool: str) -> list[str]:
    """Start the tool and judge servers of a config as Serve applications; returns their names."""
    serve.start(proxy_location="Disabled", http_options={"host": "127.0.0.1"})
    targets = [
        serve.RunTarget(_deployment(ToolServer, p).bind(name, p.options), name=tool_app(pool, name), route_prefix=None)
        for name, p in config.tools.items()
    ] + [
        serve.RunTarget(
            _deployment(JudgeServer, p).bind(p.judge, p.options), name=judge_app(pool, name), route_prefix=None
        )
        for name, p in _judges(config).items()
    ]
    try:
        serve.run_many(targets)
    except RuntimeError as error:
        raise RunFailed(f"a tool or judge server of pool {pool!r} did not start: {error}") from error
    return [target.name for target in targets]


def tool_specs(config: Config) -> dict[str, ToolSpec]:
    """The protocol's tools: those that the config serves."""
    classes: dict[str, Any] = {name: load(name) for name in config.tools}
    return {name: cls.spec for name, cls in classes.items()}


def _deployment(server: Any, pool: ToolPool | JudgePool) -> Any:
    return server.options(
        num_replicas=pool.replicas,
        max_ongoing_requests=pool.concurrency,
        ray_actor_options=actor_options(pool),
        health_check_timeout_s=60,
        graceful_shutdown_timeout_s=2,
    )


def _actor(cls: Any, **options: Any) -> Any:
    return cls.options(**options)


def _judges(config: Config) -> dict[str, JudgePool]:
    return {"text": config.judges.text, "image": config.judges.image}


def actor_options(asked: Resources, threads: int = 1) -> dict[str, Any]:
    return {
        "num_cpus": asked.cpus,
        "num_gpus": asked.gpus,
        "resources": asked.resources or None,
        "runtime_env": {"env_vars": ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)}},
    }
