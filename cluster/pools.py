"""Builds what a run consists of, says where it goes, watches it, and takes it down.

Tool and judge servers are Serve applications named after the pool; the others are plain actors. Ray restarts a dead
actor; RLlib's `FaultTolerantActorManager` finds it again, and its first ping starts its loop.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray import serve
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.feeder import Feeder
from actors.learner import LearnerRank
from actors.renderer import Renderer
from actors.rollout import RolloutWorker
from actors.scorer import Scorer
from actors.store import StoreActor, StoreClient
from actors.weights import WeightHub, Weights
from agent.prompt import system_prompt
from cluster.config import Config, Resources, reward_terms, scores_calls, shares_gpu, takes_turns
from cluster.console import say
from cluster.servers import RunFailed, actor_options, deploy, judges, learner_options, tool_specs
from learners.checkpoint import CONVERT_S
from replay.record import Prompt, version
from replay.staleness import Capacity
from replay.store import Retention
from replay.view import make_shards

SERVICE = Resources(cpus=0.01, gpus=0)  # hub and feeder: one small process each
START_S = 1800.0  # nodes that an autoscaler adds, and the largest weights, are there by then
SLOW_S = 120.0  # whoever takes longer to start is spoken of
PING_S = 120.0

STAGES = ("rollout", "render", "score", "learn")
_OPTIONS = (
    *("lr", "betas", "weight_decay", "schedule", "min_lr_ratio", "grad_clip", "zero_stage", "dtype", "loss"),
    *("loss_options", "aggregation", "correction", "entropy_bonus", "tokens_per_microbatch", "threads", "deepspeed"),
    *("gradient_checkpointing", "sequence_parallel", "lora"),
)
_RECIPE = (
    *("steps", "prompts_per_step", "updates_per_step", "passes", "max_staleness", "checkpoint_every", "keep"),
    *("advantage", "correction", "kl", "dynamic_sampling", "overlong", "credit_calls"),
)


def init_ray() -> bool:
    """Join the cluster that RAY_ADDRESS names (as in a submitted job), or start Ray here; True if it was started.

    Ray and Serve then speak on the terminal only of what is wrong.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A put's memory is free for the next one then. By default it is after a second: memory that nothing has touched
    # yet is filled instead, which takes five times as long.
    os.environ.setdefault("RAY_free_objects_period_milliseconds", "10")
    if ray.is_initialized():
        return False
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level="WARNING")
        return False
    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=1 << 30,
        log_to_driver=False,
        logging_level="WARNING",
    )
    return True


@contextlib.contextmanager
def serving(config: Config) -> Iterator[str]:
    """The tool and judge servers of a config alone, for as long as the context lasts; gives the pool's name."""
    started = init_ray()
    try:
        apps = deploy(config, config.name)
        try:
            yield config.name
        finally:
            for app in apps:
                serve.delete(app, _blocking=False)
    finally:
        if started:
            ray.shutdown()


def placement(config: Config) -> list[tuple[str, int, Resources]]:
    """(name, how many, what each asks for) of every actor and replica, in the order they start."""
    rows: list[tuple[str, int, Resources]] = [
        ("store", config.store.shards, config.store),
        ("hub", 1, SERVICE),
        ("feeder", 1, SERVICE),
    ]
    rows += [(f"tool {name}", pool.most, pool) for name, pool in config.tools.items()]
    rows += [(f"judge {name}", pool.replicas, pool) for name, pool in judges(config).items()]
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
        first: place in the data order that the store begins at.

    Attributes:
        client_class: how everyone sees the store.
    """

    client_class: type[StoreClient] = StoreClient

    def __init__(
        self,
        config: Config,
        model: str,
        incarnation: int,
        checkpoint: Mapping[str, Any] | None,
        first: int = 0,
    ) -> None:
        self.config, self._model, self._first = config, model, first
        self._incarnation, self._checkpoint = incarnation, checkpoint
        self._owned: list[str] = []
        self._all: list[Any] = []
        self._shards: list[Any] = []
        self._stages: dict[str, list[Any]] = {}
        self._gpus: Any = None  # that learner ranks and engines share

    def start(self, stages: Sequence[str] = STAGES) -> None:
        """Start the store, the servers and the workers of these stages; returns when all are up.

        Raises:
            RunFailed: naming what did not come up.
        """
        from ray.rllib.utils.actor_manager import FaultTolerantActorManager

        self._start_services()
        self.share()
        makers = {"rollout": self._rollouts, "render": self._renderers, "score": self._scorers, "learn": self._learners}
        self._stages = {name: makers[name]() for name in STAGES if name in stages}
        actors = [(name, actor) for name, group in self._stages.items() for actor in group]
        self._all += [actor for _, actor in actors]
        if self.config.pool is None and {"render", "score"} & set(stages):
            self._owned = deploy(self.config, self.pool)
        self._get(self._first_version(), "learner ranks", START_S + CONVERT_S)
        workers = [actor for name, actor in actors if name != "learn"]
        self._get([w.ping.remote() for w in workers], "rollout, render and score workers")
        self._manager = FaultTolerantActorManager([a for _, a in actors], max_remote_requests_in_flight_per_actor=4)
        self._stage_of = dict(enumerate(name for name, _ in actors))

    def share(self) -> None:
        """Reserve the GPUs that learner ranks and engines share; a trial has its own."""
        if shares_gpu(self.config) and ray.util.get_current_placement_group() is None:
            both = shared(self.config)
            bundle = {k: v for k, v in {"CPU": both.cpus, "GPU": both.gpus, **both.resources}.items() if v}
            self._gpus = ray.util.placement_group([bundle] * self.config.learner.ranks)

    def begin(self) -> None:
        """Let training start: the feeder accepts prompts, the learner learns."""
        self._get(self.feeder.ping.remote(), "feeder")
        self._get([rank.start.remote() for rank in self.learners], "learner ranks")

    def watch(self) -> dict[str, list[dict[str, float]]]:
        """Ping everyone; how each stage is. Raises RunFailed for what does not come back."""
        self._manager.probe_unhealthy_actors(timeout_seconds=PING_S, mark_healthy=True)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in self._stages}
        results = list(self._manager.foreach_actor("ping", timeout_seconds=PING_S).result_or_errors)
        # The dead first: the ranks beside a dead one fail too, of its absence.
        for result in sorted(results, key=lambda r: r.ok or not isinstance(r.get(), ray.exceptions.ActorDiedError)):
            stage = self._stage_of[result.actor_id]
            if result.ok:
                found[stage].append(result.get())
            elif isinstance(cause := result.get(), ray.exceptions.RayTaskError):
                raise RunFailed(f"{stage} failed: {cause.cause}") from cause
            elif isinstance(cause, ray.exceptions.ActorDiedError):  # those that may restart are only unavailable
                raise _died(stage, cause) from cause
        return found

    def steps(self, since: int) -> list[dict[str, float]]:
        """Metrics of the optimiser steps from index `since` on. Raises RunFailed if the learner died."""
        try:
            return self._ask(self.learners[0].history.remote(since), "learner rank 0")
        except ray.exceptions.ActorDiedError as cause:
            raise _died("learn", cause) from cause

    def evaluate(self, purpose: str, prompts: Sequence[Prompt], on_progress: Any = None) -> None:
        """Run a prompt set through rollout, tools and judges; returns when every document has come to an end."""
        self._ask(self.feeder.accept.remote(purpose, list(prompts)), "feeder")
        self.wait_for(purpose, len(prompts), on_progress)

    def wait_for(self, purpose: str, documents: int, on_progress: Any = None) -> None:
        """Return when so many documents of a purpose have come to an end; RunFailed when none moves any more."""
        deadline, last = time.monotonic() + self.config.stall_s, -1
        while True:
            counts = self.store.now(self.store.state(purpose))["counts"]
            open_ = (
                documents - sum(counts.values()) + sum(counts.get(s, 0) for s in ("pending", "generated", "rendered"))
            )
            if on_progress:
                on_progress(documents - open_, documents)
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
        self._ask([w.focus.remote(purpose) for w in self.rollouts], "rollout workers")

    def wait_for_version(self, packed: int) -> None:
        """Wait until every rollout worker has this policy version, and the same weights."""
        deadline = time.monotonic() + PING_S
        wanted = packed, self._ask(self.hub.current.remote(), "hub")[1]
        while set(found := self._ask([w.weights.remote() for w in self.rollouts], "rollout workers")) != {wanted}:
            if time.monotonic() > deadline:
                raise RunFailed(f"after {PING_S:g} s rollout workers have (version, checksum) {found}, not {wanted}")
            time.sleep(0.1)

    def stop(self) -> None:
        """End all actors, close the store last, delete the servers this run owns; a second call does nothing."""
        actors, self._all = self._all, []
        shards, self._shards = self._shards, []
        for actor in actors:
            ray.kill(actor)
        if shards:
            with contextlib.suppress(ray.exceptions.RayError, TimeoutError):  # it may be what broke
                self.store.now(self.store.close())
        for shard in shards:
            ray.kill(shard)
        if self._gpus is not None:
            ray.util.remove_placement_group(self._gpus)
            self._gpus = None
        owned, self._owned = self._owned, []
        for app in owned:
            serve.delete(app, _blocking=False)

    # ---- starting ----------------------------------------------------------------------------------------------

    def _start_services(self) -> None:
        c = self.config
        service = actor_options(SERVICE)
        step = self._checkpoint["step"] if self._checkpoint else 0
        shards = [
            _actor(StoreActor, **actor_options(c.store)).remote(url)
            for url in make_shards(f"{c.folder}/replay", c.store.shards)
        ]
        self._shards = shards
        self.store = self.client_class(shards)
        self.store.now(self.store.rewind(step), START_S)
        self.hub = _actor(WeightHub, **service).remote()
        self.feeder = _actor(Feeder, **service, max_restarts=-1).remote(
            self.store,
            self.hub,
            source=c.prompts.train,
            count=c.prompts.count,
            tools=list(c.tools),
            samples=c.learner.samples_per_prompt,
            capacity=_capacity(c),
            first=self._first,
            seed=c.seed,
        )
        self._all = [self.hub, self.feeder]

    def _first_version(self) -> list[Any]:
        """Load the learner ranks; the hub then has the version to start from."""
        if self._checkpoint is None:
            self._get(self.hub.publish.remote(Weights(version(self._incarnation, 0))), "hub")
        if not self.learners:
            return []
        address = self._get(self.learners[0].address.remote(), "learner rank 0")
        tag = self._checkpoint["tag"] if self._checkpoint else None
        return [rank.setup.remote(address, tag) for rank in self.learners]

    def _rollouts(self) -> list[Any]:
        c = self.config
        sampling = {"max_tokens": c.rollout.max_tokens, "temperature": c.rollout.temperature, "top_p": c.rollout.top_p}
        return [
            _actor(
                RolloutWorker, **actor_options(c.rollout, c.rollout.threads), **self._on_gpu(i), max_restarts=-1
            ).remote(
                self.store,
                self.hub,
                model=self._model,
                concurrency=c.rollout.concurrency,
                sampling=sampling,
                system=system_prompt(tool_specs(c)) if c.policy.system_prompt == "protocol" else "",
                engine=c.rollout.engine,
                name=f"rollout-{i}",
                weights=c.weights,
                max_staleness=c.learner.max_staleness,
            )
            for i in range(c.rollout.workers)
        ]

    def _renderers(self) -> list[Any]:
        c = self.config
        return [
            _actor(Renderer, **actor_options(c.render), max_restarts=-1).remote(
                self.store,
                self.pool,
                {name: pool.timeout_s for name, pool in c.tools.items()},
                tool_specs(c),
                c.render.document_s,
                c.render.concurrency,
            )
            for _ in range(c.render.workers)
        ]

    def _scorers(self) -> list[Any]:
        c = self.config
        return [
            _actor(Scorer, **actor_options(c.score), max_restarts=-1).remote(
                self.store,
                self.pool,
                timeout_s=max(pool.timeout_s for pool in judges(c).values()),
                kind=c.reward.kind,
                multimodal=c.policy.multimodal,
                terms=reward_terms(c),
                process=scores_calls(c),
                batch=c.score.concurrency,
            )
            for _ in range(c.score.workers)
        ]

    def _learners(self) -> list[Any]:
        c, sampler = self.config.learner, self.config.rollout
        run = {
            "max_tokens": sampler.max_tokens,
            "shuffled": self.config.reward.shuffled,
            "seed": self.config.seed,
            "weights": self.config.weights,
            "adapter": bool(sampler.engine.get("enable_lora")),
            "turns": takes_turns(self.config),
            "retention": Retention(self.config.store.max_bytes, self.config.store.max_age_s),
        }
        recipe = c.model_dump(include=set(_RECIPE))
        options = c.model_dump(include=set(_OPTIONS)) | {
            "kl": c.kl.estimator if c.kl.into == "loss" else None,
            "kl_coef": c.kl.coef,
            "kl_unbiased": c.kl.unbiased,
            "temperature": sampler.temperature,
            "max_tokens": sampler.max_tokens,
            "warmup_steps": c.warmup_steps * c.updates_per_step * c.passes,
            "total_steps": c.steps * c.updates_per_step * c.passes,
        }
        # Without engines nothing can be written anew, so no group is too old.
        alone = {"max_staleness": c.steps + (1 << 20)} if self.config.train.only == "learn" else {}
        return [
            _actor(LearnerRank, **learner_options(c, c.threads), **self._on_gpu(rank), max_concurrency=8).remote(
                rank,
                c.ranks,
                self.store,
                self.hub,
                model=self._model,
                options=options,
                recipe=recipe | run | alone,
                checkpoints=f"{self.config.folder}/checkpoints",
                policy=f"{self.config.folder}/policy",
                incarnation=self._incarnation,
            )
            for rank in range(c.ranks)
        ]

    def _on_gpu(self, i: int) -> dict[str, Any]:
        """Where learner rank i and engine i go: on the i-th GPU that they share, or wherever there is room."""
        if self._gpus is None:
            return {}
        return {"scheduling_strategy": PlacementGroupSchedulingStrategy(self._gpus, placement_group_bundle_index=i)}

    @property
    def pool(self) -> str:
        return self.config.pool or self.config.name

    @property
    def rollouts(self) -> list[Any]:
        return self._stages.get("rollout", [])

    @property
    def renderers(self) -> list[Any]:
        return self._stages.get("render", [])

    @property
    def learners(self) -> list[Any]:
        return self._stages.get("learn", [])

    def _ask(self, refs: Any, who: str) -> Any:
        try:
            return ray.get(refs, timeout=PING_S)
        except ray.exceptions.GetTimeoutError:
            raise RunFailed(f"the driver waited {PING_S:g} s for an answer of {who}") from None

    def _get(self, refs: Any, who: str, wait_s: float = START_S) -> Any:
        try:
            with contextlib.suppress(ray.exceptions.GetTimeoutError):
                return ray.get(refs, timeout=SLOW_S)
            say(f"still waiting for {who} to start; `llmi train --dry-run` shows what is asked for, `ray status` why")
            return ray.get(refs, timeout=wait_s)
        except ray.exceptions.GetTimeoutError:
            raise RunFailed(
                f"waited {wait_s:g} s for {who} to start; `llmi train --dry-run` shows what is asked for"
            ) from None
        except ray.exceptions.RayTaskError as error:
            raise RunFailed(f"{who} failed to start: {error.cause!r}") from error


def shared(config: Config) -> Resources:
    """What a learner rank and the engine on its GPU ask for together."""
    learner, engine = config.learner, config.rollout
    names = {**learner.resources, **engine.resources}
    resources = {name: learner.resources.get(name, 0.0) + engine.resources.get(name, 0.0) for name in names}
    return Resources(cpus=learner.cpus + engine.cpus, gpus=1.0, resources=resources)


def _capacity(config: Config) -> Capacity:
    """What may be open. A run without a learner may fill its store; one without engines has all it needs."""
    c, only = config.learner, config.train.only
    stages = (config.rollout, config.render, config.score)
    held = sum(stage.workers * stage.concurrency for stage in stages)
    return Capacity(
        max_staleness=c.steps if only else c.max_staleness,
        batch=c.prompts_per_step,
        concurrency=-(-2 * held // c.samples_per_prompt),  # as much again waits, so that no worker does
        steps=0 if only == "learn" else c.steps,
    )


def _died(stage: str, cause: Exception) -> RunFailed:
    why = str(cause).splitlines()[-1].partition(". Some common causes")[0]
    return RunFailed(f"a {stage} actor died; `llmi train CONFIG --resume` goes on: {why}")


def _actor(cls: Any, **options: Any) -> Any:
    return cls.options(**options)
