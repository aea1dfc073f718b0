"""Learner ranks: claim the oldest complete groups, take an optimiser step, publish the weights, end the groups.

Rank 0 claims and decides; every rank reads its own shard from the store; all ranks run the same number of
micro-batches. The order within a step is: update, publish, acknowledge, checkpoint. A crash between two of them is
mended by `Store.rewind` to the step that the checkpoint manifest names.
"""

from __future__ import annotations

import random
import socket
import statistics
import threading
import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import ray

from actors import metrics
from actors.weights import publish
from learners.advantages import ADVANTAGES
from learners.packing import Sample
from replay.checkpoints import Checkpoints
from replay.folders import fetched, written
from replay.record import staleness, version
from replay.store import Claim

TOKEN_COLUMNS = ["prompt_ids", "token_ids", "logprobs", "mask"]
LEASE_S = 1800.0
COLLECT_S = 600.0  # a collection may write many segments anew


@ray.remote
class LearnerRank:
    """One DeepSpeed rank.

    Args:
        rank, ranks: of the group.
        store, hub: handles.
        model: folder, `s3://...` or hub name to start from.
        options: of `learners.engine.Learner`.
        recipe: `steps`, `prompts_per_step`, `updates_per_step`, `passes`, `max_staleness`, `advantage`, `shuffled`,
            `seed`, `checkpoint_every`, `keep`.
        folder: of checkpoints: a path or `s3://...`.
        incarnation: which life of the run this is.
    """

    def __init__(
        self,
        rank: int,
        ranks: int,
        store: Any,
        hub: Any,
        *,
        model: str,
        options: Mapping[str, Any],
        recipe: Mapping[str, Any],
        folder: str,
        incarnation: int,
    ) -> None:
        self._rank, self._ranks, self._store, self._hub = rank, ranks, store, hub
        self._model, self._options, self._recipe = model, dict(options), recipe
        self._checkpoints, self._incarnation = Checkpoints(folder), incarnation
        self._step = 0
        self._history: list[dict[str, float]] = []
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._totals = {"busy_s": 0.0, "rows_in": 0, "tokens": 0}
        self._since = time.monotonic()

    def address(self) -> tuple[str, int]:
        """Where rank 0 listens for the others."""
        with socket.socket() as free:
            free.bind(("127.0.0.1" if self._ranks == 1 else "", 0))
            return (ray.util.get_node_ip_address() if self._ranks > 1 else "127.0.0.1"), free.getsockname()[1]

    def setup(self, address: tuple[str, int], tag: str | None) -> int:
        """Load model, optimiser and, with `tag`, a checkpoint; returns the optimiser steps done."""
        from learners.engine import Learner

        self._learner = Learner(
            fetched(self._model),
            rank=self._rank,
            world_size=self._ranks,
            master_addr=address[0],
            master_port=address[1],
            **self._options,
        )
        if tag is not None:
            self._step = int(self._learner.load(*self._checkpoints.fetched(tag))["step"])
            self._publish()
        return self._step

    def start(self) -> None:
        """Learn in a thread of its own until all steps are done."""
        self._since = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def ping(self) -> dict[str, float]:
        """How it is; raises what ended it."""
        if self._error is not None:
            raise RuntimeError(
                f"learner rank {self._rank} failed after step {self._step}: {type(self._error).__name__}: {self._error}"
            ) from self._error
        return self._totals | {"step": self._step, "alive_s": time.monotonic() - self._since}

    def apply(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        return func(self, *args, **kwargs)

    def history(self, since: int) -> list[dict[str, float]]:
        """Metrics of the optimiser steps from index `since` on."""
        return self._history[since:]

    def export(self, url: str) -> None:
        """Write the policy in Hugging Face form to a path or `s3://...` (every rank takes part, rank 0 writes)."""
        with written(url) if self._rank == 0 else nullcontext(url) as folder:
            self._learner.export(folder, fetched(self._model))

    def _run(self) -> None:
        try:
            while self._step < self._recipe["steps"]:
                self._one_step()
        except BaseException as error:
            self._error = error
            raise

    def _one_step(self) -> None:
        started = time.monotonic()
        plan = self._agree(self._plan() if self._rank == 0 else None)
        waited = time.monotonic() - started
        samples = self._read(plan)
        steps = [self._learner.step(part) for part in samples]
        self._step += 1
        published = time.monotonic()
        self._publish()
        publish_s = time.monotonic() - published
        if self._rank == 0:
            ends = {name: ("trained", "") for name in plan["trained"]}
            for token in plan["tokens"]:
                self._store.now(self._store.ack(token, ends, step=self._step, advantages=plan["trained"]))
        if self._step % self._recipe["checkpoint_every"] == 0 or self._step == self._recipe["steps"]:
            self._checkpoint()
        self._report(plan, steps, time.monotonic() - started, waited, publish_s)

    def _plan(self) -> dict[str, Any]:
        """Claim groups until a step is full; the (trajectory, advantage) of each minibatch."""
        now = self._version()
        claims: list[Claim] = []
        groups: dict[str, list[dict[str, Any]]] = {}
        while len(groups) < self._recipe["prompts_per_step"]:
            claim = self._store.now(
                self._store.claim(
                    "scored",
                    limit=self._recipe["prompts_per_step"] - len(groups),
                    by_group=True,
                    purpose="train",
                    lease_s=LEASE_S,
                    columns=["reward", "versions", "components"],
                    version=now,
                    max_staleness=self._recipe["max_staleness"],
                    wait_s=5.0,
                )
            )
            if claim is None:
                for held in claims:
                    self._store.now(self._store.extend(held.token, LEASE_S))
                continue
            claims.append(claim)
            groups |= self._valid(claim)
        return self._deal(groups, now) | {"tokens": [c.token for c in claims]}

    def _valid(self, claim: Claim) -> dict[str, list[dict[str, Any]]]:
        """Rows by group; a group with fewer than two samples teaches nothing and is dropped with that reason."""
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in claim.rows.to_pylist():
            groups.setdefault(row["group"], []).append(row)
        lonely = {
            r["trajectory"]: ("dropped_filtered", "fewer than two valid samples")
            for rows in groups.values()
            if len(rows) < 2
            for r in rows
        }
        if lonely:
            self._store.now(self._store.ack(claim.token, lonely))
        return {name: rows for name, rows in groups.items() if len(rows) > 1}

    def _deal(self, groups: Mapping[str, list[dict[str, Any]]], now: int) -> dict[str, Any]:
        rng = random.Random(f"{self._recipe['seed']}/{self._step}")
        if self._recipe["shuffled"]:
            rewards = [r["reward"] for rows in groups.values() for r in rows]
            rng.shuffle(rewards)
            deck = iter(rewards)
            groups = {g: [r | {"reward": next(deck)} for r in rows] for g, rows in groups.items()}
        advantage = ADVANTAGES[self._recipe["advantage"]]
        dealt = []
        for rows in groups.values():
            advantages = advantage([r["reward"] for r in rows])
            dealt.append([(r["trajectory"], float(a)) for r, a in zip(rows, advantages, strict=True)])
        parts = [part for _ in range(self._recipe["passes"]) for part in self._minibatches(dealt, rng)]
        rows = [r for group in groups.values() for r in group]
        ages = [staleness(now, min(r["versions"], default=now)) for r in rows]
        components = [dict(r["components"]) for r in rows]
        names = sorted({name for c in components for name in c})
        return {
            "parts": parts,
            "trained": {name: a for group in dealt for name, a in group},
            "stats": {
                "reward": statistics.fmean(r["reward"] for r in rows),
                "staleness": statistics.fmean(ages),
                "staleness_max": max(ages),
                "response_tokens": statistics.fmean(len(r["versions"]) for r in rows),
                **{f"reward/{k}": statistics.fmean(c.get(k, 0.0) for c in components) for k in names},
            },
        }

    def _minibatches(self, dealt: list[list[tuple[str, float]]], rng: random.Random) -> list[list[tuple[str, float]]]:
        """Groups dealt into `updates_per_step` minibatches, in an order of their own each pass."""
        n, order = self._recipe["updates_per_step"], rng.sample(dealt, len(dealt))
        return [[pair for group in order[i::n] for pair in group] for i in range(n)]

    def _read(self, plan: Mapping[str, Any]) -> list[list[Sample]]:
        """This rank's samples of every minibatch."""
        parts = []
        for part in plan["parts"]:
            mine = dict(part[self._rank :: self._ranks])
            rows = self._store.now(self._store.get(list(mine), TOKEN_COLUMNS)).to_pylist()
            parts.append([Sample(advantage=mine[r["trajectory"]], **{c: r[c] for c in TOKEN_COLUMNS}) for r in rows])
        return parts

    def _publish(self) -> None:
        weights = self._learner.weights()
        if self._rank == 0:
            publish(self._hub, self._version(), weights)
        else:
            for _ in weights:  # under ZeRO-3 gathering a parameter needs every rank
                pass

    def _checkpoint(self) -> None:
        """Save on all ranks; then commit the manifest as the one point that a resume trusts."""
        tag = f"step{self._step:06d}.{self._incarnation}"
        with self._checkpoints.writing(tag) as (folder, name):
            self._learner.save(folder, name, {"step": self._step})
        self._meet()  # every rank's part is in place
        if self._rank == 0:
            manifest = {
                "tag": tag,
                "step": self._step,
                "incarnation": self._incarnation,
                "cursor": self._store.now(self._store.state("train"))["groups"]["accepted"],
                "store": self._store.now(self._store.version()),
            }
            self._checkpoints.commit(manifest, self._incarnation)
            for old in self._checkpoints.tags()[: -self._recipe["keep"]]:
                self._checkpoints.remove(old)
            self._store.now(self._store.collect(self._recipe["retention"], self._step), COLLECT_S)

    def _report(
        self, plan: Mapping[str, Any], steps: list[dict[str, float]], step_s: float, wait_s: float, publish_s: float
    ) -> None:
        tokens = sum(s["tokens"] for s in steps)
        seconds = ("forward_backward_s", "optimizer_s", "tokens")
        mean = {k: statistics.fmean(s[k] for s in steps) for k in steps[0] if k not in seconds}
        total = {k: sum(s[k] for s in steps) for k in seconds}
        row = {"step": self._step, **plan["stats"], **mean, **total}
        row |= {"step_s": step_s, "wait_s": wait_s, "publish_s": publish_s, "time": time.time()}
        self._totals["busy_s"] += step_s - wait_s
        self._totals["tokens"] += int(tokens)
        self._totals["rows_in"] += len(plan["trained"])
        self._history.append(row)
        if self._rank == 0:
            metrics.gauge("reward", row["reward"])
            metrics.gauge("staleness", row["staleness"])
            metrics.gauge("tokens_per_second", tokens / max(step_s - wait_s, 1e-9), stage="learn")
            metrics.gauge("policy_version", self._step, stage="learn")
            metrics.count("tokens", tokens, stage="learn")
            metrics.observe("seconds", step_s, stage="learn")
            metrics.count("rows_in", len(plan["trained"]), stage="learn")
            metrics.count("busy_seconds", step_s - wait_s, stage="learn")

    def _version(self) -> int:
        return version(self._incarnation, self._step)

    def _meet(self) -> None:
        """Wait for the other ranks."""
        if self._ranks > 1:
            import torch.distributed as dist

            dist.barrier()

    def _agree(self, plan: dict[str, Any] | None) -> dict[str, Any]:
        """Rank 0's plan, on every rank."""
        if self._ranks == 1:
            assert plan is not None
            return plan
        import torch.distributed as dist

        box = [plan]
        dist.broadcast_object_list(box, src=0)
        assert box[0] is not None
        return box[0]
